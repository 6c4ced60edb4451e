"""Encoders by name: a closed table, so that no string of a recipe ever becomes an import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from drencoder.encoders.autoencoder import Autoencoder, AutoencoderOptions, StepCallback
from drencoder.encoders.contract import Encoder, check_segments
from drencoder.encoders.fedcg import RealGradients
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.sizes import code_size
from drencoder.encoders.sketch import RandomSketch
from drencoder.errors import EncoderError
from drencoder.layout import Segment
from drencoder.prior import GaussianPrior
from drencoder.rng import derive_seed

__all__ = ["ENCODERS", "EncoderRequest", "build_encoder"]


@dataclass(frozen=True)
class EncoderRequest:
    """Everything that an encoder may be made from; all of it public, except `real`."""

    segments: tuple[Segment, ...]
    code_size: int | None = None  # required by "random", fixed by the others
    prior: GaussianPrior | None = None  # "random": uniform allocation without; "autoencoder": required
    seed: int = 0
    floor: float = 0.1  # "random": share of the code that is spread uniformly
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    on_step: StepCallback | None = None
    real: RealGradients | None = None  # FedCG: train the auto-encoder on these and not on the prior's; NOT private


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
    if request.code_size is None:
        raise EncoderError("the random encoder needs a code_size; give the number of values to send")
    sketch = RandomSketch.build(request.segments, request.code_size, request.prior, request.floor)
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


ENCODERS: Mapping[str, Callable[[EncoderRequest, State], Encoder]] = MappingProxyType(
    {"identity": _identity, "random": _random, "autoencoder": _autoencoder}
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
