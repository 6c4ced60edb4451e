"""The scores of canaries, as every bound takes them: +1 is what a canary that is in scores on average, -1 one that is out."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@final
@dataclass(frozen=True, eq=False)
class CanaryScores:
    """Scores of canaries that were in, and of canaries that were out, float64 of any number each.

    Scaled by what the attacker knows (each canary's own contribution), never by what was measured: the mean is +1 for those that
    were in and -1 for those that were out if the mechanism does what it says, and zero is the threshold between them.
    """

    inside: Floats
    outside: Floats

    @classmethod
    def of(cls, score_N: Floats, coin_N: npt.NDArray[np.bool_]) -> "CanaryScores":
        """Scores (N,) and whether each canary was in (N,)."""
        return cls(score_N[coin_N], score_N[~coin_N])

    @property
    def count(self) -> int:
        return self.inside.size + self.outside.size

    @cached_property
    def mirrored(self) -> Floats:
        """Scores of the canaries that were in, then minus those of the others: positive is a right guess."""
        return np.concatenate([self.inside, -self.outside])

    @property
    def power_at_one_percent(self) -> float:
        """The share of the canaries that were in and score above 99 % of those that were out."""
        if not self.outside.size or not self.inside.size:
            return 0.0
        return float((self.inside > np.quantile(self.outside, 0.99)).mean())
