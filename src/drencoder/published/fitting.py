"""How the auto-encoder's network is trained: one loop, whatever the gradients are.

Legend: N clients or gradients, D adapter values, S segments, L padded length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.encoders.code_sizes import code_shape, input_shape
from drencoder.encoders.request import StepCallback, TrainingGradients
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.published.architectures import AutoencoderNetwork, fresh_network
from drencoder.rng import derive_seed

_HEADROOM = 4.0  # this many root mean squares fill Tanh's range


@dataclass(frozen=True)
class AutoencoderOptions:
    """How the auto-encoder is trained. `samples` and `validation` are drawn from the prior by the caller.

    Tanh answers within +-1, so what gradients are divided by decides what is cut off and what weighs in the loss:

    * "autoencoder-published" is fed gradients as they are: tiny ones use Tanh's linear part only.
    * All others divide by 4 root mean squares of the training gradients: the same weights in the loss, at a usable scale.

    The scales come from the prior's moments (public) or, for FedCG, from the real training gradients. The output is
    multiplied back. Scaled values beyond +-1 cannot be reproduced: 4 root mean squares are 4 sigma of a
    Gaussian (0.006 % of its values); real gradients have heavier tails. The share of validation values that is cut
    off is measured (`saturated_share` in the encoder's facts).
    """

    name: str = "autoencoder"
    steps: int = 400  # at most: training stops early
    batch: int = 8
    learning_rate: float = 2e-4
    check_every: int = 25  # steps between looks at the validation loss
    patience: int = 4  # looks without improvement before stopping
    samples: int = 512  # of the published sources; a row is drawn when it is used
    validation: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "check_every", "patience", "samples", "validation"):
            if getattr(self, name) < 1:
                raise EncoderError(f"autoencoder {name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise EncoderError(f"autoencoder learning_rate is {self.learning_rate}, expected more than 0")
        input_shape(self.name, 1)  # refuses a name that there is none of


@final
@dataclass(frozen=True)
class Frame:
    """Updates <-> what the network reads: each segment divided by its scale, zeros at the end, in `shape`."""

    segments: tuple[Segment, ...]
    scales: Sequence[float]
    shape: tuple[int, ...]

    def wrap(self, update_ND: Tensor) -> Tensor:
        """[N, *shape]."""
        frame_NL = update_ND.new_zeros(update_ND.shape[0], math.prod(self.shape))
        for segment, scale in zip(self.segments, self.scales, strict=True):
            part = slice(segment.start, segment.stop)
            torch.div(update_ND[:, part], scale, out=frame_NL[:, part])
        return frame_NL.view(-1, *self.shape)

    def unwrap(self, frame_N1x: Tensor, update_ND: Tensor) -> None:
        """Writes the updates that `wrap` would make `frame_N1x` of into `update_ND`."""
        frame_NL = frame_N1x.flatten(1)
        for segment, scale in zip(self.segments, self.scales, strict=True):
            part = slice(segment.start, segment.stop)
            torch.mul(frame_NL[:, part], scale, out=update_ND[:, part])


class Fitted(NamedTuple):
    """A trained network, the scale of each segment, and the share of validation values beyond Tanh's range."""

    network: AutoencoderNetwork
    scale_S: Tensor
    saturated_share: float


def fit_network(
    segments: tuple[Segment, ...],
    training: TrainingGradients,
    validation: TrainingGradients,
    seed: int,
    options: AutoencoderOptions,
    on_step: StepCallback | None,
) -> Fitted:
    """Trains a fresh network; the same for the same seed. Nothing but `options.batch` rows is in memory at a time.

    EncoderError if the gradients do not fit `segments`, are not finite or all zero, or the loss stops being finite.
    """
    for gradients in (training, validation):
        if gradients.size != segments[-1].stop or len(gradients) == 0:
            raise EncoderError(
                f"{len(gradients)} gradients of {gradients.size} values do not fit an adapter of {segments[-1].stop} "
                "values; have at least one of the same layout"
            )
    cells = math.prod(code_shape(options.name, segments[-1].stop)[1:])
    if min(options.batch, len(training)) * cells < 2:
        raise EncoderError(
            "one gradient of so small an adapter is not enough for BatchNorm to train on; have at least 2 in a batch "
            "(FedCG: ask more clients, prior.sampling_rate)"
        )
    scale_S = _scales(segments, training.energy_S(segments), options.name)
    frame = Frame(segments, scale_S.tolist(), input_shape(options.name, segments[-1].stop))
    generator = torch.Generator().manual_seed(derive_seed(seed, "autoencoder"))
    network = fresh_network(options.name, generator)
    _train(network, frame, training, validation, options, generator, on_step)
    return Fitted(network, scale_S, _saturated_share(frame, validation, options.batch))


def _scales(segments: tuple[Segment, ...], energy_S: Tensor, name: str) -> Tensor:
    """What each segment is divided by, float64 (S,)."""
    size_S = torch.tensor([segment.size for segment in segments], dtype=torch.float64)
    rms = math.sqrt(float(energy_S.sum() / size_S.sum()))
    if not 0.0 < rms < math.inf:
        raise EncoderError(f"the training gradients' root mean square is {rms}; run stage 1 again")
    return torch.full_like(size_S, 1.0 if name == "autoencoder-published" else _HEADROOM * rms)


def _train(
    network: AutoencoderNetwork,
    frame: Frame,
    training: TrainingGradients,
    validation: TrainingGradients,
    options: AutoencoderOptions,
    generator: torch.Generator,
    on_step: StepCallback | None,
) -> None:
    """Adam on the mean squared error; leaves the weights of the best validation loss in `network`."""
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    best_loss, best, idle = math.inf, _snapshot(network), 0
    batches = _batches(len(training), options.batch, generator)
    for step, rows in zip(range(1, options.steps + 1), batches, strict=False):
        network.train()
        framed = frame.wrap(training.rows(rows.tolist()))
        loss = functional.mse_loss(network(framed), framed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        look = step % options.check_every == 0 or step == options.steps
        checked = _validate(network, frame, validation, options.batch) if look else None
        if not math.isfinite(loss.item()) or not math.isfinite(checked or 0.0):
            raise EncoderError(
                f"the autoencoder's loss is {loss.item()} at step {step}; lower its learning_rate, now "
                f"{options.learning_rate}, or take 'autoencoder', which scales its input"
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


def _in_order(gradients: TrainingGradients, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(gradients), batch):
        yield gradients.rows(range(start, min(start + batch, len(gradients))))


@torch.no_grad()
def _validate(network: AutoencoderNetwork, frame: Frame, validation: TrainingGradients, batch: int) -> float:
    network.eval()
    total = 0.0
    for rows_ND in _in_order(validation, batch):
        framed = frame.wrap(rows_ND)
        total += functional.mse_loss(network(framed), framed, reduction="sum").item() / framed[0].numel()
    return total / len(validation)


def _saturated_share(frame: Frame, validation: TrainingGradients, batch: int) -> float:
    beyond = sum(int((frame.wrap(rows_ND).abs_() > 1.0).sum()) for rows_ND in _in_order(validation, batch))
    return beyond / (len(validation) * validation.size)


def _snapshot(network: AutoencoderNetwork) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}
