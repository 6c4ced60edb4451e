"""What each observer can tell about the canaries of the recipe's own releases: a lower bound on epsilon beside the promise.

Legend: N canaries.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from torch import Tensor

from drencoder.audit.canaries import (
    Plant,
    Planted,
    crafted,
    draw_coins,
    num_directions,
    record_canaries,
    spread_over_sites,
)
from drencoder.audit.clopper_pearson_bound import gdp_mu_from_errors
from drencoder.audit.gaussian_bound import gaussian_mu
from drencoder.audit.one_run_bound import one_run_mu
from drencoder.audit.scores import CanaryScores
from drencoder.audit.trials import QueryMaker, Seen, Trial, Trials, known_cohort, score_trial
from drencoder.federated.query import Query
from drencoder.privacy.accounting import Relation, epsilon_gaussian, gdp_mu
from drencoder.privacy.ledger import Permit
from drencoder.privacy.plan import PrivacyPlan

LEVELS = {"95": 0.05, "99.9": 0.001}
"""Confidence in per cent, as it is reported, and the error that it allows."""

ALARM = 1e-6
"""The error of the bound that an alarm rests on: an audit has about a hundred bounds and must not cry wolf."""

_SAMPLED = "or, under a secret draw, Gaussian and sub-sampled at the plan's rates"
BOUNDS = {
    "gaussian": f"scores are independent and Gaussian, {_SAMPLED}",
    "gdp": f"scores are independent; the release is Gaussian differentially private, {_SAMPLED}",
    "one_run": f"the coins are fair; the release is Gaussian differentially private, {_SAMPLED}",
    "any": "scores are independent; any (epsilon, delta) mechanism",
}
"""Name of a bound and what it assumes."""

REAL_RECORDS = "real records"
"""The canaries of a view that is about clients' own records, and so has numbers about them without noise."""

_SECURE_RECORDS = 16  # a round of secure aggregation for each

_MU: dict[str, Callable[[CanaryScores, float], float]] = {
    "gaussian": gaussian_mu,
    "gdp": gdp_mu_from_errors,
    "one_run": one_run_mu,
}


@final
@dataclass(frozen=True)
class View:
    """One observer's view of one kind of canary.

    Args:
      observer: server, clients or public.
      sees: what is scored, in words.
      canary: which canaries, in words.
      relation: the adjacency: a canary that is out sends nothing, or another update.
      inside, outside: how many canaries were in and out.
      promised: epsilon of this view at `delta`, from the accounting.
      delta: at which all epsilons here are.
      estimate: epsilon at the measured mean and spread, which is no bound.
      bounds: bound -> confidence -> largest epsilon that is rejected.
      exceeded: bounds that pass the promise even at the error `ALARM`.
      found: the share of the canaries that were in and score above 99 of 100 that were out.
    """

    observer: str
    sees: str
    canary: str
    relation: Relation
    inside: int
    outside: int
    promised: float
    delta: float
    estimate: float
    bounds: dict[str, dict[str, float]]
    exceeded: tuple[str, ...]
    found: float
    note: str = ""

    @property
    def failure(self) -> str:
        """One sentence where the promise was measured not to hold; empty else."""
        if not self.exceeded:
            return ""
        worst = max(self.bounds[name]["99.9"] for name in self.exceeded)
        return (
            f"The {self.observer} can tell more than was promised ({self.sees}, {self.canary}): epsilon is at least {_number(worst)} with 99.9 % "
            f"confidence, and {self.promised:.2f} was promised."
        )


def _number(value: float) -> str:
    return "any number" if math.isinf(value) else f"{value:.2f}"


def measure(
    scores: CanaryScores,
    *,
    observer: str,
    sees: str,
    canary: str,
    relation: Relation,
    mu: float,
    delta: float,
    note: str = "",
) -> View:
    """The view of these scores where the promise is `mu`-Gaussian differential privacy."""
    bounds = {
        name: {level: epsilon_of(bound(scores, error), delta) for level, error in LEVELS.items()}
        for name, bound in _MU.items()
    }
    exceeded = tuple(name for name, bound in _MU.items() if bound(scores, ALARM) > mu * (1 + 1e-9))
    return View(
        observer, sees, canary, relation, scores.inside.size, scores.outside.size, epsilon_gaussian(mu, delta), delta,
        epsilon_of(_mu_estimate(scores), delta), bounds, exceeded, scores.power_at_one_percent, note,
    )  # fmt: skip


def epsilon_of(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP release; infinite where it is too large for the formula."""
    return math.inf if mu > 60 else epsilon_gaussian(mu, delta)


def _mu_estimate(scores: CanaryScores) -> float:
    spread, mean = float(scores.mirrored.std(ddof=1)), float(scores.mirrored.mean())
    return math.inf if spread == 0 and mean > 0 else max(0.0, 2 * mean / max(spread, 1e-300))


# --- one release -------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Release:
    """What to audit of one stage: its slots, its queries, and in words what it is."""

    slots: Sequence[int]
    queries: QueryMaker
    words: str


def audit_releases(
    trials: Trials,
    release: Release,
    plan: PrivacyPlan,
    *,
    canaries: int,
    seed: int,
    replace_one: bool = False,
) -> tuple[list[View], list[Trial]]:
    """Releases with crafted canaries until so many were scored, in the view of everybody who is promised something.

    Returns the views and the trials.
    """
    done: list[Trial] = []
    count = 0
    plant = _crafted_plant(plan, canaries, seed, replace_one)
    for trial in trials.without_end(release.queries, release.slots, plant):
        if trial.planted.clients:
            done.append(trial)
            count += len(trial.planted.clients)
        if count >= canaries and len(done) >= 2:
            break
    return list(_views(done, release, plan)), done


def _crafted_plant(plan: PrivacyPlan, canaries: int, seed: int, replace_one: bool) -> Plant:
    planted = 0

    def plant(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        nonlocal planted
        # At least two trials, so that noise which comes twice is seen.
        half, room = max(1, -(-canaries // 2)), num_directions(query)
        planted += 1
        if plan.curated:
            units = range(min(room, math.ceil(half / plan.rate(query.spec.slot))))
            coin_N = draw_coins(seed, len(units), query.spec.slot, planted)
            homes = spread_over_sites(len(units), cohort[:-1])  # the last one looks on
            return crafted(units, coin_N, cohort, replace_one=replace_one, site_of=homes)
        clients = cohort[: min(room, half)]
        coin_N = draw_coins(seed, len(clients), query.spec.slot, planted)
        answering = cohort if permit.shares is not None else clients
        return crafted(clients, coin_N, answering, replace_one=replace_one)

    return plant


def _views(trials: Sequence[Trial], release: Release, plan: PrivacyPlan) -> Iterator[View]:
    relation: Relation = "replace_one" if trials[0].planted.replace_one else "add_remove"
    for observer, seen, sees in _observers(trials[0], plan):
        mus = []
        for trial in trials:
            events = known_cohort(plan, observer, trial.query.spec.slot, trial.contributors)
            mus.append(None if events is None else gdp_mu(events, relation))
        known = [mu for mu in mus if mu is not None]
        if len(known) < len(trials):
            continue
        scores = CanaryScores.of(
            np.concatenate([score_trial(trial, seen) for trial in trials]),
            np.concatenate([trial.planted.coin_N for trial in trials]),
        )
        yield measure(
            scores, observer=observer, sees=f"{sees} of {release.words}", canary="worst case", relation=relation,
            mu=max(known), delta=plan.gaussian_delta,
        )  # fmt: skip


def _observers(trial: Trial, plan: PrivacyPlan) -> Iterator[tuple[str, Seen, str]]:
    """(observer, what is scored, the same in words) for all that leaves in this trial and is promised something about."""
    if plan.trust == "local":
        yield "server", "messages", f"a {'site' if plan.curated else 'client'}'s message"
        if not trial.sums_codes:  # then clients do not hide behind each other, and the sum tells less than the messages
            return
    who = "server" if plan.trust == "secure-aggregation" else "public"
    yield who, "sum", "the released sum"
    if plan.curated:
        own = "message" if plan.trust == "local" else "share of noise"
        yield "clients", "sum of others", f"the released sum, of which a site knows its own {own},"
    if trial.step_D is not None and trial.sums_codes:
        yield "public", "adapter", "the adapter's step"


# --- real records ------------------------------------------------------------------------------------


def audit_records(
    trials: Trials, queries: QueryMaker, plan: PrivacyPlan, update_ND: Tensor, *, seed: int
) -> Iterator[View]:
    """The same views with real records as canaries (N, D): all in one round where messages are seen, one in each release otherwise.

    Alone in its release, a record meets an attacker who knows all others.
    """
    alone, done, count = plan.trust != "local", [], 0
    most = min(len(update_ND), _SECURE_RECORDS if plan.trust == "secure-aggregation" else len(update_ND))
    coin_N = draw_coins(seed, len(update_ND), -3)

    def plant(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        stop = count + (1 if alone else most - count)
        rows, coins = update_ND[count:stop], coin_N[count:stop]
        return record_canaries(plan, cohort, rows, coins, everybody_answers=permit.shares is not None)

    for trial in trials.without_end(queries, [slot for slot in plan.slots if slot > 0], plant):
        count += len(trial.planted.clients)
        done += [trial] if trial.planted.clients else []
        if count >= most:
            break
    words = Release((), queries, "a round")
    share = float(np.mean([float(trial.own_NV.norm(dim=1).mean()) / trial.query.spec.clip_l2 for trial in done]))
    for view in _views(done, words, plan):
        if "adapter" not in view.sees and (plan.trust != "local" or view.observer == "server"):
            yield replace(view, canary=REAL_RECORDS, note=f"codes are {share:.0%} of the clip long")
