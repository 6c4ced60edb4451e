"""A clip norm that follows the clients: one more value in each message says whether its code was shorter than the clip.

Legend: N clients, D adapter values, K code values.

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

from drencoder.federated.query_encoders import WrappedEncoder

# w: how loud the extra value is. At 0.2 it costs 2 % of noise.
NORM_BIT_WEIGHT = 0.2


@final
@dataclass(frozen=True)
class AdaptiveClip:
    """The clip norm C of one round, and how the next round's follows from what the clients answered.

    Args:
      clip_l2: C > 0.
      quantile: share of the clients whose code should be shorter than C, in (0, 1). The default is the
        median, which Andrew et al. found to do well on every task.
      rate: of the geometric step; 0 < rate.
    """

    clip_l2: float
    quantile: float = 0.5
    rate: float = 0.3

    @property
    def bound(self) -> float:
        """C sqrt(1 + w^2): what every message's norm is clipped to, the sensitivity of the joint vector."""
        return self.clip_l2 * math.sqrt(1.0 + NORM_BIT_WEIGHT**2)

    def share_below(self, sum_V: Tensor, expected_cohort: float) -> float:
        """The noised share of clients whose code was at most C long, from a released sum (K + 1,); clamped to 0..1.

        Divided by the fixed expected cohort: of Poisson cohorts it is right on average.
        """
        balance = float(sum_V[-1]) / (NORM_BIT_WEIGHT * self.clip_l2 * expected_cohort)
        return min(1.0, max(0.0, 0.5 * (1.0 + balance)))

    def after(self, sum_V: Tensor, expected_cohort: float) -> "AdaptiveClip":
        """The next round's: C exp(-rate (share - quantile))."""
        step = -self.rate * (self.share_below(sum_V, expected_cohort) - self.quantile)
        return AdaptiveClip(self.clip_l2 * math.exp(step), self.quantile, self.rate)


@final
@dataclass(frozen=True)
class AdaptiveClipEncoder(WrappedEncoder):
    """An encoder whose codes are clipped to `clip_l2` and carry one more value, the norm bit.

    A code (K + 1) is the wrapped encoder's code, clipped to C, then +w C if it was at most C long and -w C if it was
    longer. A client that has nothing to say has no vote either: the code of a zero update is the zero vector, which add/remove
    adjacency compares with. Codes may be added up where the wrapped encoder's may (`linear` says so), though the clip itself is not linear.
    """

    clip_l2: float

    @property
    def code_size(self) -> int:
        return self.encoder.code_size + 1

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        """(N, K + 1). Rows that are not finite stay so: the mechanism makes them zero and counts them."""
        code_NK = self.encoder.encode(update_ND, seed)
        norm_N1 = torch.linalg.vector_norm(code_NK, dim=1, keepdim=True, dtype=torch.float64)
        scale_N1 = (self.clip_l2 / norm_N1.clamp(min=1e-30)).clamp(max=1.0)
        vote_N1 = torch.where(norm_N1 <= self.clip_l2, 1.0, -1.0).where(norm_N1 != 0, 0.0)
        bit_N1 = vote_N1 * (NORM_BIT_WEIGHT * self.clip_l2)
        bit_N1 = torch.where(norm_N1.isfinite(), bit_N1, norm_N1)
        return torch.cat([code_NK * scale_N1.to(code_NK.dtype), bit_N1.to(code_NK.dtype)], dim=1)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        """(N, D): the wrapped encoder's decoding; the norm bit is not part of it."""
        return self.encoder.decode(code_NK[:, :-1], seed)
