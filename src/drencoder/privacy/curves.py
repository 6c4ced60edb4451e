"""The budget after every round, under every analysis the literature uses: the published figure, with labels.

Four accountants stand side by side. PLD and RDP are guarantees, and so is exact Gaussian DP where nothing is
sub-sampled. The central limit's Gaussian DP (CLT) is an approximation that lies below the truth at the sizes of
this method, so it is never a guarantee. `drencoder.privacy.accounting` has the sources.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import (
    RELATIONS,
    Event,
    NonPrivateEvent,
    PoissonGaussianEvent,
    Relation,
    clt_mu,
    epsilon_gaussian,
    epsilon_pld,
    epsilon_rdp,
    epsilons_pld,
    gdp_mu,
    merge,
)
from drencoder.privacy.plan import PrivacyPlan, Stage

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "BudgetPoint",
    "CompositionPart",
    "PrivacyCurves",
    "SigmaCurve",
    "budget_curves",
    "chosen_view",
    "clt_limit",
    "composed_events",
    "events_text",
    "mu_conversion",
]

OBSERVERS = ("server", "clients", "public")
_MAX_POINTS = 25  # rounds that are evaluated for one sigma where each takes a PLD
_MAX_EXACT_POINTS = 400  # where each is a closed form
_MAX_SIGMAS = 8  # more cannot be told apart in one figure
_INTERVAL = 1e-3  # grid of the rounds before the last
_CHECK_INTERVAL = 1e-2  # ten times coarser: the difference shows the grid's error


@dataclass(frozen=True)
class Accountant:
    """One analysis: the field of `BudgetPoint` that holds its epsilon, its name, whether it bounds the truth."""

    field: str
    label: str
    is_guarantee: bool


ACCOUNTANTS = (
    Accountant("epsilon_pld", "PLD", True),
    Accountant("epsilon_rdp", "RDP", True),
    Accountant("epsilon_gdp", "exact GDP", True),
    Accountant("epsilon_clt", "CLT-GDP", False),
)


@dataclass(frozen=True)
class BudgetPoint:
    """What has been spent once `round` is over (0: stage 1 alone), at the curves' delta.

    `epsilon_rdp` is None where no bound is known (sub-sampling under `replace_one`). `mu` and `epsilon_gdp` are
    exact Gaussian DP, None under sub-sampling. `mu_clt` and `epsilon_clt` are NOT a guarantee; None where exact
    GDP holds, under `replace_one`, where a stage has no noise, and beyond mu = 50.
    """

    round: int
    epsilon_pld: float
    epsilon_rdp: float | None
    mu: float | None
    epsilon_gdp: float | None
    mu_clt: float | None
    epsilon_clt: float | None


@dataclass(frozen=True)
class CompositionPart:
    """One part of the whole plan's composition. Squares of mu add up over the parts (Dong et al. 2019, cor. 3.3).

    `mu` is exact Gaussian DP, None under sub-sampling; `mu_clt` its approximation there, never a guarantee.
    """

    name: str
    events: str
    mu: float | None
    mu_clt: float | None


@dataclass(frozen=True)
class SigmaCurve:
    """The budget per round with one noise multiplier of the rounds; stage 1 keeps its ratio to it.

    `grid_error` estimates by how much `epsilon_pld` of a round before the last can lie above the finest grid's
    value (it never lies below the truth); the last round's is the plan's own number.
    """

    noise_multiplier: float
    stage1_noise_multiplier: float
    points: tuple[BudgetPoint, ...]
    parts: tuple[CompositionPart, ...]
    grid_error: float

    @property
    def last(self) -> BudgetPoint:
        return self.points[-1]


@dataclass(frozen=True)
class PrivacyCurves:
    """Accumulated budgets of a plan for several noise multipliers. Public facts only.

    `staircase`: the budget moves only when a client's next release can happen (capped cohorts).
    """

    delta: float
    relation: Relation
    observer: str
    assumption: str
    staircase: bool
    curves: tuple[SigmaCurve, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite epsilon is the string "inf". Names the accountants that are guarantees."""
        guarantees = {accountant.field: accountant.is_guarantee for accountant in ACCOUNTANTS}
        found: dict[str, Any] = _json_ready({**asdict(self), "is_guarantee": guarantees})
        return found


def budget_curves(
    plan: PrivacyPlan,
    noise_multipliers: Iterable[float] | None = None,
    *,
    observer: str | None = None,
    relation: Relation | None = None,
) -> PrivacyCurves:
    """The budget after each round of `plan` for each of `noise_multipliers` (None: the plan's own).

    At most 25 rounds are evaluated where a round is sub-sampled, always the first and the last. `observer` is
    "server", "clients" or "public" (None: the one whose epsilon the plan bounds), `relation` either adjacency
    (None: the plan's). Under central trust the server has no guarantee: its epsilons are infinite.

    Raises:
      PrivacyError: no, too many or impossible noise multipliers; an unknown observer or adjacency.
    """
    observer, relation = chosen_view(plan, observer, relation)
    sigmas = _sigmas(plan, noise_multipliers)
    return PrivacyCurves(
        delta=plan.delta,
        relation=relation,
        observer=observer,
        assumption=plan.guarantee(observer, ()).assumption,
        staircase=plan.capped,
        curves=tuple(_curve(_with_sigma(plan, sigma), observer, relation) for sigma in sigmas),
    )


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


def events_text(events: Iterable[Event]) -> str:
    """The events in words, e.g. "20 x Gaussian(sigma = 0.997), Poisson q = 0.05"."""
    texts = []
    for event in merge(events):
        match event:
            case NonPrivateEvent():
                text = "release without noise"
            case PoissonGaussianEvent() if event.sampling_rate < 1:
                text = f"Gaussian(sigma = {event.noise_multiplier:.4g}), Poisson q = {event.sampling_rate:g}"
            case _:
                text = f"Gaussian(sigma = {event.noise_multiplier:.4g})"
        texts.append(f"{event.count} x {text}")
    return " + ".join(texts) or "nothing"


def mu_conversion(mus: Sequence[float], delta: float) -> tuple[tuple[float, float], ...]:
    """(mu, epsilon) pairs: what mu-GDP is worth as (epsilon, delta)-DP, exactly (Balle & Wang 2018, thm. 8)."""
    return tuple((mu, epsilon_gaussian(mu, delta)) for mu in mus)


def _sigmas(plan: PrivacyPlan, wanted: Iterable[float] | None) -> list[float]:
    if wanted is None:
        return [plan.noise_multiplier]
    sigmas = sorted(set(wanted))
    if "round" in plan.non_private:
        raise PrivacyError("Noise multipliers are given, but the plan's rounds have no noise: leave them out.")
    if not 1 <= len(sigmas) <= _MAX_SIGMAS:
        raise PrivacyError(f"{len(sigmas)} noise multipliers are given; a figure shows 1 to {_MAX_SIGMAS}: name fewer.")
    for sigma in sigmas:
        if not 0 < sigma < math.inf:
            raise PrivacyError(
                f"The noise multiplier {sigma} is impossible; it must be positive and finite: 1 is usual."
            )
    return sigmas


def _with_sigma(plan: PrivacyPlan, sigma: float) -> PrivacyPlan:
    """The same plan with another noise; stage 1 keeps its ratio. Without a target, which it may miss."""
    if sigma == plan.noise_multiplier:
        return plan
    stage1 = plan.stage1_noise_multiplier * (sigma / plan.noise_multiplier)
    return replace(plan, noise_multiplier=sigma, stage1_noise_multiplier=stage1, target_epsilon=None)


def _curve(plan: PrivacyPlan, observer: str, relation: Relation) -> SigmaCurve:
    whole = composed_events(plan, observer)
    closed_form = gdp_mu(whole, relation) is not None
    rounds = _chosen_rounds(plan, _MAX_EXACT_POINTS if closed_form else _MAX_POINTS)
    events = {number: composed_events(plan, observer, number) for number in rounds}
    epsilons = epsilons_pld(list(events.values()), plan.gaussian_delta, relation, _INTERVAL)
    error = 0.0
    if not closed_form:
        coarse = epsilons_pld(list(events.values()), plan.gaussian_delta, relation, _CHECK_INTERVAL)
        # The grid's error falls with the square of its interval: the difference is 99 times what is left.
        pairs = [(c, e) for c, e in zip(coarse, epsilons, strict=True) if math.isfinite(c)]
        error = max([0.0, *(c - e for c, e in pairs)]) / 99
    epsilons[-1] = epsilon_pld(whole, plan.gaussian_delta, relation)
    for i in range(len(epsilons) - 2, -1, -1):
        epsilons[i] = min(epsilons[i], epsilons[i + 1])  # a part never costs more than the whole
    points = (
        _point(number, epsilon, events[number], plan.gaussian_delta, relation)
        for number, epsilon in zip(rounds, epsilons, strict=True)
    )
    return SigmaCurve(
        plan.noise_multiplier, plan.stage1_noise_multiplier, tuple(points), _parts(plan, observer, relation), error
    )


def _chosen_rounds(plan: PrivacyPlan, most: int) -> list[int]:
    """0 where there is a stage 1, then all rounds or `most` of them, the first and the last among them.

    The early ones stand closer: there the budget grows fastest.
    """
    last = plan.rounds
    chosen = set(range(1, last + 1))
    if last > most:
        chosen = {1 + round((last - 1) * (i / (most - 1)) ** 1.5) for i in range(most)}
    return ([0] if plan.stage1_rate > 0 else []) + sorted(chosen)


def _point(number: int, epsilon: float, events: tuple[Event, ...], delta: float, relation: Relation) -> BudgetPoint:
    mu, limit = gdp_mu(events, relation), clt_limit(events, relation)
    return BudgetPoint(
        round=number,
        epsilon_pld=epsilon,
        epsilon_rdp=epsilon_rdp(events, delta, relation),
        mu=mu,
        epsilon_gdp=None if mu is None else epsilon_gaussian(mu, delta),
        mu_clt=limit,
        epsilon_clt=None if limit is None else epsilon_gaussian(limit, delta),
    )


def clt_limit(events: tuple[Event, ...], relation: Relation) -> float | None:
    """The central limit's mu. None beyond 50, where it has left every reality."""
    if gdp_mu(events, relation) is not None or relation == "replace_one":
        return None
    mu = clt_mu(events)
    return None if mu is None or mu > 50 else mu


def _parts(plan: PrivacyPlan, observer: str, relation: Relation) -> tuple[CompositionPart, ...]:
    """Stage 1 and the rounds by themselves where both compose; capped cohorts: the blocks, of which each pays once."""

    def part(name: str, events: tuple[Event, ...]) -> CompositionPart:
        return CompositionPart(name, events_text(events), gdp_mu(events, relation), clt_limit(events, relation))

    if plan.capped:
        blocks = f"{len(plan.blocks)} blocks of slots" if len(plan.blocks) > 1 else "one block of slots"
        return tuple(part(f"{blocks}, the dearest slot of each", (event,)) for event in composed_events(plan, observer))
    schedule = plan.schedule()
    found = []
    for stage in get_args(Stage):
        slots = {slot: charge for slot, charge in schedule.items() if plan.stage(slot) == stage}
        if slots:
            name = "stage 1" if stage == "stage1" else f"rounds 1 to {plan.rounds}"
            events = plan.composition(observer, slots)
            found.append(part(name, (NonPrivateEvent(),) if events is None else events))
    return tuple(found)


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
