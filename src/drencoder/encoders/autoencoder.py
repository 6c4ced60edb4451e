"""The published encoder: a convolutional auto-encoder at 1/64, trained on synthetic gradients only.

Legend: N clients, D adapter values, K code values, H x W image, c channels.

Architecture of CG-FedLLM (arXiv 2405.13746, appendix) and DR-Encoder (Wu et al., AAAI-25,
arXiv 2412.17053): a 3 x 3 stem, six stride-2 stages of 2, 4, ..., 64 channels, three residual blocks; the mirror
image back, a 7 x 7 convolution, Tanh. BatchNorm and ReLU after every convolution; MSE, Adam at 2e-4. Not stated there
and chosen here: zero padding (works for a code grid of one cell, reflection does not), Kaiming initialisation.

What to expect: the published prior is i.i.d. within a LoRA tensor, so there is nothing to learn beyond K/D of
the energy, and this network does not even reach that. It is here as the faithful baseline; the gate measures it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from drencoder.encoders.contract import Fact, check_code, check_segments, check_update, common_facts, mark_non_finite
from drencoder.encoders.sizes import CELL, image_shape
from drencoder.errors import EncoderError
from drencoder.layout import Segment
from drencoder.prior import SyntheticGradients
from drencoder.rng import derive_seed

__all__ = ["Autoencoder", "AutoencoderNetwork", "AutoencoderOptions", "StepCallback"]

StepCallback = Callable[[int, float, float | None], None]
"""Called with step, training loss and, when just measured, validation loss."""

_STAGES = (1, 2, 4, 8, 16, 32, 64)  # channels of the stem and after each stride-2 stage
_BLOCKS = 3
_HEADROOM = 4.0  # normalise = "rms": this many root mean squares fill Tanh's range


@dataclass(frozen=True)
class AutoencoderOptions:
    """How the auto-encoder is trained. `samples` and `validation` are drawn from the prior by the caller.

    `normalise` "none" feeds gradients as they are (published): tiny ones use Tanh's linear part only and values
    beyond +-1 cannot be reproduced. "rms" divides by 4 root mean squares of the synthetic gradients, so that
    4 sigma fill the range, and multiplies the output back. Either way larger values are cut off.
    """

    steps: int = 300
    batch: int = 8
    learning_rate: float = 2e-4
    check_every: int = 25  # steps between looks at the validation loss
    patience: int = 4  # looks without improvement before stopping
    samples: int = 128
    validation: int = 32
    normalise: Literal["none", "rms"] = "rms"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "check_every", "patience", "samples", "validation"):
            if getattr(self, name) < 1:
                raise EncoderError(f"autoencoder {name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise EncoderError(f"autoencoder learning_rate is {self.learning_rate}, expected more than 0")
        if self.normalise not in ("none", "rms"):
            raise EncoderError(f"autoencoder normalise is {self.normalise!r}, expected 'none' or 'rms'")


class _Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))) at the code's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x_NcHW: Tensor) -> Tensor:
        return x_NcHW + self.inner(x_NcHW)


class AutoencoderNetwork(nn.Module):
    """Encoder [N, 1, H, W] -> [N, 64, H/64, W/64] and decoder back."""

    def __init__(self) -> None:
        super().__init__()
        top = _STAGES[-1]
        down: list[nn.Module] = [nn.Conv2d(1, _STAGES[0], 3, padding=1, bias=False), *_norm(_STAGES[0])]
        up: list[nn.Module] = [_Residual(top) for _ in range(_BLOCKS)]
        for few, many in pairwise(_STAGES):
            down += [nn.Conv2d(few, many, 3, stride=2, padding=1, bias=False), *_norm(many)]
        down += [_Residual(top) for _ in range(_BLOCKS)]
        for few, many in reversed(list(pairwise(_STAGES))):
            wider = nn.ConvTranspose2d(many, few, 3, stride=2, padding=1, output_padding=1, bias=False)
            up += [wider, *_norm(few)]
        up += [nn.Conv2d(_STAGES[0], 1, 7, padding=3), nn.Tanh()]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)

    def forward(self, image_N1HW: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(self.encoder(image_N1HW))
        return reconstruction


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def _blank_network() -> AutoencoderNetwork:
    """A network on the CPU with unset weights, made without drawing from the global generator."""
    with torch.device("meta"):
        network = AutoencoderNetwork()
    return network.to_empty(device="cpu")


def _fresh_network(generator: torch.Generator) -> AutoencoderNetwork:
    network = _blank_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()  # constants
    return network


@final
@dataclass(frozen=True, eq=False)
class Autoencoder:
    """The trained network, frozen: BatchNorm uses its stored statistics, so rows never mix.

    `network` must not be trained further by anyone; `scale` is what gradients are divided by.
    """

    segments: tuple[Segment, ...]
    network: AutoencoderNetwork
    scale: float

    name: ClassVar[str] = "autoencoder"
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
        options = options or AutoencoderOptions()
        size = check_segments(segments)
        for gradients in (synthetic, validation):
            if gradients.values_ND.shape[1:] != (size,) or len(gradients) == 0:
                raise EncoderError(
                    f"synthetic gradients of shape {tuple(gradients.values_ND.shape)} do not fit an adapter of "
                    f"{size} values; draw at least one from a prior of the same layout"
                )
        rms = float(synthetic.values_ND.square().mean(dtype=torch.float64).sqrt())
        if not 0.0 < rms < math.inf:
            raise EncoderError(f"the synthetic gradients' root mean square is {rms}; refit the prior")
        scale = _HEADROOM * rms if options.normalise == "rms" else 1.0
        generator = torch.Generator().manual_seed(derive_seed(seed, "autoencoder"))
        network = _fresh_network(generator)
        _train(network, synthetic.values_ND, validation.values_ND, scale, options, generator, on_step)
        return cls(segments, network, scale)

    def __post_init__(self) -> None:
        check_segments(self.segments)
        if not 0.0 < self.scale < math.inf:
            raise EncoderError(f"the autoencoder's scale is {self.scale}, expected a positive number")
        self.network.eval().requires_grad_(False)

    @cached_property
    def update_size(self) -> int:
        return check_segments(self.segments)

    @cached_property
    def image(self) -> tuple[int, int]:
        """(H, W) of the padded image that the flat update is laid out as, row by row."""
        return image_shape(self.update_size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Shape of one code: 64 channels, H / 64, W / 64."""
        height, width = self.image
        return _STAGES[-1], height // CELL, width // CELL

    @property
    def code_size(self) -> int:
        return math.prod(self.grid)

    @torch.no_grad()
    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        """See `contract.Encoder`; the seed is ignored."""
        update_ND = check_update(self, update_ND)
        code_NK = update_ND.new_empty(update_ND.shape[0], self.code_size)
        network = self.network.to(update_ND.device)
        for rows in self._chunks(update_ND.shape[0]):
            code_NK[rows] = network.encoder(_to_image(update_ND[rows] / self.scale)).flatten(1)
        return mark_non_finite(code_NK, update_ND)

    @torch.no_grad()
    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        """See `contract.Encoder`; the seed is ignored. No value exceeds `scale` (Tanh)."""
        code_NK = check_code(self, code_NK)
        update_ND = code_NK.new_empty(code_NK.shape[0], self.update_size)
        network = self.network.to(code_NK.device)
        for rows in self._chunks(code_NK.shape[0]):
            image = network.decoder(code_NK[rows].view(-1, *self.grid))
            update_ND[rows] = image.flatten(1)[:, : self.update_size] * self.scale
        return update_ND

    def describe(self) -> dict[str, Fact]:
        # Measured: convolution kernels pad the single full-resolution channel to 16.
        facts = common_facts(self, public=True, memory_bytes=20 * 4 * math.prod(self.image))
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return facts | {"parameters": parameters, "scale": self.scale}

    def state(self) -> dict[str, Tensor]:
        """The network's tensors (copies, on the CPU) and `scale`; safetensors can hold them."""
        tensors = {key: value.detach().cpu().clone() for key, value in self.network.state_dict().items()}
        return tensors | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor]) -> "Autoencoder":
        """The encoder of `state`; EncoderError if tensors are missing, foreign or of another shape."""
        network = _blank_network()
        tensors = dict(state)
        try:
            scale = float(tensors.pop("scale"))
            network.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise EncoderError(f"the saved autoencoder cannot be restored ({error}); train it again") from error
        return cls(segments, network, scale)

    def _chunks(self, count: int) -> Iterator[slice]:
        """Rows in chunks of about four million pixels, which bounds the working memory."""
        step = max(1, (1 << 22) // math.prod(self.image))
        yield from (slice(start, start + step) for start in range(0, count, step))


def _to_image(update_ND: Tensor) -> Tensor:
    """[N, 1, H, W], padded with zeros at the end."""
    height, width = image_shape(update_ND.shape[1])
    padded = functional.pad(update_ND, (0, height * width - update_ND.shape[1]))
    return padded.view(-1, 1, height, width)


def _train(
    network: AutoencoderNetwork,
    synthetic_ND: Tensor,
    validation_ND: Tensor,
    scale: float,
    options: AutoencoderOptions,
    generator: torch.Generator,
    on_step: StepCallback | None,
) -> None:
    """Adam on the mean squared error; leaves the weights of the best validation loss in `network`."""
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    best_loss, best, idle = math.inf, _snapshot(network), 0
    for step, rows in zip(
        range(1, options.steps + 1), _batches(len(synthetic_ND), options.batch, generator), strict=False
    ):
        network.train()
        image = _to_image(synthetic_ND[rows] / scale)
        loss = functional.mse_loss(network(image), image)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        look = step % options.check_every == 0 or step == options.steps
        checked = _validate(network, validation_ND, scale, options.batch) if look else None
        if not math.isfinite(loss.item()) or not math.isfinite(checked or 0.0):
            raise EncoderError(
                f"the autoencoder's loss is {loss.item()} at step {step}; lower its learning_rate, now "
                f"{options.learning_rate}, or set normalise to 'rms'"
            )
        if on_step is not None:
            on_step(step, loss.item(), checked)
        if checked is not None:
            idle += 1
            if checked < best_loss:
                best_loss, best, idle = checked, _snapshot(network), 0
            if idle >= options.patience:
                break
    network.load_state_dict(best)


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled mini-batches of row numbers; an epoch's short rest is left out, unless it is all."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(1, count - batch + 1), batch):
            yield order[start : start + batch]


@torch.no_grad()
def _validate(network: AutoencoderNetwork, validation_ND: Tensor, scale: float, batch: int) -> float:
    network.eval()
    total = 0.0
    for rows in validation_ND.split(batch):
        image = _to_image(rows / scale)
        total += functional.mse_loss(network(image), image, reduction="sum").item() / image[0].numel()
    return total / len(validation_ND)


def _snapshot(network: AutoencoderNetwork) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}
