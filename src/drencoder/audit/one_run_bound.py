"""The lower bound that assumes least: guesses about many canaries of one run, and f-differential privacy.

Source: Mahloujifar, Melis and Chaudhuri 2025, "Auditing f-differential privacy in one run" (https://arxiv.org/abs/2410.22235), theorem 9
and algorithm 3. The package jax-privacy has the same test as `_epsilon_one_run_fdp`; tests/audit compares the two on fixed counts.

Each of m canaries is in or out by a fair coin of its own. The attacker guesses `guesses` of the coins and is right `right` times. If the
mechanism is f-DP with the trade-off function f, then the chance of so many right guesses is at most p, where a recursion over
j = right - 1, ..., 0 carries an upper bound on the mass of runs with more right guesses (r) and on that with wrong ones (h):

    h' = max(h, g(r)),   r' = r + j / (guesses - j) * (h' - h),   g(x) = Phi(Phi^-1(x) - mu) for mu-GDP,

started with r = p right / m and h = p (guesses - right) / m; f is rejected at error p if r + h > guesses / m in the end.

Assumes: the coins are independent and fair, and the mechanism is mu-GDP. Scores may depend on each other in any way, since all of
them may come from one release. The price is a bound far below what scores that are independent would show.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from drencoder.audit.scores import CanaryScores

GUESS_SHARES: Sequence[float] = (0.25, 0.5, 1.0)
"""Which shares of the canaries are guessed, those with the most telling scores; the error is divided by their number."""

_NORMAL = NormalDist()
_LARGEST_MU = 64.0


def one_run_mu(scores: CanaryScores, significance: float) -> float:
    """The largest mu that the guesses reject with an error of at most `significance`; 0 where they reject none."""
    counts = [guesses_of(scores, share) for share in GUESS_SHARES]
    return max(_largest_rejected(scores.count, *count, significance / len(counts)) for count in counts)


def guesses_of(scores: CanaryScores, share: float) -> tuple[int, int]:
    """How many of the canaries are guessed, those with the most telling scores, and how many of these guesses are right."""
    right_N = scores.mirrored[np.argsort(-np.abs(scores.mirrored), kind="stable")] > 0
    guesses = max(1, round(share * right_N.size))
    return guesses, int(right_N[:guesses].sum())


def rejects_mu(canaries: int, guesses: int, right: int, mu: float, significance: float) -> bool:
    """Whether so many right guesses have a chance below `significance` under mu-GDP."""
    return rejects(canaries, guesses, right, lambda x: _blow_down(x, mu), significance)


def rejects(canaries: int, guesses: int, right: int, blow_down: Callable[[float], float], significance: float) -> bool:
    """The same for any f-DP mechanism; `blow_down` is g of the module's recursion, f(1 - x) for a symmetric f."""
    r, h = significance * right / canaries, significance * (guesses - right) / canaries
    for j in range(right - 1, -1, -1):
        higher = max(h, blow_down(r))
        if higher == h:
            break
        r, h = min(1.0, r + j / (guesses - j) * (higher - h)), higher
    return r + h > guesses / canaries


def _blow_down(x: float, mu: float) -> float:
    return float(x >= 1) if x <= 0 or x >= 1 else _NORMAL.cdf(_NORMAL.inv_cdf(x) - mu)


def _largest_rejected(canaries: int, guesses: int, right: int, significance: float) -> float:
    if not rejects_mu(canaries, guesses, right, 0.0, significance):
        return 0.0
    low, high = 0.0, 1.0
    while rejects_mu(canaries, guesses, right, high, significance):
        low, high = high, 2 * high
        if high > _LARGEST_MU:
            return low
    while high - low > 1e-4:
        middle = math.fsum((low, high)) / 2
        low, high = (middle, high) if rejects_mu(canaries, guesses, right, middle, significance) else (low, middle)
    return low
