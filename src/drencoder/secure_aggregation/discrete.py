"""This module samples discrete Gaussian noise, so exactly that the error can be added to delta and changes no digit of it.

The distribution N_Z(0, s^2) gives the integer x the probability proportional to exp(-x^2 / 2 s^2) (Canonne, Kamath and Steinke 2020,
https://arxiv.org/abs/2004.00010). A sampler inverts its distribution function with uniform numbers of 192 bits. The
table is made with integers of 320 bits, no floating point; the first 64 bits decide all but about one draw in 10^15, and
only then are the others drawn. So the total variation distance between a draw and N_Z(0, s^2) has a proven bound
(`DiscreteGaussian.distance`), and a draw takes no longer than a search in a sorted array.

Two more distances stand here, of any sum of such noise: to a discrete Gaussian, and to something no more telling than a
continuous one. docs/guarantee.md puts them together.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from drencoder.errors import PrivacyError

__all__ = ["SMOOTHING_STD", "DiscreteGaussian", "Words", "continuous_distance", "discrete_gaussian", "sum_distance"]

Words: TypeAlias = Callable[[int], npt.NDArray[np.uint64]]
"""A stream of uniform 64-bit words: each call gives that many new ones."""

_FRACTION = 320  # bits behind the point while the table is made
_UNIFORM = 192  # bits of a uniform number
_REACH = 16  # the table ends this many standard deviations from zero
_LARGEST_TABLE = 1 << 21
SMOOTHING_STD = 4.0
"""Every share has at least this standard deviation, in steps; `continuous_distance` is below 1e-136 then."""


@final
class DiscreteGaussian:
    """N_Z(0, std^2); `std` in steps, from 1 to 131,072. Raises PrivacyError on others. See `discrete_gaussian`."""

    def __init__(self, std: float) -> None:
        if not 1 <= std * _REACH <= _LARGEST_TABLE or std < 1:
            raise PrivacyError(
                f"A discrete Gaussian has a standard deviation of {std:.6g} steps; it must lie between 1 and "
                f"{_LARGEST_TABLE // _REACH}: choose another step."
            )
        self.std = float(std)
        rows = _thresholds(self.std)
        self._first = np.ascontiguousarray(rows[:, 0]).astype(np.uint64)
        self._rest = rows[:, 1:]

    @property
    def distance(self) -> float:
        """A bound on the total variation distance between one draw and N_Z(0, std^2).

        The tail beyond the table: 2 exp(-reach^2 / 2), since N_Z is sub-Gaussian with its own std^2 (Canonne et
        al. 2020). Each threshold is rounded down by less than 2^-192; making the table moved it by less than 2^-240.
        """
        return 2 * math.exp(-(_REACH**2) / 2) + 2 * len(self._first) * 2.0**-_UNIFORM

    def sample(self, size: int, words: Words) -> npt.NDArray[np.int64]:
        """Returns (size,) int64 independent draws, with randomness from `words`."""
        head = words(size)
        # The magnitude is the number of thresholds that the uniform number has reached.
        magnitude = np.searchsorted(self._first, head, side="right")
        for position in np.flatnonzero((magnitude > 0) & (self._first[magnitude - 1] == head)):
            magnitude[position] = self._resolve_tie(head[position], words)
        signs = np.unpackbits(words(-(-size // 64)).view(np.uint8))[:size].astype(np.int64)
        return magnitude * (1 - 2 * signs)

    def _resolve_tie(self, head: np.uint64, words: Words) -> int:
        """Returns the magnitude for a uniform number whose first 64 bits are those of a threshold."""
        low, high = (int(np.searchsorted(self._first, head, side=side)) for side in ("left", "right"))
        rest = _join_words(words(2))
        return low + sum(_join_words(self._rest[row]) <= rest for row in range(low, high))


def _join_words(pair: npt.NDArray[np.uint64]) -> int:
    return (int(pair[0]) << 64) | int(pair[1])


@lru_cache(maxsize=16)
def discrete_gaussian(std: float) -> DiscreteGaussian:
    """Returns the sampler of N_Z(0, std^2), which is made once: its table of 16 std rows takes about 1 microsecond a row."""
    return DiscreteGaussian(std)


def _thresholds(std: float) -> npt.NDArray[np.uint64]:
    """Returns P(|X| <= k) for k = 0, 1, ... as numbers of 192 bits, rounded down: rows of three 64-bit words, high one first."""
    variance = Fraction(std) ** 2
    ratio, shrink = _exp_minus(1 / (2 * variance)), _exp_minus(1 / variance)
    weight, total, cumulative = 1 << _FRACTION, 1 << _FRACTION, [1 << _FRACTION]
    # exp(-(k+1)^2 / 2 s^2) = exp(-k^2 / 2 s^2) * ratio_k, ratio_(k+1) = ratio_k * exp(-1 / s^2)
    for _ in range(math.ceil(_REACH * std)):
        weight = weight * ratio >> _FRACTION
        ratio = ratio * shrink >> _FRACTION
        total += 2 * weight  # both signs
        cumulative.append(total)
    width = _UNIFORM // 8
    packed = b"".join(((part << _UNIFORM) // total).to_bytes(width, "big") for part in cumulative[:-1])
    return np.frombuffer(packed, dtype=">u8").astype(np.uint64).reshape(-1, 3)


def _exp_minus(exponent: Fraction) -> int:
    """Returns exp(-exponent) for an exponent in (0, 1], with `_FRACTION` bits behind the point; off by less than 2^-310."""
    term = total = 1 << _FRACTION
    sign, order = 1, 0
    while term:
        order, sign = order + 1, -sign
        term = term * exponent.numerator // (exponent.denominator * order)
        total += sign * term
    return total


def sum_distance(std: float, count: int) -> float:
    """Returns a bound on how far the log probabilities of a sum of `count` draws are from those of N_Z(0, count * std^2).

    Kairouz, Liu and Steinke 2021 (https://arxiv.org/abs/2102.06387), section 3: for s, t >= 1/2 the log of the ratio between
    N_Z(0, s^2) + N_Z(0, t^2) and N_Z(0, s^2 + t^2) is at most 5 exp(-2 pi^2 / (1/s^2 + 1/t^2)) everywhere. Adding the
    draws one by one, each step has 1/s^2 + 1/t^2 <= 2 / std^2.
    """
    return max(0, count - 1) * 5 * math.exp(-((math.pi * std) ** 2))


def continuous_distance(smoothing_std: float) -> float:
    """Returns how far N_Z(0, s^2 + r^2), shifted by any integer, is from a function of N(0, s^2) with the same shift, in log ratios.

    The function draws from the integers around y with probability proportional to exp(-(z - y)^2 / 2 r^2); r is
    `smoothing_std`. By Poisson summation the normaliser is r sqrt(2 pi) (1 +- t), t <= 2.01 exp(-2 pi^2 r^2) for
    r >= 1/2, so the outcome's log probability is within 1.01 t of the density of N(0, s^2 + r^2), and so is
    N_Z's own. (The convolution of Peikert 2010, https://eprint.iacr.org/2010/088, theorem 3.1, in one dimension.) So noise
    N_Z(0, s^2 + r^2) tells no more than N(0, s^2), but for this distance.
    """
    return 4.1 * math.exp(-2 * (math.pi * smoothing_std) ** 2)
