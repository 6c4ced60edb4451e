"""The published encoder: a convolutional auto-encoder, trained on synthetic gradients (DR-Encoder) or real ones (FedCG).

Legend: N clients, D adapter values, K code values, S segments.

CG-FedLLM (Wu et al., arXiv 2405.13746, appendix) and DR-Encoder (Wu et al., AAAI-25, arXiv 2412.17053): one network for all
clients and layers, mean squared error, Adam at 2e-4. `architectures` holds the networks and the input layout,
`fitting` the training loop.

What to expect: the published prior is i.i.d. within a LoRA tensor, so there is nothing to learn beyond K/D of
the energy, and this network does not even reach that. It is here as the faithful baseline; the gate measures it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from drencoder.encoders import contract
from drencoder.encoders.code_sizes import code_shape, input_shape
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.gaussian_prior import SyntheticGradients, sample_structured
from drencoder.encoders.request import EncoderRequest, SavedState, StepCallback, TrainingGradients
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.published.architectures import ARCHITECTURES, AutoencoderNetwork, blank_network
from drencoder.published.fedcg import RealGradients
from drencoder.published.fitting import AutoencoderOptions, Frame, fit_network
from drencoder.rng import derive_seed

TrainedOn = Literal["synthetic", "real"]

_VALIDATION_SHARE = 0.2  # of the real gradients

TRAINING = AutoencoderOptions()
"""How a run's auto-encoder is trained, whichever it is."""


@final
@dataclass(frozen=True, eq=False)
class Autoencoder:
    """The trained network, frozen: BatchNorm uses its stored statistics, so rows never mix.

    `network` must not be trained further by anyone. scale_S (float64, positive) is what each segment is divided by;
    `saturated_share` the share of validation values beyond Tanh's range; `trained_on` whose gradients the weights
    have seen: "real" ones make the encoder itself a leak (FedCG).
    """

    segments: tuple[Segment, ...]
    network: AutoencoderNetwork
    scale_S: Tensor
    name: str = "autoencoder"
    trained_on: TrainedOn = "synthetic"
    saturated_share: float = 0.0

    linear: ClassVar[bool] = False

    @classmethod
    def fit(
        cls,
        segments: tuple[Segment, ...],
        synthetic: SyntheticGradients,
        validation: SyntheticGradients,
        *,
        seed: int,
        options: AutoencoderOptions | None = None,
        on_step: StepCallback | None = None,
    ) -> "Autoencoder":
        """Trains on `synthetic`, keeps the weights that were best on `validation`; the same for the same seed.

        Early stopping looks at synthetic gradients only. EncoderError if the gradients do not fit `segments`, are
        not finite or all zero, or the loss stops being finite; TypeError for anything but SyntheticGradients.
        """
        if not (isinstance(synthetic, SyntheticGradients) and isinstance(validation, SyntheticGradients)):
            raise TypeError("Autoencoder.fit takes SyntheticGradients only; draw them with a prior's sample()")
        return cls._fit(segments, synthetic, validation, "synthetic", seed, options, on_step)

    @classmethod
    def fit_non_private(
        cls,
        segments: tuple[Segment, ...],
        real: RealGradients,
        validation: RealGradients,
        *,
        seed: int,
        options: AutoencoderOptions | None = None,
        on_step: StepCallback | None = None,
    ) -> "Autoencoder":
        """FedCG's stage 1: the very same training on clients' gradients. NOT private: the weights remember them.

        `RealGradients.split` makes the two arguments. Errors as in `fit`; TypeError for anything but RealGradients.
        """
        if not (isinstance(real, RealGradients) and isinstance(validation, RealGradients)):
            raise TypeError("Autoencoder.fit_non_private takes RealGradients only; see RealGradients.collected")
        return cls._fit(segments, real, validation, "real", seed, options, on_step)

    @classmethod
    def _fit(
        cls,
        segments: tuple[Segment, ...],
        training: TrainingGradients,
        validation: TrainingGradients,
        trained_on: TrainedOn,
        seed: int,
        options: AutoencoderOptions | None,
        on_step: StepCallback | None,
    ) -> "Autoencoder":
        options = options or AutoencoderOptions()
        contract.check_segments(segments)
        fitted = fit_network(segments, training, validation, seed, options, on_step)
        return cls(segments, fitted.network, fitted.scale_S, options.name, trained_on, fitted.saturated_share)

    def __post_init__(self) -> None:
        contract.check_segments(self.segments)
        input_shape(self.name, 1)  # refuses a name that there is none of
        scale_S = self.scale_S.detach().to("cpu", torch.float64)
        if scale_S.shape != (len(self.segments),) or not bool((scale_S.isfinite() & (scale_S > 0)).all()):
            raise EncoderError(
                f"the autoencoder's scales must be {len(self.segments)} positive numbers, one per segment, not shape "
                f"{tuple(scale_S.shape)}, smallest {scale_S.min() if scale_S.numel() else 'none'}; train it again"
            )
        if self.trained_on not in ("synthetic", "real"):
            raise EncoderError(f"the autoencoder was trained on {self.trained_on!r}, expected 'synthetic' or 'real'")
        object.__setattr__(self, "scale_S", scale_S)
        self.network.eval().requires_grad_(False)

    @cached_property
    def update_size(self) -> int:
        return contract.check_segments(self.segments)

    @property
    def code_size(self) -> int:
        return math.prod(self.code_shape)

    @cached_property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one code before it is flattened: channels first."""
        return code_shape(self.name, self.update_size)

    @cached_property
    def _frame(self) -> Frame:
        return Frame(self.segments, self.scale_S.tolist(), input_shape(self.name, self.update_size))

    @torch.no_grad()
    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        """See `contract.Encoder`; the seed is ignored."""
        update_ND = contract.check_update(self, update_ND)
        code_NK = update_ND.new_empty(update_ND.shape[0], self.code_size)
        network = self.network.to(update_ND.device)
        for rows in self._chunks(update_ND.shape[0]):
            code_NK[rows] = network.encoder(self._frame.wrap(update_ND[rows])).flatten(1)
        return contract.mark_non_finite(code_NK, update_ND)

    @torch.no_grad()
    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        """See `contract.Encoder`; the seed is ignored. No value exceeds its segment's scale (Tanh)."""
        code_NK = contract.check_code(self, code_NK)
        update_ND = code_NK.new_empty(code_NK.shape[0], self.update_size)
        network = self.network.to(code_NK.device)
        for rows in self._chunks(code_NK.shape[0]):
            self._frame.unwrap(network.decoder(code_NK[rows].view(-1, *self.code_shape)), update_ND[rows])
        return update_ND

    def describe(self) -> dict[str, Fact]:
        """The contract's facts, and: trained_on ("synthetic" or "real"), saturated_share, scale_min and scale_max. `public` is false after training on real gradients."""
        values = ARCHITECTURES[self.name][1] * math.prod(self._frame.shape)
        facts = contract.common_facts(self, public=self.trained_on == "synthetic", memory_bytes=4 * values)
        return facts | {
            "trained_on": self.trained_on,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "scale_min": float(self.scale_S.min()),
            "scale_max": float(self.scale_S.max()),
            "saturated_share": self.saturated_share,
        }

    def state(self) -> dict[str, Tensor]:
        """The network's tensors (copies, on the CPU), the scales, and what `describe` says; safetensors can hold them."""
        tensors = {key: value.detach().cpu().clone() for key, value in self.network.state_dict().items()}
        return tensors | {
            "scale_S": self.scale_S.clone(),
            "name": contract.tensor_of_text(self.name),
            "trained_on": contract.tensor_of_text(self.trained_on),
            "saturated_share": torch.tensor(self.saturated_share, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor]) -> "Autoencoder":
        """The encoder of `state`; EncoderError if tensors are missing, foreign or of another shape."""
        tensors = dict(state)
        with contract.restoring("autoencoder", segments):
            name, trained_on = (
                contract.text_of_tensor(tensors.pop("name")),
                contract.text_of_tensor(tensors.pop("trained_on")),
            )
            scale_S, saturated_share = tensors.pop("scale_S"), float(tensors.pop("saturated_share"))
            network = blank_network(name)
            network.load_state_dict(tensors)
        return cls(segments, network, scale_S, name, trained_on, saturated_share)  # type: ignore[arg-type]  # checked

    def _chunks(self, count: int) -> Iterator[slice]:
        """Rows in chunks of about four million values, which bounds the working memory."""
        step = max(1, (1 << 22) // math.prod(self._frame.shape))
        yield from (slice(start, start + step) for start in range(0, count, step))


def make_autoencoder(request: EncoderRequest, state: SavedState) -> Encoder:
    """An auto-encoder trained on draws of the structured prior if there is public text, else of stage 1's prior; for FedCG on
    real gradients.

    EncoderError without any of them, or if the saved encoder is another one than the recipe's.
    """
    options = replace(TRAINING, name=request.name)
    request.check_fixed_size(math.prod(code_shape(request.name, contract.check_segments(request.segments))))
    if state:
        restored = Autoencoder.from_state(request.segments, state)
        if restored.name != request.name:
            raise EncoderError(
                f"the saved encoder is {restored.name!r}, the recipe wants {request.name!r}: resume with the recipe of that run"
            )
        return restored
    training: dict[str, Any] = {"seed": request.seed, "options": options, "on_step": request.on_step}
    if request.real is not None:
        if not isinstance(request.real, RealGradients):
            raise TypeError(f"real gradients come from RealGradients.collected, not as {type(request.real).__name__}")
        return Autoencoder.fit_non_private(
            request.segments, *request.real.split(_VALIDATION_SHARE, request.seed), **training
        )
    draw: Callable[[int, int], SyntheticGradients]
    if request.public is not None:
        draw = partial(sample_structured, request.structured_prior())
    elif request.prior is not None:
        draw = request.prior.sample
    else:
        raise EncoderError("the autoencoder is trained on synthetic gradients and needs a prior; run stage 1")
    synthetic = draw(options.samples, derive_seed(request.seed, "autoencoder-train"))
    validation = draw(options.validation, derive_seed(request.seed, "autoencoder-validation"))
    return Autoencoder.fit(request.segments, synthetic, validation, **training)
