"""Encoders by name: a closed table, so that no string of a recipe ever becomes an import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from drencoder.encoders.autoencoder import Autoencoder, AutoencoderOptions, StepCallback
from drencoder.encoders.contract import Encoder, check_segments
from drencoder.encoders.fedcg import RealGradients
from drencoder.encoders.hybrid import HybridEncoder
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.sizes import code_size
from drencoder.encoders.sketch import RandomSketch
from drencoder.errors import EncoderError
from drencoder.layout import Segment
from drencoder.prior import GaussianPrior
from drencoder.rng import derive_seed
from drencoder.structured import PublicUpdates

__all__ = ["ENCODERS", "EncoderRequest", "build_encoder"]


@dataclass(frozen=True)
class EncoderRequest:
    """Everything that an encoder may be made from; all of it public, except `real`."""

    segments: tuple[Segment, ...]
    code_size: int | None = None  # fixed by "identity" and "autoencoder", required by the others
    prior: GaussianPrior | None = None  # "random": uniform allocation without; "autoencoder": required
    seed: int = 0
    floor: float = 0.1  # "random": share of the code that is spread uniformly
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    on_step: StepCallback | None = None
    real: RealGradients | None = None  # FedCG: train the auto-encoder on these and not on the prior's; NOT private
    public: PublicUpdates | None = None  # "kronecker", "hybrid": required
    rank: int = 64  # directions known per side of a tensor
    explore: float = 0.25  # "hybrid": share of the code for the random block
    history_JD: Tensor | None = None  # "hybrid": directions of aggregates that were released before


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
    if request.prior is None:
        raise EncoderError("the autoencoder is trained on synthetic gradients and needs a prior; run stage 1")
    return Autoencoder.fit(
        request.segments,
        request.prior.sample(options.samples, derive_seed(request.seed, "autoencoder-train")),
        request.prior.sample(options.validation, derive_seed(request.seed, "autoencoder-validation")),
        seed=request.seed,
        options=options,
        on_step=request.on_step,
    )


def _code_size(request: EncoderRequest, name: str) -> int:
    if request.code_size is None:
        raise EncoderError(f"the {name} encoder needs a code_size; give the number of values to send")
    return request.code_size


def _public(request: EncoderRequest, name: str) -> PublicUpdates:
    if request.public is None:
        raise EncoderError(f"the {name} encoder is made from updates of public text; set prior.public")
    return request.public


def _kronecker(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return KroneckerEncoder.from_state(request.segments, state)
    prior = _public(request, "kronecker").prior(request.segments, request.rank)
    return KroneckerEncoder.build(prior, _code_size(request, "kronecker"))


def _hybrid(request: EncoderRequest, state: State) -> Encoder:
    if state:
        return HybridEncoder.from_state(request.segments, state)
    size, prior = _code_size(request, "hybrid"), _public(request, "hybrid").prior(request.segments, request.rank)
    history_JD = prior.spread_S.new_zeros(0, check_segments(request.segments)).float()
    history_JD = history_JD if request.history_JD is None else request.history_JD
    random = min(size - 1, round(request.explore * size))
    head = KroneckerEncoder.build(prior, max(1, size - random - len(history_JD)))
    sketch = RandomSketch.build(request.segments, random) if random else None
    return HybridEncoder.build(head, history_JD, sketch)


ENCODERS: Mapping[str, Callable[[EncoderRequest, State], Encoder]] = MappingProxyType(
    {
        "identity": _identity,
        "random": _random,
        "autoencoder": _autoencoder,
        "kronecker": _kronecker,
        "hybrid": _hybrid,
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
