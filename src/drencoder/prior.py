"""Stage 1: two moments per LoRA tensor -> a Gaussian prior -> synthetic gradients.

Legend: N clients, D adapter values, S segments (LoRA tensors), V = 2 S statistics, d_l size of segment l.

The clients report statistics only; the server draws gradients from the fitted Gaussian and fits the encoder
to those (DR-Encoder: Wu et al., AAAI-25, arXiv 2412.17053). Clipping, noising and charging the statistics is
`privacy.mechanism`'s business; what arrives here is already a release.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from drencoder.errors import EncoderError
from drencoder.layout import Segment
from drencoder.rng import derive_seed

__all__ = ["GaussianPrior", "MomentQuery", "SyntheticGradients", "moment_statistics"]

# A segment's standard deviation is at least this share of the adapter's root mean square. LoRA's A has no
# gradient while B is zero, and noise can push a small second moment below zero; neither may make a
# tensor unreachable for the encoder for the rest of the run.
_STD_FLOOR = 1e-3
# Energies up to this are zero: their roots would soon underflow in float32.
_NOTHING = 1e-30


def moment_statistics(update_ND: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """stats_NV float32: sum(u_l) / sqrt(d_l) for every segment l, then |u_l|_2 for every segment.

    Both are on the update's own scale: by Cauchy-Schwarz |sum(u_l)| / sqrt(d_l) <= |u_l|_2, so
    |stats|_2 <= sqrt(2) |u|_2. Rows do not mix; a row that is not finite gives statistics that are not.
    """
    update_ND = update_ND.to(torch.float32)
    parts = [update_ND[:, segment.start : segment.stop] for segment in segments]
    first = [part.sum(dim=1) / math.sqrt(part.shape[1]) for part in parts]
    norm = [torch.linalg.vector_norm(part, dim=1) for part in parts]
    return torch.stack(first + norm, dim=1)


@final
@dataclass(frozen=True)
class MomentQuery:
    """The stage-1 question to one client: "what are your update's two moments, per LoRA tensor?\""""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """V, the number of statistics that one client reports."""
        return 2 * len(self.segments)

    @property
    def gain(self) -> float:
        """Bound on |statistics|_2 / |update|_2; use it to place the clip, never as a sensitivity."""
        return math.sqrt(2.0)

    def statistics(self, update_ND: Tensor) -> Tensor:
        """stats_NV float32, see `moment_statistics`."""
        return moment_statistics(update_ND, self.segments)


_ONLY_PRIORS = object()


@final
class SyntheticGradients:
    """Gradients (count, D) float32 that were drawn from a prior and belong to nobody.

    Only priors can make one, and `fit` of an encoder takes nothing else: the type is the proof that no
    real gradient trained it. (FedCG's baseline will have a type of its own, named non-private.)
    """

    __slots__ = ("_values_ND",)

    def __init__(self, values_ND: Tensor, *, token: object = None) -> None:
        if token is not _ONLY_PRIORS:
            raise TypeError("SyntheticGradients are drawn by a prior's sample(), never made from a tensor")
        self._values_ND = values_ND

    @property
    def values_ND(self) -> Tensor:
        return self._values_ND

    def __len__(self) -> int:
        return self._values_ND.shape[0]


@final
@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Independent Gaussian values, N(mean_l, std_l^2) within segment l: the published random prior.

    mean_S and std_S are float64, finite, std_S > 0 (EncoderError otherwise).
    """

    segments: tuple[Segment, ...]
    mean_S: Tensor
    std_S: Tensor

    def __post_init__(self) -> None:
        for name in ("mean_S", "std_S"):
            moment_S = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if moment_S.shape != (len(self.segments),) or not bool(moment_S.isfinite().all()):
                raise EncoderError(
                    f"{name} must be {len(self.segments)} finite numbers, one per segment, not "
                    f"{moment_S.numel()} of which {int(moment_S.isfinite().sum())} are finite; refit the prior"
                )
            object.__setattr__(self, name, moment_S)
        if not bool((self.std_S > 0).all()):
            raise EncoderError(f"std_S must be positive, but the smallest is {self.std_S.min():g}; refit the prior")

    @classmethod
    def isotropic(cls, segments: tuple[Segment, ...]) -> "GaussianPrior":
        """Knows nothing: zero mean, one variance for all values, expected |u|^2 = 1."""
        count, total = len(segments), sum(segment.size for segment in segments)
        std_S = torch.full((count,), 1.0 / math.sqrt(total), dtype=torch.float64)
        return cls(segments, torch.zeros(count, dtype=torch.float64), std_S)

    @classmethod
    def from_statistics(cls, stats_V: Tensor, segments: tuple[Segment, ...], noise_std: float) -> "GaussianPrior":
        """Fits the prior to the released mean of the clients' `moment_statistics`.

        `noise_std` is the standard deviation of the noise in every entry of `stats_V` (0 if there is none).
        With f_l and n_l the two released entries of segment l and t = noise_std:

        * mean_l = f_l max(0, 1 - t^2 / f_l^2) / sqrt(d_l): the plug-in mean, shrunk by the positive-part
          James-Stein factor so that a pure-noise entry becomes zero.
        * second_l = max(0, n_l)^2 - t^2, at least 0, over d_l: squaring adds t^2 on average, taken away here.
          What is estimated is (mean |u_l|)^2 <= mean |u_l|^2; clients of unequal norm make it a slight
          underestimate, by the same factor in all segments if they differ in scale only.
        * std_l^2 = second_l - mean_l^2, at least (1e-3 rms)^2, rms the adapter's root mean square.

        If nothing at all stands out of the noise the prior is isotropic, of the norm that the noise hides
        (of norm 1 without noise).
        Only ratios between segments matter to encoders; statistics that were clipped keep them.
        EncoderError if the shape is wrong or a value is not finite.
        """
        count = len(segments)
        stats_V = stats_V.detach().to("cpu", torch.float64)
        if stats_V.shape != (2 * count,) or not bool(stats_V.isfinite().all()):
            raise EncoderError(
                f"a prior over {count} segments needs {2 * count} finite statistics, got shape "
                f"{tuple(stats_V.shape)}; release them with MomentQuery of the same layout"
            )
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise EncoderError(f"noise_std is {noise_std}, expected a finite number >= 0; give 0 for no noise")
        first_S, norm_S = stats_V[:count], stats_V[count:].clamp(min=0.0)
        size_S = torch.tensor([segment.size for segment in segments], dtype=torch.float64)
        noise = noise_std**2

        shrink_S = (1.0 - noise / first_S.square().clamp(min=1e-300)).clamp(min=0.0)
        mean_S = first_S * shrink_S / size_S.sqrt()
        second_S = (norm_S.square() - noise).clamp(min=0.0) / size_S
        mean_square = float((second_S * size_S).sum() / size_S.sum())
        if mean_square <= _NOTHING:
            blank = cls.isotropic(segments)
            return cls(segments, blank.mean_S, blank.std_S * (noise_std if noise_std**2 > _NOTHING else 1.0))
        # A mean above the root mean square contradicts the second moment: noise only.
        mean_S = mean_S.clamp(min=-second_S.sqrt(), max=second_S.sqrt())
        variance_S = (second_S - mean_S.square()).clamp(min=_STD_FLOOR**2 * mean_square)
        return cls(segments, mean_S, variance_S.sqrt())

    @cached_property
    def energy_S(self) -> Tensor:
        """Expected |u_l|^2 per segment, float64 (S,)."""
        size_S = torch.tensor([segment.size for segment in self.segments], dtype=torch.float64)
        return size_S * (self.mean_S.square() + self.std_S.square())

    @property
    def rms(self) -> float:
        """Root mean square of a value over the whole adapter."""
        return math.sqrt(float(self.energy_S.sum()) / sum(segment.size for segment in self.segments))

    def sample(self, count: int, seed: int) -> SyntheticGradients:
        """`count` independent gradients, float32 (count, D); the same for the same seed."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "synthetic-gradients"))
        size_S = torch.tensor([segment.size for segment in self.segments])
        values_ND = torch.randn(count, int(size_S.sum()), generator=generator)
        values_ND *= self.std_S.to(torch.float32).repeat_interleave(size_S)
        values_ND += self.mean_S.to(torch.float32).repeat_interleave(size_S)
        return SyntheticGradients(values_ND, token=_ONLY_PRIORS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON-able) for the run folder."""
        return {
            "kind": "gaussian",
            "segments": [segment.name for segment in self.segments],
            "mean": self.mean_S.tolist(),
            "std": self.std_S.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], segments: tuple[Segment, ...]) -> "GaussianPrior":
        """The prior of `to_dict`; EncoderError if it was fitted to another layout or is malformed."""
        names = [segment.name for segment in segments]
        if data.get("kind") != "gaussian" or data.get("segments") != names:
            raise EncoderError(
                f"the saved prior is of kind {data.get('kind')!r} over {len(data.get('segments') or ())} "
                f"segments, not 'gaussian' over this adapter's {len(names)}; it belongs to another run"
            )
        mean_S, std_S = (torch.tensor(data.get(key, ()), dtype=torch.float64) for key in ("mean", "std"))
        return cls(segments, mean_S, std_S)
