"""The server's learning rate: from the recipe, or from how many coordinates the plan's noise lets a round learn. No torch here."""

from math import sqrt

from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Server

RATE = 0.02  # of fedadam, for a recipe that names none; how it was chosen: docs/results/real-text.md
_ENOUGH = 700.0  # k* at which RATE is not yet too long: between what learned at RATE and what did not (docs/results/real-text.md)


def planned_rate(server: Server, plan: PrivacyPlan) -> float:
    """The recipe's `server.learning_rate`; where that is 0, 0.02, and for fedadam less where noise dominates: 0.02 sqrt(k* / 700).

    FedAdam moves every value by about the rate, whether it is signal or noise. T steps of noise have a length that grows with rate sqrt(T), and
    what they cost grows with its square; what the signal gains grows with the rate times sqrt(k*), the signal's share of a step. So the best
    rate goes with sqrt(k*). It depends on the plan alone, which everybody may know. The two constants were measured.
    """
    if server.learning_rate:
        return server.learning_rate
    return RATE * sqrt(min(1.0, plan.k_star() / _ENOUGH)) if server.optimizer == "fedadam" else RATE


def learning_rate(server: Server, plan: PrivacyPlan, slot: int) -> float:
    """The learning rate of round `slot` of 1..`plan.rounds`: linear, from the planned one to `final_share` of it.

    A falling rate averages the last rounds' noise away, which a private run needs more than others (docs/log.md).
    """
    done = (slot - 1) / max(1, plan.rounds - 1)
    return planned_rate(server, plan) * (1.0 + (server.final_share - 1.0) * done)


def step_words(server: Server, plan: PrivacyPlan) -> str:
    """The server's step in words: its optimiser, its first rate, and why that is lower than usual if the plan lowered it."""
    rate = planned_rate(server, plan)
    lowered = (
        f", and not {RATE:g}, because the noise lets a round learn little"
        if not server.learning_rate and rate < RATE
        else ""
    )
    return f"{server.optimizer} at a rate of {rate:.2g}{lowered}"
