"""From an epsilon to the noise that costs it: the inverse of the accounting, by a bracketed secant search."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from drencoder.errors import PrivacyError
from drencoder.privacy import accounting
from drencoder.privacy.accounting import Event, Relation, epsilon_pld, sigma_gaussian
from drencoder.privacy.plan_checks import refuse

if TYPE_CHECKING:
    from drencoder.privacy.plan import PrivacyPlan

LEAST_SAMPLED_NOISE = 0.1
"""The smallest noise multiplier of secret cohorts: less protects nobody, and its privacy loss fits on no grid."""
_MOST_NOISE = 1e4


def calibrate(
    plan: Callable[[float], "PrivacyPlan"], epsilon: float | None, noise_multiplier: float | None
) -> "PrivacyPlan":
    """The plan with the least noise that keeps to `epsilon`, or with `noise_multiplier`, which must keep to it.

    Args:
      plan: noise multiplier of the rounds -> the plan with it, checked in all else.

    Raises:
      PrivacyError: neither is given, or both and they do not go together, or one though no stage has noise.
    """
    draft = plan(1.0)  # checks everything else before any search
    everything = dict.fromkeys(draft.slots, 1)
    if not draft.budget_events(everything):  # nothing private is left to calibrate
        if epsilon is not None or noise_multiplier is not None:
            refuse("A noise level is given though no stage has noise", "a run without noise has none", "drop it")
        return draft
    if noise_multiplier is not None:
        planned = plan(noise_multiplier)
        cost = epsilon_pld(planned.budget_events(everything), planned.gaussian_delta, planned.relation)
        if epsilon is not None and cost > epsilon:
            refuse(
                f"noise_multiplier {noise_multiplier} costs epsilon {cost:.4f}",
                f"the budget is {epsilon}",
                "leave noise_multiplier out to have it found, or set epsilon to what you accept",
            )
        return planned
    if epsilon is None:
        refuse("Neither epsilon nor noise_multiplier is given", "one of them is needed", "set epsilon, e.g. 8")
    mu = accounting.gdp_mu(draft.budget_events(everything), draft.relation)
    if mu is not None:  # mu scales with 1/sigma: no search
        return plan(mu * sigma_gaussian(epsilon, draft.gaussian_delta))
    return plan(
        sigma_for(lambda sigma: plan(sigma).budget_events(everything), epsilon, draft.gaussian_delta, draft.relation)
    )


def sigma_for(
    events_fn: Callable[[float], tuple[Event, ...]], epsilon: float, delta: float, relation: Relation
) -> float:
    """The smallest sigma whose composition `events_fn(sigma)` costs at most `epsilon` (PLD).

    Returns sigma with epsilon - 1e-3 <= PLD epsilon <= epsilon wherever the grid allows, never above.
    Secant steps in (log sigma, log epsilon), on a coarse grid first, then on the one `epsilon_pld` chooses.
    Raises PrivacyError when no sigma in [0.1, 1e4] will do.
    """
    tolerance = min(4.9e-4, 1e-3 * epsilon)
    goal = epsilon - 1.01 * tolerance
    most = epsilon_pld(events_fn(LEAST_SAMPLED_NOISE), delta, relation, accounting.COARSE_INTERVAL)
    if epsilon > most:
        raise PrivacyError(
            f"epsilon is {epsilon:g}, and the least noise multiplier of secret cohorts, {LEAST_SAMPLED_NOISE:g}, costs {most:.4g} "
            "in this plan: choose a smaller epsilon, or give the noise multiplier itself."
        )
    guess, slope = max(LEAST_SAMPLED_NOISE, sigma_gaussian(goal, delta)), -1.2
    mu = accounting.clt_mu(events_fn(guess * (1 if relation == "add_remove" else 2)))
    if mu:  # by the limit's own formula epsilon is about proportional to mu: a better start
        guess = max(0.3, guess * min(1.0, mu * guess))
    sigma = guess
    for interval in (accounting.COARSE_INTERVAL, accounting.QUICK_INTERVAL, accounting.REPORT_INTERVAL):
        sigma, slope, value = _secant(
            lambda s, h=interval: epsilon_pld(events_fn(s), delta, relation, h),  # type: ignore[misc]
            goal, tolerance, sigma, slope,
        )  # fmt: skip
        if interval == accounting.QUICK_INTERVAL and accounting.fine_enough(
            epsilon_pld(events_fn(sigma), delta, relation, accounting.COARSE_INTERVAL), value
        ):
            break
    return sigma


def _secant(
    epsilon_fn: Callable[[float], float], goal: float, tolerance: float, sigma: float, slope: float
) -> tuple[float, float, float]:
    """Solves epsilon_fn(sigma) = goal +- tolerance, bracketed; returns (sigma, slope, epsilon)."""
    low, high = LEAST_SAMPLED_NOISE, _MOST_NOISE
    x_old = y_old = math.nan
    for _ in range(60):
        value = epsilon_fn(sigma)
        if abs(value - goal) <= tolerance:
            return sigma, slope, value
        low, high = (max(low, sigma), high) if value > goal else (low, min(high, sigma))
        if low >= high or high <= 1.001 * LEAST_SAMPLED_NOISE or low >= 0.999 * _MOST_NOISE:
            break
        x, y = math.log(sigma), math.log(max(value, 1e-9) / goal)
        if math.isfinite(x_old) and x != x_old and (y - y_old) / (x - x_old) < -0.1:
            slope = (y - y_old) / (x - x_old)
        x_old, y_old = x, y
        step = min(max(-y / slope, -1.5), 1.5)
        sigma = math.exp(x + step)
        if not low < sigma < high:
            sigma = math.sqrt(low * high)
    raise PrivacyError(
        f"No noise multiplier between {LEAST_SAMPLED_NOISE:g} and {_MOST_NOISE:g} gives epsilon {goal:.4g}: choose an epsilon "
        "between about 0.01 and 100, a larger delta, fewer rounds, or give the noise multiplier itself."
    )
