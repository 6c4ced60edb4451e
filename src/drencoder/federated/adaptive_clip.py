"""A clip norm that follows the clients: one more value in each message says whether its code was shorter than the clip.

Legend: N clients, K code values.

The clip is moved towards a quantile of the codes' norms by a geometric step in each round (Andrew et al. 2021,
https://arxiv.org/abs/1905.03871, algorithm 1). There the count of short updates is a query of its own with its own noise. Here it is
one more coordinate of the code, +-w C, inside the same joint vector: its norm is at most C sqrt(1 + w^2), that is the bound which
is clipped to and noised, and the release costs what it cost before. The price is w^2 / 2 more noise. Everything the server
does with the answer is post-processing.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["WITNESS", "ClipFollower"]

# w: how loud the extra value is. At 0.2 it costs 2 % of noise.
WITNESS = 0.2


@final
@dataclass(frozen=True)
class ClipFollower:
    """The clip norm C of one round, what it does to codes, and the next round's.

    Args:
      clip_l2: C > 0.
      quantile: share of the clients whose code should be shorter than C, in (0, 1).
      rate: of the geometric step; 0 < rate.
    """

    clip_l2: float
    quantile: float
    rate: float

    @property
    def bound(self) -> float:
        """C sqrt(1 + w^2): what every message's norm is clipped to, the sensitivity of the joint vector."""
        return self.clip_l2 * math.sqrt(1.0 + WITNESS**2)

    def join(self, code_NK: Tensor) -> Tensor:
        """(N, K + 1): codes clipped to C, then +w C for each that was at most C long and -w C for each that was longer.

        Rows that are not finite stay so: the mechanism makes them zero and counts them.
        """
        norm_N1 = torch.linalg.vector_norm(code_NK, dim=1, keepdim=True, dtype=torch.float64)
        scale_N1 = (self.clip_l2 / norm_N1.clamp(min=1e-30)).clamp(max=1.0)
        witness_N1 = torch.where(norm_N1 <= self.clip_l2, 1.0, -1.0) * (WITNESS * self.clip_l2)
        witness_N1 = torch.where(norm_N1.isfinite(), witness_N1, norm_N1)
        return torch.cat([code_NK * scale_N1.to(code_NK.dtype), witness_N1.to(code_NK.dtype)], dim=1)

    def share_below(self, sum_V: Tensor, expected_cohort: float) -> float:
        """The noised share of clients whose code was at most C long, from a released sum (K + 1,); clamped to 0..1.

        Divided by the fixed expected cohort: of Poisson cohorts it is right on average.
        """
        balance = float(sum_V[-1]) / (WITNESS * self.clip_l2 * expected_cohort)
        return min(1.0, max(0.0, 0.5 * (1.0 + balance)))

    def after(self, sum_V: Tensor, expected_cohort: float) -> "ClipFollower":
        """The next round's: C exp(-rate (share - quantile))."""
        step = -self.rate * (self.share_below(sum_V, expected_cohort) - self.quantile)
        return ClipFollower(self.clip_l2 * math.exp(step), self.quantile, self.rate)
