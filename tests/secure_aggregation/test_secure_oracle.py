"""The sampler against another one that is exact by construction: rejection from a discrete Laplace with rational coins.

It is algorithm 3 of Canonne, Kamath and Steinke 2020 (https://arxiv.org/abs/2004.00010), written down from the paper. Both draw
from fixed seeds, so that no run of this test fails by chance.
"""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from drencoder.secure_aggregation.discrete import discrete_gaussian

DRAWS = 20_000


class ExactSampler:
    """Draws from N_Z(0, variance) with nothing but fair whole numbers."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _coin(self, chance: Fraction) -> bool:
        return self._random.randrange(chance.denominator) < chance.numerator

    def _exp_coin(self, exponent: Fraction) -> bool:
        """True with probability exp(-exponent)."""
        while exponent > 1:
            if not self._exp_coin(Fraction(1)):
                return False
            exponent -= 1
        number = 1
        while self._coin(exponent / number):
            number += 1
        return number % 2 == 1

    def _laplace(self, scale: int) -> int:
        while True:
            low = self._random.randrange(scale)
            if not self._exp_coin(Fraction(low, scale)):
                continue
            high = 0
            while self._exp_coin(Fraction(1)):
                high += 1
            magnitude, negative = low + scale * high, bool(self._random.randrange(2))
            if magnitude or not negative:
                return -magnitude if negative else magnitude

    def gaussian(self, variance: Fraction) -> int:
        scale = math.isqrt(int(variance)) + 1
        while True:
            draw = self._laplace(scale)
            if self._exp_coin((abs(draw) - variance / scale) ** 2 / (2 * variance)):
                return draw


def two_sample_p(one: np.ndarray, other: np.ndarray, std: float) -> float:
    """The p-value of a chi-square test that two samples have one law; cells of a tenth of a deviation, or of one integer."""
    width = max(1, int(std / 10))
    cells = [np.floor_divide(sample, width) for sample in (one, other)]
    low, high = (int(np.quantile(np.concatenate(cells), share)) for share in (2e-3, 1 - 2e-3))
    counts = [np.bincount(np.clip(cell, low, high) - low, minlength=high - low + 1) for cell in cells]
    return float(stats.chi2_contingency(np.stack(counts)).pvalue)


@pytest.mark.parametrize("std", [1.0, 4.0, 37.25, 9000.0])  # the last is a sum of two tables
def test_our_draws_and_the_exact_samplers_have_one_law(std):
    exact, generator = ExactSampler(3), np.random.Philox(4)
    theirs = np.array([exact.gaussian(Fraction(std) ** 2) for _ in range(DRAWS)])

    def words(count):
        return np.atleast_1d(generator.random_raw(count))

    assert two_sample_p(discrete_gaussian(std).sample(DRAWS, words), theirs, std) > 1e-3
    if std > 1:
        wrong = discrete_gaussian(std * 1.1).sample(DRAWS, words)
        assert two_sample_p(wrong, theirs, std) < 1e-6
