"""Encoders by name: a closed table, so that no string of a recipe ever becomes an import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from drencoder.encoders.code_sizes import code_size
from drencoder.encoders.contract import Encoder, check_segments
from drencoder.encoders.gaussian_prior import GaussianPrior, SyntheticGradients, sample_structured
from drencoder.encoders.hybrid import HybridEncoder
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, PublicUpdates, matrix_shape
from drencoder.encoders.random_sketch import UNIFORM_SHARE, RandomSketch, allocate_code
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions, StepCallback
from drencoder.published.fedcg import RealGradients
from drencoder.published.lowrank import LowRankEncoder
from drencoder.published.subset import SubsetEncoder, is_lora_b
from drencoder.rng import derive_seed

__all__ = ["ENCODERS", "EncoderRequest", "build_encoder"]


@dataclass(frozen=True)
class EncoderRequest:
    """Everything that an encoder may be made from; all of it public, except `real`."""

    segments: tuple[Segment, ...]
    code_size: int | None = None  # fixed by "identity", "autoencoder", "ffa" and "core", required by the others
    prior: GaussianPrior | None = None  # "random": uniform allocation without; "autoencoder": required
    seed: int = 0
    floor: float = UNIFORM_SHARE  # "random": share of the code that is spread uniformly
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    on_step: StepCallback | None = None
    real: RealGradients | None = None  # FedCG: train the auto-encoder on these and not on the prior's; NOT private
    public: PublicUpdates | None = None  # "kronecker", "hybrid", "top-k", "core": required
    rank: int = 64  # "kronecker", "hybrid": directions known per side of a tensor
    explore: float = 0.25  # "hybrid", "power": share of the code for fresh random directions
    history_JD: Tensor | None = None  # "hybrid", "power": directions of aggregates that were released before
    only_b: bool = False  # "hybrid": a code about LoRA's B tensors alone


State = Mapping[str, Tensor] | None
_VALIDATION_SHARE = 0.2  # of the real gradients


def _check_size(request: EncoderRequest, name: str, code_size: int) -> None:
    if request.code_size not in (None, code_size):
        raise EncoderError(
            f"code_size is {request.code_size}, but the {name} encoder of this adapter always sends "
            f"{code_size} values; leave code_size out or choose the random encoder"
        )


def _identity(request: EncoderRequest, state: State) -> Encoder:
    encoder = IdentityEncoder.from_state(request.segments, state or {})
    _check_size(request, encoder.name, encoder.code_size)
    return encoder


def _random(request: EncoderRequest, state: State) -> Encoder:
    sketch = RandomSketch.build(request.segments, _code_size(request, "random"), request.prior, request.floor)
    return RandomSketch.from_state(sketch.segments, sketch.code_S, state or {})


def _autoencoder(request: EncoderRequest, state: State) -> Encoder:
    options = request.autoencoder
    size = check_segments(request.segments)
    _check_size(request, "autoencoder", code_size("autoencoder", size, 0.0, options.architecture))
    if state:
        restored = Autoencoder.from_state(request.segments, state)
        if restored.architecture != options.architecture:
            raise EncoderError(
                f"the saved autoencoder is a {restored.architecture}, the recipe wants a {options.architecture}; "
                "resume with the recipe of that run"
            )
        return restored
    if request.real is not None:
        real, validation = request.real.split(_VALIDATION_SHARE, request.seed)
        return Autoencoder.fit_non_private(
            request.segments, real, validation, seed=request.seed, options=options, on_step=request.on_step
        )
    draw: Callable[[int, int], SyntheticGradients]
    if request.public is not None:
        draw = partial(sample_structured, _structured(request, "autoencoder"))
    elif request.prior is not None:
        draw = request.prior.sample
    else:
        raise EncoderError("the autoencoder is trained on synthetic gradients and needs a prior; run stage 1")
    return Autoencoder.fit(
        request.segments,
        draw(options.samples, derive_seed(request.seed, "autoencoder-train")),
        draw(options.validation, derive_seed(request.seed, "autoencoder-validation")),
        seed=request.seed,
        options=options,
        on_step=request.on_step,
    )


def _code_size(request: EncoderRequest, name: str) -> int:
    if request.code_size is None:
        raise EncoderError(f"the {name} encoder needs a code_size; give the number of values to send")
    return request.code_size


def _structured(request: EncoderRequest, name: str) -> MatrixNormalPrior:
    """The structured prior: directions of public text, and the tensors' energies of the clients' moments where those are known."""
    prior = _public(request, name).prior(request.segments, request.rank)
    return prior if request.prior is None else prior.with_energies(request.prior.energy_S)


def _public(request: EncoderRequest, name: str) -> PublicUpdates:
    if request.public is None:
        raise EncoderError(f"the {name} encoder is made from updates of public text; set prior.public")
    return request.public


def _kronecker(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return KroneckerEncoder.from_state(request.segments, state)
    return KroneckerEncoder.build(_structured(request, "kronecker"), _code_size(request, "kronecker"))


def _hybrid(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return HybridEncoder.from_state(request.segments, state)
    segments, size = request.segments, _code_size(request, "hybrid")
    size_S, sent_S = _sent(request)
    most = int((size_S * sent_S).sum())
    if size > most:
        raise EncoderError(
            f"code_size is {size}, but the tensors that the hybrid encoder sends have {most} values; lower it"
        )
    prior = _structured(request, "hybrid")
    random = min(size - 1, round(request.explore * size))
    history_JD = (_history(request) * sent_S.repeat_interleave(size_S))[: size - 1 - random]
    if size == most:  # everything that is sent, in the prior's coordinates: nothing is left for directions or a sketch
        random, history_JD = 0, history_JD[:0]
    head = KroneckerEncoder.build(prior, size - random - len(history_JD), sent_S.tolist())
    known = HybridEncoder.build(head, history_JD, None)
    # The sketch also takes the place of directions that the head explains, so that the code has the size of the plan.
    random = size - known.code_size
    if not random:
        return known
    code_S = torch.zeros_like(size_S)
    looked_at = tuple(segment for segment, sent in zip(segments, sent_S.tolist(), strict=True) if sent)
    code_S[sent_S] = allocate_code(looked_at, random, None, request.floor)
    return replace(known, sketch=RandomSketch(segments, tuple(code_S.tolist())))


def _sent(request: EncoderRequest) -> tuple[Tensor, Tensor]:
    """Sizes (S,) of the tensors, and which of them the hybrid encoder sends (S,) bool."""
    size_S = torch.tensor([segment.size for segment in request.segments])
    if not request.only_b:
        return size_S, torch.ones_like(size_S, dtype=torch.bool)
    sent_S = torch.tensor([is_lora_b(segment) for segment in request.segments])
    if not bool(sent_S.any()):
        raise EncoderError(
            f"none of the {len(size_S)} adapter tensors is the B of a LoRA pair; set encoder.tensors = 'both'"
        )
    return size_S, sent_S


def _history(request: EncoderRequest) -> Tensor:
    """Released directions (J, D) other than zero; fedavg keeps no momentum, and no optimiser has one before its first step."""
    if request.history_JD is None:
        return torch.zeros(0, check_segments(request.segments))
    return request.history_JD[request.history_JD.any(dim=1)]


def _ffa(request: EncoderRequest, state: State) -> Encoder:
    encoder = (
        SubsetEncoder.from_state(request.segments, state, "ffa") if state else SubsetEncoder.lora_b(request.segments)
    )
    _check_size(request, encoder.name, encoder.code_size)
    return encoder


def _top(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return SubsetEncoder.from_state(request.segments, state, "top-k")
    return SubsetEncoder.top(_public(request, "top-k"), request.segments, _code_size(request, "top-k"))


def _core(request: EncoderRequest, state: State) -> Encoder:
    if state:
        encoder = LowRankEncoder.from_state(request.segments, state, "core")
    else:
        widths = [matrix_shape(segment)[1] for segment in request.segments if is_lora_b(segment)]
        encoder = LowRankEncoder.core(_public(request, "core").prior(request.segments, max(widths, default=1)))
    _check_size(request, encoder.name, encoder.code_size)
    return encoder


def _power(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return LowRankEncoder.from_state(request.segments, state, "power")
    history_JD, size = _history(request), _code_size(request, "power")
    return LowRankEncoder.power(request.segments, size, history_JD[0] if len(history_JD) else None, request.explore)


ENCODERS: Mapping[str, Callable[[EncoderRequest, State], Encoder]] = MappingProxyType(
    {
        "identity": _identity,
        "random": _random,
        "autoencoder": _autoencoder,
        "kronecker": _kronecker,
        "hybrid": _hybrid,
        "ffa": _ffa,
        "top-k": _top,
        "core": _core,
        "power": _power,
    }
)


def build_encoder(name: str, request: EncoderRequest, state: State = None) -> Encoder:
    """The encoder of this name, or the saved one if `state` holds its tensors.

    Deterministic in its arguments. EncoderError for an unknown name, for a `code_size` that the encoder cannot
    have, and for real gradients given to anything but the auto-encoder.
    """
    if name not in ENCODERS:
        raise EncoderError(f"there is no encoder {name!r}; choose one of {', '.join(ENCODERS)}")
    if request.real is not None and name != "autoencoder":
        raise EncoderError(f"real gradients train the autoencoder only, not {name!r}; set encoder.name = 'autoencoder'")
    return ENCODERS[name](request, state)
