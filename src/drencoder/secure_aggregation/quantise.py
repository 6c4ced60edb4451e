"""This module turns clipped float codes into integers with noise, and integers back to floats: under every trust.

Legend: N codes, V values of a code. A *step* is the distance between two neighbouring integers, in units of the code.

- secure aggregation (`Quantiser.shared`): integers modulo 2^b with a share of the noise. The step is fine enough that rounding
  lengthens no code by more than 1 % of the clip, coarse enough that the sum of all clients' codes and of their noise stays below
  2^(b-1), b = 16, 24 or 32. So the modulus never wraps around for the codes; for the noise it does with a chance below 1e-12 a
  release, which would spoil that release and tell nobody anything.
- local trust (`Quantiser.alone`): each code is noised and sent by itself, in the fewest of these bits that keep rounding below 1 %,
  and with the finest step that they hold.
- central trust (`Quantiser.fine`): the machine that adds codes up adds the noise too, so nothing travels and the step is so fine
  that rounding adds 1/4096 of the clip at most.

Source: Kairouz, Liu and Steinke 2021 (https://arxiv.org/abs/2102.06387), section 4, without the random rotation: the encoder
has spread a code already, and b is large enough.
"""

import math
from dataclasses import dataclass, replace
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

_GROWTH = 0.01  # rounding may lengthen a code by this share of the clip
_FINE_GROWTH, _FINE_STEPS = 2.0**-12, 2.0**20  # where nothing travels: at most so much, and at least so many
_MOST_GROWTH = 0.25
_BITS = (16, 24, 32)
_NOTHING_TRAVELS = 63
_LOG_WRAP_RISK = math.log(1e-12)  # of one release, all values together
_INEXACT = 1e-12  # the code is scaled by this share less than the clip, for the rounding of that product
_TRIES = 8


@final
@dataclass(frozen=True)
class Quantiser:
    """How codes of one query become integers. Public; whoever needs it makes the same one.

    Args:
      values: V.
      clip_l2: L2 bound of a code before rounding.
      clip_steps: the same bound in steps.
      noise_multiplier: std of the noise that is added at once (one client's share, or all), over the bound after rounding.
      most_clients: how many codes a sum has at most before it is taken modulo 2^b.
      bits: b; integers are taken modulo 2^b.
      log_wrap_risk: natural logarithm of the chance that the noise of one release makes the modulus wrap around.
    """

    values: int
    clip_l2: float
    clip_steps: float
    noise_multiplier: float
    most_clients: int
    bits: int
    log_wrap_risk: float = _LOG_WRAP_RISK

    def __post_init__(self) -> None:
        counts, numbers = (self.values, self.most_clients), (self.noise_multiplier, self.clip_l2)
        if min(counts) < 1 or not all(0 < number < math.inf for number in numbers):
            raise PrivacyError(
                f"A code of {self.values} values, clip {self.clip_l2}, noise {self.noise_multiplier} and {self.most_clients} "
                "clients cannot be quantised; all must be positive and finite: check the plan."
            )

    @classmethod
    def shared(cls, *, values: int, clip_l2: float, share_multiplier: float, most_clients: int) -> "Quantiser":
        """Secure aggregation: 1 % of growth, or the least that 32 bits allow, and then the fewest bits that hold the sum.

        Raises PrivacyError when even 32 bits would need steps so coarse that rounding lengthens codes by a quarter.
        """
        usual = cls(values, float(clip_l2), _slack(values) / _GROWTH, share_multiplier, most_clients, _BITS[-1])
        fitted = usual._fitted()
        return replace(fitted, bits=next(bits for bits in _BITS if fitted._reach < 2 ** (bits - 1)))

    @classmethod
    def alone(cls, *, values: int, clip_l2: float, noise_multiplier: float, log_wrap_risk: float) -> "Quantiser":
        """Local trust: one code with all of its noise, in the fewest bits that keep growth within 1 %, with their finest step.

        Raises PrivacyError as `shared` does.
        """
        for bits in _BITS:
            whole = cls(values, float(clip_l2), 2.0 ** (bits - 1), noise_multiplier, 1, bits, log_wrap_risk)
            finest = whole._finest()
            if finest.growth <= _GROWTH:
                return finest
        return finest._fitted()

    @classmethod
    def fine(cls, *, values: int, clip_l2: float, noise_multiplier: float) -> "Quantiser":
        """Central trust: the step depends on `values` and `clip_l2` alone, so that a sum needs no noise to begin with."""
        steps = max(_FINE_STEPS, _slack(values) / _FINE_GROWTH)
        return cls(values, float(clip_l2), steps, noise_multiplier, 1, _NOTHING_TRAVELS)

    def _finest(self) -> "Quantiser":
        """The same with steps so coarse that the bits hold what is added up."""
        finest = self
        # The reach is nearly proportional to the steps.
        while finest._reach >= 2 ** (self.bits - 1) and finest.clip_steps > 1e-3:
            finest = replace(finest, clip_steps=finest.clip_steps * 0.99 * 2 ** (self.bits - 1) / finest._reach)
        return finest

    def _fitted(self) -> "Quantiser":
        """The same as `_finest`. Raises PrivacyError where rounding would lengthen codes by a quarter."""
        finest = self._finest()
        if finest.growth > _MOST_GROWTH:
            raise PrivacyError(
                f"Codes of {self.values:,} values of {self.most_clients:,} clients with a noise share of "
                f"{self.noise_multiplier:.3g} do not fit into 32 bits with small enough steps: choose a smaller code, fewer "
                "clients a round or a larger epsilon."
            )
        return finest

    # Facts

    @property
    def step(self) -> float:
        """Distance of two neighbouring integers, in units of the code."""
        return self.clip_l2 / self.clip_steps

    @property
    def bound_steps(self) -> float:
        """L2 bound of a rounded code, in steps: the sensitivity. Enforced by `round_code` in exact integer arithmetic."""
        return self.clip_steps + _slack(self.values)

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
        """Standard deviation of the noise that is added at once, in steps: what was asked for, and a little that makes it discrete.

        The sum of m such noises tells no more than Gaussian noise of `noise_multiplier` sqrt(m) times `bound_l2`, up to
        `log_distance` and `log_ratio`, since it has at least SMOOTHING_STD^2 more variance than that.
        """
        return math.hypot(self.noise_multiplier * self.bound_steps, SMOOTHING_STD)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that is added at once, in units of the code."""
        return self.std_steps * self.step

    @cached_property
    def _reach(self) -> float:
        """No value of the modular sum is larger, but for the noise's chance of `log_wrap_risk`.

        Codes: every value is at most one step longer than the clip. Noise: a sum of n noises is sub-Gaussian with
        variance n std^2 (Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010), and there are V values with two tails each.
        """
        tail = math.sqrt(2 * (math.log(2 * self.values) - self.log_wrap_risk))
        n = self.most_clients
        return n * (self.clip_steps + 1) + math.sqrt(n) * self.std_steps * tail + 1

    def log_distance(self, noises: int) -> float:
        """Returns a bound on the total variation distance between a sum with `noises` noises as they are sampled and one with exact
        ones, as a natural logarithm."""
        return math.log(self.values * noises) + discrete_gaussian(self.std_steps).log_distance

    def log_ratio(self, noises: int) -> float:
        """Returns a bound on how far the log probabilities of a sum with `noises` exact noises are from those of a function of the
        same sum with Gaussian noise of `noise_multiplier` sqrt(noises) `bound_l2`: splitting, summing, being discrete."""
        splitting = discrete_gaussian(self.std_steps).log_ratio * noises
        summing = sum_distance(self.std_steps, noises)
        return self.values * (splitting + summing + continuous_distance(SMOOTHING_STD))

    # Codes

    @property
    def nearest_scale(self) -> float:
        """The factor that turns a code into steps before it is rounded to the nearest integers.

        A value moves by half a step at most, and the norm by sqrt(V) / 2, so no code is longer than `bound_steps` then.
        """
        return self.clip_steps * (1 - _INEXACT) / self.clip_l2

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
        """Returns one client's rounded code plus noise, (V,) uint32 modulo 2^b.

        A share alone is too little noise: such a result is private only inside the sum with the other clients' results.
        """
        noise_V = self.noise(words)
        return self.to_residues(self.round_code(code_V, words) + noise_V)

    def noise(self, words: Words) -> npt.NDArray[np.int64]:
        """Returns the noise that is added at once, (V,) int64 in steps."""
        return discrete_gaussian(self.std_steps).sample(self.values, words)

    def to_residues(self, steps_V: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Returns integers (V,) int64 modulo 2^b, as (V,) uint32."""
        return (steps_V & ((1 << self.bits) - 1)).astype(np.uint32)

    def to_steps(self, residue_V: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Returns residues, or a modular sum, as integers (V,) int64 in [-2^(b-1), 2^(b-1)).

        Raises PrivacyError for another size or a value that is no residue.
        """
        if residue_V.shape != (self.values,) or int(residue_V.max()) >> self.bits:
            raise PrivacyError(f"A modular sum of {self.values} values of {self.bits} bits was expected; another came.")
        half = 1 << (self.bits - 1)
        return (residue_V.astype(np.int64) ^ half) - half

    def to_values(self, residue_V: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """Returns a modular sum in units of the code, (V,) float64; raises as `to_steps` does."""
        return self.to_steps(residue_V) * np.float64(self.step)


def _slack(values: int) -> float:
    """The most that rounding to the nearest integers adds to the norm of so many values; a random rounding is held to it."""
    return math.sqrt(values) / 2
