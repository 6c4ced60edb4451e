"""This module turns clipped float codes into integers modulo 2^b with noise, and the sum of many such codes back to floats.

Legend: N codes, V values of a code. A *step* is the distance between two neighbouring integers, in units of the code.

The step is chosen from the plan: fine enough that rounding lengthens no code by more than 1 % of the clip, coarse enough
that the sum of all clients' codes and of their noise stays below 2^(b-1) with b = 16, 24 or 32. So the modulus never
wraps around for the codes; for the noise it does with a chance below 1e-12 a release, which would spoil that release and
tell nobody anything.

Source: Kairouz, Liu and Steinke 2021 (https://arxiv.org/abs/2102.06387), section 4, without the random rotation: the encoder
has spread a code already, and b is large enough.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

from drencoder.errors import PrivacyError
from drencoder.secure_aggregation.discrete import (
    SMOOTHING_STD,
    Words,
    continuous_distance,
    discrete_gaussian,
    sum_distance,
)

__all__ = ["Quantiser"]

_GROWTH = 0.01  # rounding may lengthen a code by this share of the clip
_MOST_GROWTH = 0.25
_MOST_STEPS = 1 << 17  # of a share's standard deviation: the sampler's table
_BITS = (16, 24, 32)
_WRAP_RISK = 1e-12  # of one release, all values together
_TRIES = 8


@final
@dataclass(frozen=True)
class Quantiser:
    """How codes of one query become integers. Public; both sides make the same one with `plan`.

    Args:
      values: V.
      clip_l2: L2 bound of a code before rounding.
      clip_steps: the same bound in steps.
      share_multiplier: noise std of one client's share, over the bound after rounding.
      most_clients: how many codes a sum has at most.
      bits: b; integers are taken modulo 2^b.
    """

    values: int
    clip_l2: float
    clip_steps: float
    share_multiplier: float
    most_clients: int
    bits: int

    @classmethod
    def plan(cls, *, values: int, clip_l2: float, share_multiplier: float, most_clients: int) -> "Quantiser":
        """Chooses the finest step that `bits` = 32 allows, up to 1 % of growth, and then the fewest bits that hold the sum.

        Raises PrivacyError when even 32 bits would need steps so coarse that rounding lengthens codes by a quarter.
        """
        if values < 1 or most_clients < 1 or not 0 < share_multiplier < math.inf or not 0 < clip_l2 < math.inf:
            raise PrivacyError(
                f"A code of {values} values, clip {clip_l2}, noise share {share_multiplier} and {most_clients} clients cannot "
                "be quantised; all must be positive and finite: check the plan."
            )
        slack = math.sqrt(values) / 2
        steps = slack / _GROWTH
        if share_multiplier * (steps + slack) > _MOST_STEPS:  # a very noisy plan, or a very long code
            steps = _MOST_STEPS / share_multiplier - slack
        while True:
            candidate = cls(values, float(clip_l2), steps, share_multiplier, most_clients, _BITS[-1])
            if candidate._reach < 2 ** (_BITS[-1] - 1) or steps < slack:
                break
            steps *= 0.99 * 2 ** (_BITS[-1] - 1) / candidate._reach  # the reach is nearly proportional to the steps
        if slack > _MOST_GROWTH * steps:
            raise PrivacyError(
                f"Codes of {values:,} values of {most_clients:,} clients with a noise share of {share_multiplier:.3g} do not fit "
                "into 32 bits with small enough steps: choose a smaller code, fewer clients a round or a larger epsilon."
            )
        bits = next(bits for bits in _BITS if candidate._reach < 2 ** (bits - 1))
        return cls(values, float(clip_l2), steps, share_multiplier, most_clients, bits)

    # Facts

    @property
    def step(self) -> float:
        """Distance of two neighbouring integers, in units of the code."""
        return self.clip_l2 / self.clip_steps

    @property
    def bound_steps(self) -> float:
        """L2 bound of a rounded code, in steps: the sensitivity. Enforced by `round_code` in exact integer arithmetic."""
        return self.clip_steps + math.sqrt(self.values) / 2

    @property
    def bound_l2(self) -> float:
        """L2 bound of a rounded code, in units of the code: the clip and what rounding adds to it."""
        return self.bound_steps * self.step

    @property
    def growth(self) -> float:
        """By which share of the clip rounding may lengthen a code."""
        return self.bound_steps / self.clip_steps - 1

    @property
    def std_steps(self) -> float:
        """Standard deviation of one share, in steps: what was asked for, and a little that makes it discrete.

        The sum of m shares tells no more than Gaussian noise of `share_multiplier` sqrt(m) times `bound_l2`, up to
        `distance`, since it has at least SMOOTHING_STD^2 more variance than that.
        """
        return math.hypot(self.share_multiplier * self.bound_steps, SMOOTHING_STD)

    @property
    def share_std(self) -> float:
        """Standard deviation of one share, in units of the code."""
        return self.std_steps * self.step

    @cached_property
    def _reach(self) -> float:
        """No value of the modular sum is larger, but for the noise's chance of `_WRAP_RISK`.

        Codes: every value is at most one step longer than the clip. Noise: a sum of n shares is sub-Gaussian with
        variance n std^2 (Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010), and there are V values with two tails each.
        """
        tail = math.sqrt(2 * math.log(2 * self.values / _WRAP_RISK))
        n = self.most_clients
        return n * (self.clip_steps + 1) + math.sqrt(n) * self.std_steps * tail + 1

    def distance(self, shares: int) -> float:
        """Returns a bound on the total variation distance between a noised sum with `shares` honest shares and a function of the
        same sum with Gaussian noise of `share_multiplier` sqrt(shares) `bound_l2`: sampling, summing, being discrete."""
        one = discrete_gaussian(self.std_steps).distance * shares
        return self.values * (one + sum_distance(self.std_steps, shares) + continuous_distance(SMOOTHING_STD))

    # Codes

    def round_code(self, code_V: npt.NDArray[np.float32], words: Words) -> npt.NDArray[np.int64]:
        """Returns one code in steps, (V,) int64, rounded at random so that its mean is the code; never longer than `bound_steps`.

        A rounding that would be longer is drawn again; after eight of them the code is rounded towards zero, which makes
        no code longer. Raises PrivacyError for a code that is longer than the clip, not finite or of another size.
        """
        if code_V.shape != (self.values,):
            raise PrivacyError(f"A code has shape {code_V.shape}; ({self.values},) is needed.")
        scaled_V = code_V.astype(np.float64) * (self.clip_steps / self.clip_l2)
        if not float(np.linalg.norm(scaled_V)) <= self.clip_steps * (1 + 1e-9):  # nan too
            raise PrivacyError(f"A code is longer than its clip of {self.clip_l2:g}: clip it before it is rounded.")
        lower_V = np.floor(scaled_V)
        rest_V, whole_V = scaled_V - lower_V, lower_V.astype(np.int64)
        limit = math.floor(self.bound_steps**2)
        for _ in range(_TRIES):
            uniform_V = (words(self.values) >> np.uint64(11)) * 2.0**-53
            rounded_V = whole_V + (uniform_V < rest_V)
            if int(np.dot(rounded_V, rounded_V)) <= limit:
                return rounded_V
        short_V = np.trunc(scaled_V * (1 - 1e-12)).astype(np.int64)
        assert int(np.dot(short_V, short_V)) <= limit
        return short_V

    def round_and_noise(self, code_V: npt.NDArray[np.float32], words: Words) -> npt.NDArray[np.uint32]:
        """Returns one client's rounded code plus its share of noise, (V,) uint32 modulo 2^b.

        A share alone is too little noise: the result is private only inside the sum with the other clients' results.
        """
        noise_V = self.noise(words)
        return self.to_residues(self.round_code(code_V, words) + noise_V)

    def noise(self, words: Words) -> npt.NDArray[np.int64]:
        """Returns the noise that is added at once, (V,) int64 in steps."""
        return discrete_gaussian(self.std_steps).sample(self.values, words)

    def to_residues(self, steps_V: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Returns integers (V,) int64 modulo 2^b, as (V,) uint32."""
        return (steps_V & ((1 << self.bits) - 1)).astype(np.uint32)

    def to_values(self, residue_V: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """Returns a modular sum in units of the code, (V,) float64: the representatives in [-2^(b-1), 2^(b-1)) times the step.

        Raises PrivacyError for another size or a value that is no residue.
        """
        if residue_V.shape != (self.values,) or int(residue_V.max()) >> self.bits:
            raise PrivacyError(f"A modular sum of {self.values} values of {self.bits} bits was expected; another came.")
        half = 1 << (self.bits - 1)
        return ((residue_V.astype(np.int64) ^ half) - half) * np.float64(self.step)
