"""The budget after every round: what a plan has spent by then under PLD (the reported number) and under RDP (beside it).

Both are guarantees. `benchmarks/paper_privacy.py` shows what the literature shows next to them: exact Gaussian DP, its central
limit, which is no guarantee, and trade-off functions. `drencoder.privacy.accounting` has the sources.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import RELATIONS, Event, NonPrivateEvent, Relation, epsilon_pld, epsilon_rdp, gdp_mu
from drencoder.privacy.observers import OBSERVERS, json_ready
from drencoder.privacy.plan import PrivacyPlan

_MAX_POINTS = 25  # rounds that are evaluated for one noise multiplier where each takes a PLD
_MAX_EXACT_POINTS = 400  # where each is a closed form
_MAX_NOISES = 8  # more cannot be told apart in one figure
_INTERVAL = 1e-3  # grid of the rounds before the last
_CHECK_INTERVAL = 1e-2  # ten times coarser: the difference shows the grid's error


@dataclass(frozen=True)
class BudgetPoint:
    """What has been spent once `round` is over (0: stage 1 alone), at the table's delta.

    `epsilon_rdp` is None where no bound is known (sub-sampling under `replace_one`).
    """

    round: int
    epsilon_pld: float
    epsilon_rdp: float | None


@dataclass(frozen=True)
class NoiseBudget:
    """The budget per round with one noise multiplier of the rounds; stage 1 keeps its ratio to it.

    `grid_error` estimates by how much `epsilon_pld` of a round before the last can lie above the finest grid's
    value (it never lies below the truth); the last round's is the plan's own number.
    """

    noise_multiplier: float
    stage1_noise_multiplier: float
    points: tuple[BudgetPoint, ...]
    grid_error: float

    @property
    def last(self) -> BudgetPoint:
        return self.points[-1]


@dataclass(frozen=True)
class BudgetTable:
    """Accumulated budgets of a plan for several noise multipliers. Public facts only.

    `staircase`: the budget moves only when a client's next release can happen (capped cohorts).
    """

    delta: float
    relation: Relation
    observer: str
    assumption: str
    staircase: bool
    budgets: tuple[NoiseBudget, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite epsilon is the string "inf"."""
        facts: dict[str, Any] = json_ready(asdict(self))
        return facts


def budget_table(
    plan: PrivacyPlan,
    noise_multipliers: Iterable[float] | None = None,
    *,
    observer: str | None = None,
    relation: Relation | None = None,
) -> BudgetTable:
    """The budget after each round of `plan` for each of `noise_multipliers` (None: the plan's own).

    At most 25 rounds are evaluated where a round is sub-sampled, always the first and the last. `observer` is
    "server", "clients" or "public" (None: the one whose epsilon the plan bounds), `relation` either adjacency
    (None: the plan's). Under central trust the server has no guarantee: its epsilons are infinite.

    Raises:
      PrivacyError: no, too many or impossible noise multipliers; an unknown observer or adjacency.
    """
    observer, relation = chosen_view(plan, observer, relation)
    plans = with_noise(plan, noise_multipliers)
    return BudgetTable(
        delta=plan.delta, relation=relation, observer=observer, assumption=plan.guarantee(observer, ()).assumption,
        staircase=plan.capped and not plan.curated, budgets=tuple(_budget(one, observer, relation) for one in plans),
    )  # fmt: skip


def chosen_view(plan: PrivacyPlan, observer: str | None, relation: Relation | None) -> tuple[str, Relation]:
    """The observer and the adjacency, None replaced by those of the plan's budget. Raises PrivacyError on others."""
    observer, relation = observer or plan.budget_observer, relation or plan.relation
    for name, value, allowed in (("observer", observer, OBSERVERS), ("adjacency", relation, RELATIONS)):
        if value not in allowed:
            raise PrivacyError(f"The {name} {value!r} is unknown; it is one of {', '.join(allowed)}: choose one.")
    return observer, relation


def composed_events(plan: PrivacyPlan, observer: str, until: int | None = None) -> tuple[Event, ...]:
    """What `observer` has of the worst client after round `until` (None: the last), as merged events.

    No guarantee is one non-private event. Cohorts count with their lower bound, as in `PrivacyPlan.epsilons`.
    """
    charged = {slot: charge for slot, charge in plan.schedule().items() if until is None or slot <= until}
    events = plan.composition(observer, charged)
    return (NonPrivateEvent(),) if events is None else events


def with_noise(plan: PrivacyPlan, noise_multipliers: Iterable[float] | None) -> list[PrivacyPlan]:
    """The plan once for each noise multiplier, in rising order (None: as it is).

    Stage 1 keeps its ratio to the rounds. The target goes, since another noise may miss it.

    Raises:
      PrivacyError: no, too many or impossible noise multipliers, or rounds without noise.
    """
    if noise_multipliers is None:
        return [plan]
    sigmas = sorted(set(noise_multipliers))
    if "round" in plan.non_private:
        raise PrivacyError("Noise multipliers are given, but the plan's rounds have no noise: leave them out.")
    if not 1 <= len(sigmas) <= _MAX_NOISES:
        raise PrivacyError(f"{len(sigmas)} noise multipliers are given; a figure shows 1 to {_MAX_NOISES}: name fewer.")
    for sigma in sigmas:
        if not 1e-6 <= sigma <= 1e6:
            raise PrivacyError(
                f"The noise multiplier {sigma} is impossible; it must be positive and finite, from 1e-6 to 1e6: 1 is usual."
            )
    first, usual = plan.stage1_noise_multiplier, plan.noise_multiplier
    return [
        plan
        if sigma == usual
        else replace(plan, noise_multiplier=sigma, stage1_noise_multiplier=first * (sigma / usual), target_epsilon=None)
        for sigma in sigmas
    ]


def _budget(plan: PrivacyPlan, observer: str, relation: Relation) -> NoiseBudget:
    whole = composed_events(plan, observer)
    closed_form = gdp_mu(whole, relation) is not None
    rounds = _chosen_rounds(plan, _MAX_EXACT_POINTS if closed_form else _MAX_POINTS)
    events = {number: composed_events(plan, observer, number) for number in rounds}
    epsilons = [epsilon_pld(one, plan.gaussian_delta, relation, _INTERVAL) for one in events.values()]
    error = 0.0
    if not closed_form:
        coarse = [epsilon_pld(one, plan.gaussian_delta, relation, _CHECK_INTERVAL) for one in events.values()]
        # The grid's error falls with the square of its interval: the difference is 99 times what is left.
        pairs = [(c, e) for c, e in zip(coarse, epsilons, strict=True) if math.isfinite(c)]
        error = max([0.0, *(c - e for c, e in pairs)]) / 99
    epsilons[-1] = epsilon_pld(whole, plan.gaussian_delta, relation)
    for i in range(len(epsilons) - 2, -1, -1):
        epsilons[i] = min(epsilons[i], epsilons[i + 1])  # a part never costs more than the whole
    points = tuple(
        BudgetPoint(number, epsilon, epsilon_rdp(events[number], plan.gaussian_delta, relation))
        for number, epsilon in zip(rounds, epsilons, strict=True)
    )
    return NoiseBudget(plan.noise_multiplier, plan.stage1_noise_multiplier, points, error)


def _chosen_rounds(plan: PrivacyPlan, most: int) -> list[int]:
    """0 where there is a stage 1, then all rounds or `most` of them, the first and the last among them.

    The early ones stand closer: there the budget grows fastest.
    """
    last = plan.rounds
    chosen = set(range(1, last + 1))
    if last > most:
        chosen = {1 + round((last - 1) * (i / (most - 1)) ** 1.5) for i in range(most)}
    return ([0] if plan.stage1_rate > 0 else []) + sorted(chosen)
