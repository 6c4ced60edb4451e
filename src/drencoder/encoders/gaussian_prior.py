"""Stage 1: two moments per LoRA tensor and epoch -> a Gaussian prior -> synthetic gradients.

Legend: N clients, D adapter values, E epochs, S segments (LoRA tensors), V = 2 E S statistics, d_l size of segment l.

The clients report statistics only; the server draws gradients from the fitted Gaussian and fits the encoder
to those (DR-Encoder: Wu et al., AAAI-25, arXiv 2412.17053).

Published are mean and variance of each module; a client here reports sum(u_l) / sqrt(d_l) and |u_l|_2, from which both follow
exactly: mean_l = first_l / sqrt(d_l), variance_l = norm_l^2 / d_l - mean_l^2. The form was chosen for its sensitivity:
both are of the update's own scale, at most |u_l|_2 each, so one clip bounds the whole vector and one noise fits it. A mean
is smaller by sqrt(d_l) (noise of one scale would drown it) and a variance is quadratic, so that a client of
twice the norm would take four times the room under the clip. Of the clients' *averages* the means are the published
ones too; the second moment is (mean |u_l|)^2, below mean |u_l|^2 by the variance of the norms between clients.

Clipping, noising and charging the statistics is
`privacy.mechanism`'s business; what arrives here is already a release.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed

# A segment's standard deviation is at least this share of the adapter's root mean square. LoRA's A has no
# gradient while B is zero, and noise can push a small second moment below zero; neither may make a
# tensor unreachable for the encoder for the rest of the run.
_STD_FLOOR = 1e-3
# Energies up to this are zero: their roots would soon underflow in float32.
_NOTHING = 1e-30


def moment_statistics(update_NX: Tensor, segments: tuple[Segment, ...], epochs: int = 1) -> Tensor:
    """stats_NV float32: per epoch sum(u_l) / sqrt(d_l) for every segment l, then |u_l|_2 for every segment.

    X = E D: the updates of `epochs` consecutive epochs, one after the other. Both statistics are on the update's own
    scale: by Cauchy-Schwarz |sum(u_l)| / sqrt(d_l) <= |u_l|_2, so |stats|_2 <= sqrt(2) |u|_2 over all epochs
    together. Rows do not mix; a row that is not finite gives statistics that are not. EncoderError unless every row
    has E D values.
    """
    size = segments[-1].stop
    if update_NX.dim() != 2 or update_NX.shape[1] != epochs * size:
        raise EncoderError(
            f"statistics of {epochs} epochs need updates of {epochs} x {size} values, got shape "
            f"{tuple(update_NX.shape)}; join each client's updates of one run of stage 1"
        )
    stats = []
    for start in range(0, epochs * size, size):
        parts = [update_NX[:, start + segment.start : start + segment.stop].float() for segment in segments]
        stats += [part.sum(dim=1) / math.sqrt(part.shape[1]) for part in parts]
        stats += [torch.linalg.vector_norm(part, dim=1) for part in parts]
    return torch.stack(stats, dim=1)


_ONLY_PRIORS = object()


@final
class SyntheticGradients:
    """`count` gradients of D values that are drawn from a prior and belong to nobody.

    Nothing is kept but the recipe: row i is drawn whenever it is asked for, always the same, so that a training
    set of LLaMA-7B's 8,388,608 values a row takes no memory beyond the rows in use.

    Only priors can make one, and `Autoencoder.fit` takes nothing else: the type is the proof that no real gradient trained
    it. (FedCG's baseline has a type of its own, `published.fedcg.RealGradients`, named non-private.)
    """

    __slots__ = ("_count", "_draw_row", "_energy_S", "_segments")

    def __init__(
        self,
        segments: tuple[Segment, ...],
        count: int,
        energy_S: Tensor,
        draw_row: Callable[[int], Tensor],
        *,
        token: object = None,
    ) -> None:
        """For priors: `draw_row(i)` is row i (D,) float32, a function of i alone; energy_S is E|u_l|^2 (S,) float64."""
        if token is not _ONLY_PRIORS:
            raise TypeError("SyntheticGradients are drawn by a prior's sample(), never made from a tensor")
        self._segments, self._count, self._energy_S, self._draw_row = segments, count, energy_S, draw_row

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """D."""
        return self._segments[-1].stop

    @property
    def values_ND(self) -> Tensor:
        """All rows, drawn anew by every call: N D values of memory, for small uses."""
        return self.rows(range(self._count))

    def rows(self, indices: Iterable[int]) -> Tensor:
        """Rows (len(indices), D) float32 in this order; IndexError unless 0 <= index < len(self)."""
        numbers = [int(index) for index in indices]
        if numbers and not (min(numbers) >= 0 and max(numbers) < self._count):
            raise IndexError(f"rows {min(numbers)} to {max(numbers)} of {self._count} synthetic gradients")
        values_ND = torch.empty(len(numbers), self.size)
        for place, index in enumerate(numbers):
            values_ND[place] = self._draw_row(index)
        return values_ND

    def energy_S(self, segments: tuple[Segment, ...]) -> Tensor:
        """The prior's expected |u_l|^2 per segment, float64 (S,); EncoderError for another layout."""
        if [segment.size for segment in segments] != [segment.size for segment in self._segments]:
            raise EncoderError(
                f"synthetic gradients of {self.size} values in {len(self._segments)} segments do not fit an adapter of "
                f"{segments[-1].stop} values in {len(segments)}; draw them from a prior of the same layout"
            )
        return self._energy_S


@final
@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Independent Gaussian values, N(mean_el, std_el^2) within segment l: the published random prior.

    Over E > 1 epochs a mixture: a gradient is of one epoch, each equally likely. mean_ES and std_ES are float64, finite,
    std_ES > 0 (EncoderError otherwise); given as (S,) they mean one epoch.
    """

    segments: tuple[Segment, ...]
    mean_ES: Tensor
    std_ES: Tensor

    def __post_init__(self) -> None:
        for name in ("mean_ES", "std_ES"):
            moment_ES = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            moment_ES = moment_ES.unsqueeze(0) if moment_ES.dim() == 1 else moment_ES
            fits = moment_ES.dim() == 2 and len(moment_ES) > 0 and moment_ES.shape[1] == len(self.segments)
            if not fits or not bool(moment_ES.isfinite().all()):
                raise EncoderError(
                    f"{name} must be {len(self.segments)} finite numbers per epoch, one per segment, not shape "
                    f"{tuple(moment_ES.shape)} of which {int(moment_ES.isfinite().sum())} are finite; refit the prior"
                )
            object.__setattr__(self, name, moment_ES)
        if self.mean_ES.shape != self.std_ES.shape:
            raise EncoderError(
                f"mean_ES is of {len(self.mean_ES)} epochs and std_ES of {len(self.std_ES)}; refit the prior"
            )
        if not bool((self.std_ES > 0).all()):
            raise EncoderError(f"std_ES must be positive, but the smallest is {self.std_ES.min():g}; refit the prior")

    @classmethod
    def isotropic(cls, segments: tuple[Segment, ...]) -> "GaussianPrior":
        """Knows nothing: one epoch, zero mean, one variance for all values, expected |u|^2 = 1."""
        count, total = len(segments), sum(segment.size for segment in segments)
        std_S = torch.full((count,), 1.0 / math.sqrt(total), dtype=torch.float64)
        return cls(segments, torch.zeros(count, dtype=torch.float64), std_S)

    @classmethod
    def from_statistics(cls, stats_V: Tensor, segments: tuple[Segment, ...], noise_std: float) -> "GaussianPrior":
        """Fits the prior to the released mean of the clients' `moment_statistics`, each epoch by itself.

        The number of epochs is V / (2 S).
        `noise_std` is the standard deviation of the noise in every entry of `stats_V` (0 if there is none).
        With f_l and n_l the two released entries of segment l in one epoch and t = noise_std:

        * mean_l = f_l max(0, 1 - t^2 / f_l^2) / sqrt(d_l): the plug-in mean, shrunk by the positive-part
          James-Stein factor so that a pure-noise entry becomes zero.
        * second_l = max(0, n_l)^2 - t^2, at least 0, over d_l: squaring adds t^2 on average, taken away here.
          What is estimated is (mean |u_l|)^2 <= mean |u_l|^2; clients of unequal norm make it a slight
          underestimate, by the same factor in all segments if they differ in scale only.
        * std_l^2 = second_l - mean_l^2, at least (1e-3 rms)^2, rms the epoch's root mean square.

        An epoch in which nothing at all stands out of the noise is isotropic, of the norm that the noise hides
        (of norm 1 without noise).
        Only ratios between segments matter to encoders; statistics that were clipped keep them.
        EncoderError if the shape is wrong or a value is not finite.
        """
        per_epoch = 2 * len(segments)
        stats_V = stats_V.detach().to("cpu", torch.float64)
        fits = stats_V.dim() == 1 and len(stats_V) > 0 and len(stats_V) % per_epoch == 0
        if not fits or not bool(stats_V.isfinite().all()):
            raise EncoderError(
                f"a prior over {len(segments)} segments needs {per_epoch} finite statistics per epoch, got shape "
                f"{tuple(stats_V.shape)} of which {int(stats_V.isfinite().sum())} are finite; release them with "
                "the moments of the same layout"
            )
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise EncoderError(f"noise_std is {noise_std}, expected a finite number >= 0; give 0 for no noise")
        fitted = [_fit_epoch(epoch_V, segments, noise_std) for epoch_V in stats_V.view(-1, per_epoch)]
        mean_ES, std_ES = (torch.stack(moments) for moments in zip(*fitted, strict=True))
        return cls(segments, mean_ES, std_ES)

    @property
    def epochs(self) -> int:
        """E."""
        return len(self.mean_ES)

    @cached_property
    def energy_S(self) -> Tensor:
        """Expected |u_l|^2 per segment over all epochs, float64 (S,)."""
        return _sizes(self.segments) * (self.mean_ES.square() + self.std_ES.square()).mean(dim=0)

    @property
    def rms(self) -> float:
        """Root mean square of a value over the whole adapter."""
        return math.sqrt(float(self.energy_S.sum()) / sum(segment.size for segment in self.segments))

    def sample(self, count: int, seed: int) -> SyntheticGradients:
        """`count` independent gradients (count, D), drawn row by row when used; the same for the same seed."""
        mean_ES, std_ES = self.mean_ES.tolist(), self.std_ES.tolist()

        def draw_row(index: int) -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(seed, "synthetic-gradients", index))
            epoch = int(torch.randint(self.epochs, (), generator=generator))
            values_D = torch.randn(self.segments[-1].stop, generator=generator)
            for segment, mean, std in zip(self.segments, mean_ES[epoch], std_ES[epoch], strict=True):
                values_D[segment.start : segment.stop].mul_(std).add_(mean)
            return values_D

        return SyntheticGradients(self.segments, count, self.energy_S, draw_row, token=_ONLY_PRIORS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON-able) for the run folder."""
        return {
            "kind": "gaussian",
            "segments": [segment.name for segment in self.segments],
            "mean": self.mean_ES.tolist(),
            "std": self.std_ES.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], segments: tuple[Segment, ...]) -> "GaussianPrior":
        """The prior of `to_dict`, or the flat one-epoch form of version 0.1; EncoderError if it was fitted to another
        layout or is malformed."""
        names = [segment.name for segment in segments]
        if data.get("kind") != "gaussian" or data.get("segments") != names:
            raise EncoderError(
                f"the saved prior is of kind {data.get('kind')!r} over {len(data.get('segments') or ())} "
                f"segments, not 'gaussian' over this adapter's {len(names)}; it belongs to another run"
            )
        try:
            mean_ES, std_ES = (torch.tensor(data.get(key, ()), dtype=torch.float64) for key in ("mean", "std"))
        except (TypeError, ValueError) as error:
            raise EncoderError(f"the saved prior's moments are no table of numbers ({error}); refit it") from None
        return cls(segments, mean_ES, std_ES)


def sample_structured(prior: MatrixNormalPrior, count: int, seed: int) -> SyntheticGradients:
    """`count` gradients of a structured prior, drawn row by row when used: any encoder can be trained on them."""
    return SyntheticGradients(
        prior.segments, count, prior.energy_S, lambda index: prior.draw_row(seed, index), token=_ONLY_PRIORS
    )


def _fit_epoch(stats_V: Tensor, segments: tuple[Segment, ...], noise_std: float) -> tuple[Tensor, Tensor]:
    """(mean_S, std_S) of one epoch's statistics, see `GaussianPrior.from_statistics`."""
    count = len(segments)
    first_S, norm_S = stats_V[:count], stats_V[count:].clamp(min=0.0)
    size_S, noise = _sizes(segments), noise_std**2

    shrink_S = (1.0 - noise / first_S.square().clamp(min=1e-300)).clamp(min=0.0)
    mean_S = first_S * shrink_S / size_S.sqrt()
    second_S = (norm_S.square() - noise).clamp(min=0.0) / size_S
    mean_square = float((second_S * size_S).sum() / size_S.sum())
    if mean_square <= _NOTHING:
        hidden = noise_std if noise > _NOTHING else 1.0
        return torch.zeros_like(size_S), torch.full_like(size_S, hidden / math.sqrt(float(size_S.sum())))
    # A mean above the root mean square contradicts the second moment: noise only.
    mean_S = mean_S.clamp(min=-second_S.sqrt(), max=second_S.sqrt())
    variance_S = (second_S - mean_S.square()).clamp(min=_STD_FLOOR**2 * mean_square)
    return mean_S, variance_S.sqrt()


def _sizes(segments: tuple[Segment, ...]) -> Tensor:
    return torch.tensor([segment.size for segment in segments], dtype=torch.float64)
