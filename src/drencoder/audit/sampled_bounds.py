"""The three lower bounds for releases that a secret draw sub-samples: no mu describes them, so a family of mechanisms takes its place.

Legend: N canaries, T slots.

With the rates of the plan fixed, let M_t be the plan's mechanism with t times its noise, composed over all slots; M_1 was promised. Each
bound rejects every M_t of so much noise that the scores would be too good, and reports the epsilon of the least noisy one that it
rejects, computed by the same accounting as the promise. A canary's score is the logarithm of its likelihood ratio under M_1.

* `gaussian`: how far apart the means of tanh(score / 2) of the canaries that were in and out are, in units of what their measured spread makes
  of it (Welch 1947, https://doi.org/10.1093/biomet/34.1-2.28), against the same under M_t, from simulated scores. tanh bounds what one canary
  can do, so that the central limit holds for a few hundred. Assumes: scores are independent; releases are sub-sampled Gaussians with the
  plan's rates.
* `gdp`: Clopper and Pearson's intervals of the errors of the guess "in" where the score is positive, against the trade-off function of M_t.
  Assumes: scores are independent; releases are sub-sampled Gaussians with the plan's rates.
* `one_run`: the recursion of `one_run_bound` with that trade-off function. Assumes: the coins are fair; releases as before.

The trade-off function is the largest convex one below what the privacy loss distribution says for every epsilon (Dong, Roth and Su 2019,
https://arxiv.org/abs/1905.02383, proposition 2.12): f(a) = max over epsilon of 1 - delta - e^epsilon a and e^-epsilon (1 - delta - a).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import final

import numpy as np

from drencoder.audit.clopper_pearson_bound import error_bounds
from drencoder.audit.one_run_bound import GUESS_SHARES, guesses_of, rejects
from drencoder.audit.scores import CanaryScores, Floats
from drencoder.privacy.accounting import PoissonGaussianEvent, Relation, delta_pld, epsilon_pld
from drencoder.rng import derive_seed

_SCALES: Sequence[float] = tuple(2.0 ** (k / 24) for k in range(48, -73, -1))  # from four times the noise to an eighth
_EPSILONS = tuple(0.02 * 1.05**k for k in range(140))  # to 18: no audit of so few canaries passes it
_GROWTH_E = np.exp(np.asarray(_EPSILONS))
_SIMULATED = 40_000
_RELATION: Relation = "add_remove"
_NORMAL = NormalDist()
_Test = Callable[[CanaryScores, float, float], bool]
"""(scores, scale, error) -> whether a member of the family is rejected."""


def log_ratio(x_N: Floats, length: float, noise: float, rate: float) -> Floats:
    """log of (1 - rate) N(0, noise^2) + rate N(length, noise^2) over N(0, noise^2), at values x_N along the canary, all in units of the clip."""
    exponent_N = (length * x_N - length**2 / 2) / noise**2
    return np.asarray(np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + exponent_N))


@final
@dataclass(frozen=True)
class SampledFamily:
    """The mechanisms M_t of these slots, one event each, as one observer sees them."""

    slots: tuple[PoissonGaussianEvent, ...]
    delta: float
    seed: int

    def epsilon(self, scale: float) -> float:
        """Of M_scale, at the family's delta."""
        return epsilon_pld(self._events(scale), self.delta, _RELATION)

    def bounds(self, scores: CanaryScores, error: float) -> dict[str, float]:
        """Bound -> the largest epsilon that it rejects with an error of at most `error`; 0 where it rejects none."""
        return {name: self._largest(reject, scores, error) for name, reject in self._tests.items()}

    def exceeded(self, scores: CanaryScores, error: float) -> tuple[str, ...]:
        """The bounds that reject M_1, which was promised, and members with more noise than it, which a mechanism may have."""
        return tuple(
            name
            for name, reject in self._tests.items()
            if all(reject(scores, scale, error) for scale in (1.0, *_SCALES[:48:8]))
        )

    @property
    def _tests(self) -> dict[str, _Test]:
        return {"gaussian": self._rejects_mean, "gdp": self._rejects_errors, "one_run": self._rejects_guesses}

    def simulate(self, scale: float, inside: bool) -> Floats:
        """Scores of canaries under M_scale, the same draws of chance for every scale."""
        generator = np.random.Generator(np.random.Philox(derive_seed(self.seed, "audit-threshold", inside)))
        total_N = np.zeros(_SIMULATED)
        for event in self.slots:
            asked_N = (generator.random(_SIMULATED) < event.sampling_rate) & inside
            x_N = asked_N + scale * event.noise_multiplier * generator.standard_normal(_SIMULATED)
            total_N += log_ratio(x_N, 1.0, event.noise_multiplier, event.sampling_rate)
        return total_N

    def _events(self, scale: float) -> tuple[PoissonGaussianEvent, ...]:
        return tuple(replace(event, noise_multiplier=event.noise_multiplier * scale) for event in self.slots)

    def _largest(self, reject: _Test, scores: CanaryScores, error: float) -> float:
        """Epsilon of the least noisy rejected member, infinite if that is all of them; a member is rejected with all noisier ones."""
        first_kept = bisect_left(_SCALES, True, key=lambda scale: not reject(scores, scale, error))
        if first_kept == len(_SCALES):
            return math.inf
        return self.epsilon(_SCALES[first_kept - 1]) if first_kept else 0.0

    def _rejects_mean(self, scores: CanaryScores, scale: float, error: float) -> bool:
        counts = scores.inside.size, scores.outside.size
        sides = [np.tanh(side / 2) for side in (scores.inside, scores.outside)]
        apart, squared = _apart(sides, counts)
        if squared == 0:
            return apart > 0
        expected, spread = _expected_ratio(self, scale, *counts)
        return apart / math.sqrt(squared) - expected > _NORMAL.inv_cdf(1 - error) * spread

    def _rejects_errors(self, scores: CanaryScores, scale: float, error: float) -> bool:
        alpha, beta = error_bounds(scores, error)
        return self.trade_off(scale, alpha) > beta

    def _rejects_guesses(self, scores: CanaryScores, scale: float, error: float) -> bool:
        counts = [guesses_of(scores, share) for share in GUESS_SHARES]
        return any(
            rejects(scores.count, guesses, right, lambda x: self.trade_off(scale, 1 - x), error / len(counts))
            for guesses, right in counts
        )

    def trade_off(self, scale: float, alpha: float) -> float:
        """The least false negative rate under M_scale at a false positive rate of `alpha`; symmetric."""
        rest_E = _kept_mass(self._events(scale))
        return max(0.0, float((rest_E - _GROWTH_E * alpha).max()), float(((rest_E - alpha) / _GROWTH_E).max()))


def _apart(sides: Sequence[Floats], counts: Sequence[int]) -> tuple[float, float]:
    """The difference of two means, and the variance of such a difference for samples of `counts`."""
    inside, outside = sides
    return float(inside.mean() - outside.mean()), float(inside.var() / counts[0] + outside.var() / counts[1])


@lru_cache(maxsize=1024)
def _expected_ratio(family: SampledFamily, scale: float, inside: int, outside: int) -> tuple[float, float]:
    """The difference of means by its standard error under a member of the family, and the standard deviation of that ratio.

    By the delta method: the standard error is measured, too, on the same canaries. What the simulation does not know counts as well.
    """
    sides = [np.tanh(family.simulate(scale, there) / 2) for there in (True, False)]
    counts = inside, outside
    apart, squared = _apart(sides, counts)
    variance = 0.0
    for side, count, sign in zip(sides, counts, (1, -1), strict=True):
        off = side - side.mean()
        influence = sign * off - apart / (2 * squared) * (off**2 - off.var()) / count
        variance += float(influence.var()) / count * (1 + count / _SIMULATED)
    return apart / math.sqrt(squared), math.sqrt(variance / squared)


@lru_cache(maxsize=256)
def _kept_mass(events: tuple[PoissonGaussianEvent, ...]) -> Floats:
    """1 - delta at every epsilon of the grid."""
    return 1 - np.asarray(delta_pld(events, _EPSILONS, _RELATION))
