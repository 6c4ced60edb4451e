"""This module samples discrete Gaussian noise, so exactly that the error can be added to delta and changes no digit of it.

The distribution N_Z(0, s^2) gives the integer x the probability proportional to exp(-x^2 / 2 s^2) (Canonne, Kamath and Steinke 2020,
https://arxiv.org/abs/2004.00010). A table inverts its distribution function with uniform numbers of 2,048 bits. It is
made with integers of 320 bits, no floating point, and holds the first 64 bits of each threshold, which are certain. The first 16
bits of a uniform number decide nearly all draws, the first 64 all but about one in 10^15; the others are drawn, and the thresholds
computed to that length, only when they are needed. So the total variation distance between a draw and N_Z(0, s^2) has a proven
bound (`DiscreteGaussian.log_distance`), and a draw is mostly one look into a small array.

A wide distribution is a narrow one plus 64 times another, which may be wide itself (`_split`; Micciancio and Walter 2017,
https://eprint.iacr.org/2017/259, in one dimension). How far such a sum is from N_Z, how far a sum of shares is, and how far N_Z is
from something no more telling than a continuous Gaussian are bounds on log probabilities: they add to epsilon, and are so small
that no digit shows them. docs/guarantee.md puts them together.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from drencoder.errors import PrivacyError

Words: TypeAlias = Callable[[int], npt.NDArray[np.uint64]]
"""A stream of uniform 64-bit words: each call gives that many new ones."""

_Ints: TypeAlias = npt.NDArray[np.int64]

_FRACTION = 320  # bits behind the point while a table is made
_UNIFORM = 2048  # bits of a uniform number
_FINE_FRACTION = _UNIFORM + 256  # and while a tie is decided
_REACH = 48  # a table ends this many standard deviations from zero
_TOP = (1 << 64) - 1
_GUIDE = 16  # bits of a uniform number that decide most draws
_WIDEST_TABLE = 4096.0
_WIDEST = 2.0**50
_STRIDE, _FINE_STD = 64, 384.0  # of the narrow part of a wide distribution
_CHUNK = 1 << 18  # draws at a time: they stay in the processor's cache
SMOOTHING_STD = 4.0
"""Every share has at least this standard deviation, in steps; `continuous_distance` is below 1e-136 then."""


@final
class DiscreteGaussian:
    """N_Z(0, std^2); `std` in steps, from 1 to 2^50. Raises PrivacyError on others. See `discrete_gaussian`."""

    def __init__(self, std: float) -> None:
        if not 1 <= std <= _WIDEST:
            raise PrivacyError(
                f"A discrete Gaussian has a standard deviation of {std:.6g} steps; it must lie between 1 and "
                f"{_WIDEST:.3g}: choose another step."
            )
        self.std = float(std)
        self._tables = [_table(part) for part in _split(self.std)]

    @property
    def log_distance(self) -> float:
        """A bound on the total variation distance between one draw and the law of `log_ratio`, as a natural logarithm.

        A table's tail: 2 exp(-reach^2 / 2), since N_Z is sub-Gaussian with its own std^2 (Canonne et al. 2020). Rounding
        thresholds to 2,048 bits, and making them with 2,304, moved fewer than 2^18 of them by less than 2^-2040 each.
        """
        return math.log(3 * len(self._tables)) - _REACH**2 / 2

    @property
    def log_ratio(self) -> float:
        """A bound on how far the log probabilities of exact draws are from those of N_Z(0, s^2) for an s of at least `std`.

        0 for one table. For X + kY with X ~ N_Z(0, s^2), Y ~ N_Z(0, t^2): completing the square leaves a sum of exp(-(j - c)^2
        / 2 r^2) over the integers, 1/r^2 = 1/t^2 + k^2/s^2, which `continuous_distance` bounds.
        """
        width = (_FINE_STD / _STRIDE) ** -2 + (_WIDEST_TABLE**2 - _FINE_STD**2) ** -1 * _STRIDE**2
        return (len(self._tables) - 1) * continuous_distance(width**-0.5)

    def sample(self, size: int, words: Words) -> _Ints:
        """Returns (size,) int64 independent draws, with randomness from `words`."""
        out = np.zeros(size, dtype=np.int64)
        for start in range(0, size, _CHUNK):
            part = out[start : start + _CHUNK]
            if len(self._tables) == 1:
                part[:] = self._tables[0].sample(part.size, words)
                continue
            for table in reversed(self._tables):
                part *= _STRIDE
                part += table.sample_short(part.size, words)
        return out


@lru_cache(maxsize=16)
def discrete_gaussian(std: float) -> DiscreteGaussian:
    """Returns the sampler of N_Z(0, std^2), which is made once: in 0.1 s at most."""
    return DiscreteGaussian(std)


def _split(std: float) -> list[float]:
    """Returns the standard deviations of the tables that make up a distribution, the finest first; each next one counts 64 times."""
    parts = []
    while std > _WIDEST_TABLE:
        parts.append(_FINE_STD)
        std = math.sqrt(std**2 - _FINE_STD**2) / _STRIDE * (1 + 1e-15)  # rounded up: never less noise
    return [*parts, std]


class _Table:
    """Draws from N_Z(0, std^2) by inverting P(|X| <= k)."""

    def __init__(self, std: float) -> None:
        self.std = std
        self._first = _first_words(std)
        starts = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(64 - _GUIDE)
        ends = starts | np.uint64((1 << (64 - _GUIDE)) - 1)
        low, high = np.searchsorted(self._first, starts, "left"), np.searchsorted(self._first, ends, "right")
        self._guide = np.where(low == high, low, -1).astype(np.int32)  # -1: there is a threshold among these numbers

    def sample(self, size: int, words: Words) -> npt.NDArray[np.int32]:
        """Draws with 64 bits for each magnitude at once."""
        head = words(size)
        magnitude = self._guide[(head >> np.uint64(64 - _GUIDE)).astype(np.intp)]
        unclear = np.flatnonzero(magnitude < 0)
        magnitude[unclear] = self._search(head[unclear], words)
        return _signed(magnitude, words)

    def sample_short(self, size: int, words: Words) -> npt.NDArray[np.int32]:
        """Draws with 16 bits for each magnitude, and 48 more where these leave it unclear: the same law with fewer random numbers."""
        head = words(-(-size * _GUIDE // 64)).view(np.uint16)[:size]
        magnitude = self._guide[head]
        unclear = np.flatnonzero(magnitude < 0)
        more = words(unclear.size) >> np.uint64(_GUIDE)
        magnitude[unclear] = self._search((head[unclear].astype(np.uint64) << np.uint64(64 - _GUIDE)) | more, words)
        return _signed(magnitude, words)

    def _search(self, head: npt.NDArray[np.uint64], words: Words) -> npt.NDArray[np.int32]:
        """Returns the number of thresholds that uniform numbers with these first 64 bits have reached."""
        reached = np.searchsorted(self._first, head, side="right").astype(np.int32)
        for place in np.flatnonzero((reached > 0) & (self._first[reached - 1] == head)):
            reached[place] = self._resolve_tie(head[place], words)
        return reached

    def _resolve_tie(self, head: np.uint64, words: Words) -> int:
        """Returns the magnitude for a uniform number whose first 64 bits are those of a threshold."""
        low, high = (int(np.searchsorted(self._first, head, side=side)) for side in ("left", "right"))
        if head == _TOP:  # the thresholds from there on are in no table
            high = math.ceil(_REACH * self.std)
        uniform = int(head)
        for word in words(_UNIFORM // 64 - 1):
            uniform = uniform << 64 | int(word)
        cumulative, total = _cumulative(self.std, _FINE_FRACTION)
        largest = ((uniform + 1) * total - 1) >> _UNIFORM  # of the parts whose threshold, rounded down, was reached
        return bisect_right(cumulative, largest, low, high)


@lru_cache(maxsize=16)
def _table(std: float) -> _Table:
    return _Table(std)


def _signed(magnitude: npt.NDArray[np.int32], words: Words) -> npt.NDArray[np.int32]:
    signs = np.unpackbits(words(-(-magnitude.size // 64)).view(np.uint8))[: magnitude.size].astype(np.int32)
    return magnitude * (1 - 2 * signs)


def _first_words(std: float) -> npt.NDArray[np.uint64]:
    """Returns the first 64 bits of P(|X| <= k) for k = 0, 1, ... up to the first that are all ones."""
    cumulative, total = _cumulative(std, _FRACTION)
    heads = []
    for part in cumulative:
        head, after = divmod((part << 128) // total, 1 << 64)
        heads.append(head)
        if head == _TOP:
            break
        # The numbers are right to 2^-250, so that the head is certain unless what comes after it is all zeros or all ones.
        if not 0 < after < _TOP:
            raise PrivacyError(f"No table can be made of a standard deviation of {std!r} steps: choose another step.")
    return np.array(heads, dtype=np.uint64)


def _cumulative(std: float, fraction: int) -> tuple[list[int], int]:
    """Returns the sums of exp(-j^2 / 2 s^2) over |j| <= k for k = 0, 1, ..., and over all, with `fraction` bits behind the point."""
    variance = Fraction(std) ** 2
    ratio, shrink = _exp_minus(1 / (2 * variance), fraction), _exp_minus(1 / variance, fraction)
    weight = total = 1 << fraction
    cumulative = [total]
    # exp(-(k+1)^2 / 2 s^2) = exp(-k^2 / 2 s^2) * ratio_k, ratio_(k+1) = ratio_k * exp(-1 / s^2)
    while weight:
        weight = weight * ratio >> fraction
        ratio = ratio * shrink >> fraction
        total += 2 * weight  # both signs
        cumulative.append(total)
    return cumulative, total


def _exp_minus(exponent: Fraction, fraction: int) -> int:
    """Returns exp(-exponent) for an exponent in (0, 1], with `fraction` bits behind the point, off in the last ten of them."""
    term = total = 1 << fraction
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
