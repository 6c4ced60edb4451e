"""The whole run in the view of those who see all of it: canary clients take part as the recipe's own sampler says.

Legend: N followed clients, T slots.

N clients are in or out by a coin each, for the whole run. A client that is in answers whenever it is asked; one that is out sends
nothing of its own. The attacker sees every release of the run and does not know secret cohorts. With x_t a client's part of release t in units
of the clip, r the length of its contribution and q_t the chance to be asked, the most telling score is the logarithm of the
likelihood ratio (Neyman and Pearson 1933),

    sum over t of log(1 - q_t + q_t exp((r x_t - r^2 / 2) / s_t^2)).

Where nothing is sub-sampled it is Gaussian, and all bounds of `observers` apply. Else the composition is not mu-GDP, and the bound is
`clopper_pearson_bound.epsilon_from_errors` at a threshold that is chosen on simulated scores of the promised mechanism, before any
score is seen.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from drencoder.audit.canaries import Planted, crafted, draw_coins, num_directions
from drencoder.audit.clopper_pearson_bound import epsilon_from_errors
from drencoder.audit.observers import ALARM, LEVELS, View, measure
from drencoder.audit.scores import CanaryScores, Floats
from drencoder.audit.trials import QueryMaker, Trial, Trials, trial_values
from drencoder.federated.query import Query
from drencoder.privacy.accounting import GaussianEvent, Relation, epsilon_pld, gdp_mu
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.plan import PrivacyPlan
from drencoder.rng import derive_seed

__all__ = ["audit_run", "has_more_than_one_release"]

_MOST_SLOTS = {
    "local": 1000,
    "central": 1500,
    "secure-aggregation": 60,
}  # of all runs; a secure one takes half a second
_SIMULATED = 20_000
_ADD_REMOVE: Relation = "add_remove"


def has_more_than_one_release(plan: PrivacyPlan) -> bool:
    """Whether a client can be in more than one release, so that the whole run tells more than one of them."""
    return len(plan.slots) > 1 if plan.trust == "central" else len(plan.blocks) > 1


def audit_run(
    trials: Trials,
    queries: QueryMaker,
    plan: PrivacyPlan,
    *,
    canaries: int,
    seed: int,
) -> View | None:
    """Whole runs of the plan until so many clients were followed; None where the view is not promised anything."""
    observer = plan.budget_observer if plan.trust != "secure-aggregation" else "server"
    events = plan.composition(observer, plan.schedule())
    if not events or plan.non_private:
        return None
    room = min(num_directions(queries(slot)) for slot in (plan.slots[0], plan.slots[-1]))
    most = (
        canaries if plan.trust == "local" else min(canaries, room)
    )  # of a sum every canary needs a direction of its own
    most_runs = max(1, _MOST_SLOTS[plan.trust] // len(plan.slots))
    score_parts: list[Floats] = []
    coin_parts: list[npt.NDArray[np.bool_]] = []
    followed = 0
    while followed < canaries and len(score_parts) < most_runs:
        following = _Following(plan, min(most, canaries - followed), seed, len(score_parts))
        for trial in trials.of_one_run(queries, plan.slots, following.plant, following.choose):
            following.add(trial)
        score_parts.append(following.score_N)
        coin_parts.append(following.coin_N)
        followed += len(following.coin_N)
    score_N, coin_N = np.concatenate(score_parts), np.concatenate(coin_parts)
    if min(int(coin_N.sum()), int((~coin_N).sum())) < 2:
        return None
    words = {"observer": observer, "sees": f"all {len(plan.slots)} releases of the run", "canary": "worst case"}
    mu = gdp_mu(events, _ADD_REMOVE)
    if mu is not None:
        return measure(
            CanaryScores.of(2 * score_N / mu**2, coin_N),
            relation=_ADD_REMOVE,
            mu=mu,
            delta=plan.gaussian_delta,
            **words,
        )
    threshold = _best_threshold(plan, canaries, seed)
    scores = CanaryScores.of(score_N - threshold, coin_N)
    promised = epsilon_pld(events, plan.gaussian_delta, _ADD_REMOVE)
    bounds = {
        "any": {level: epsilon_from_errors(scores, plan.gaussian_delta, error) for level, error in LEVELS.items()}
    }
    exceeded = ("any",) if epsilon_from_errors(scores, plan.gaussian_delta, ALARM) > promised else ()
    return View(
        relation=_ADD_REMOVE, inside=scores.inside.size, outside=scores.outside.size, promised=promised, delta=plan.gaussian_delta,
        estimate=_from_rates(scores, plan.gaussian_delta), bounds=bounds, exceeded=exceeded, found=scores.power_at_one_percent, **words,
        note="sub-sampled: no test of so few canaries comes near the promise",
    )  # fmt: skip


@final
class _Following:
    """The followed clients of one run, and the sum of their log likelihood ratios."""

    def __init__(self, plan: PrivacyPlan, most: int, seed: int, run: int) -> None:
        self._plan, self._most, self._seed, self._run = plan, most, seed, run
        self._clients: Sequence[int] = ()
        self._places: list[int] = []
        self.coin_N: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self.score_N: Floats = np.zeros(0)

    def choose(self, ledger: Ledger) -> None:
        """Follows clients that nobody chose by what they do; where cohorts are no secret, those that are asked most often."""
        plan = self._plan
        if plan.capped:
            asked = Counter(client for slot in plan.slots for client in ledger.sampler().cohort(slot))
            often = max(asked.values(), default=0)
            self._clients = sorted(client for client, times in asked.items() if times == often)[: self._most]
        else:
            most = min(self._most, plan.population)
            first = derive_seed(self._seed, "audit-followed", self._run) % (plan.population - most + 1)
            self._clients = range(first, first + most)
        self.coin_N = draw_coins(self._seed, len(self._clients), -1, self._run)
        self.score_N = np.zeros(len(self._clients))

    def plant(self, query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        """All followed clients of the cohort are canaries. Under central trust the others have canaries' directions, too, and are out."""
        asked, room = set(cohort), num_directions(query)
        self._places = [place for place, client in enumerate(self._clients) if client in asked]
        here = [self._clients[place] for place in self._places]
        answering = cohort if permit.shares is not None else here
        return crafted(here, self.coin_N[self._places], answering, directions=[place % room for place in self._places])

    def add(self, trial: Trial) -> None:
        """Adds what one release says about each followed client."""
        plan, slot = self._plan, trial.query.spec.slot
        if plan.trust == "central":
            event = plan.event(slot)
            x_N, length = _along_directions(trial, len(self._clients))
            exponent_N = (length * x_N - length**2 / 2) / event.noise_multiplier**2  # type: ignore[union-attr]
            rate = plan.rate(slot)
            self.score_N += np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + exponent_N)
            return
        if not self._places:
            return
        own_NV, clip = trial.own_NV.double(), trial.query.spec.clip_l2
        length_N = own_NV.norm(dim=1)
        values = trial_values(trial, "messages" if plan.trust == "local" else "sum").double()
        along_N = ((values if values.dim() == 2 else values[None]) * own_NV).sum(1) / length_N
        variance = self._variance(slot, trial.contributors)
        self.score_N[self._places] += ((length_N * along_N - length_N**2 / 2) / (clip**2 * variance)).numpy()

    def _variance(self, slot: int, contributors: int) -> float:
        """Of the noise that the accounting promises in this view, in squared clips."""
        (event,) = self._plan.composition("server", {slot: (1, contributors)}) or ()
        assert isinstance(event, GaussianEvent)
        return float(event.noise_multiplier**2)


def _along_directions(trial: Trial, count: int) -> tuple[Floats, float]:
    """The released sum along the direction of each followed client (N,), in units of the clip, and a contribution's length in the same unit.

    Crafted codes are unit vectors times the clip wherever the sum is one of codes, so no client's update need be encoded.
    """
    everybody = crafted(range(count), np.ones(count, dtype=bool), ())
    room, clip = num_directions(trial.query), trial.query.spec.clip_l2
    values = trial_values(trial, "sum").double()
    shown = Trial(
        trial.query, crafted(range(min(count, room, 2)), np.ones(min(count, room, 2), dtype=bool), ()), trial.permit, (),
        trial.released, trial.expected_cohort, None,
    )  # fmt: skip
    if trial.sums_codes and trial.query.spec.kind == "update" and trial.query.spec.adaptive_clip is None:
        own_NV = shown.own_NV.double()
        if bool((own_NV.diagonal().abs() > 0.999 * clip).all()):
            return (values[np.arange(count) % room] / clip).numpy(), 1.0
    shown = Trial(trial.query, everybody, trial.permit, (), trial.released, trial.expected_cohort, None)
    own_NV = shown.own_NV.double()
    if trial.query.spec.adaptive_clip is not None:
        own_NV[:, -1] = 0.0  # common to all of a sum
    length_N = own_NV.norm(dim=1)
    return ((own_NV @ values) / length_N / clip).numpy(), float(length_N.mean()) / clip


def _best_threshold(plan: PrivacyPlan, canaries: int, seed: int) -> float:
    """The threshold under which simulated scores of the promised mechanism give the largest bound."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "audit-threshold")))
    totals = {}
    for inside in (True, False):
        total_N = np.zeros(_SIMULATED)
        for slot in plan.slots:
            event, rate = plan.event(slot), plan.rate(slot)
            sigma = event.noise_multiplier  # type: ignore[union-attr]
            asked_N = generator.random(_SIMULATED) < rate if inside else np.zeros(_SIMULATED, dtype=bool)
            x_N = asked_N + sigma * generator.standard_normal(_SIMULATED)
            total_N += np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (x_N - 0.5) / sigma**2)
        totals[inside] = total_N
    half = max(2, canaries // 2)
    best = max(
        np.quantile(totals[False], np.linspace(0.5, 0.999, 40)),
        key=lambda cut: epsilon_from_errors(_expected(totals, cut, half), plan.gaussian_delta, LEVELS["95"]),
    )
    return float(best)


def _expected(totals: dict[bool, Floats], cut: float, half: int) -> CanaryScores:
    """Scores of `half` canaries on each side with the error rates of the simulation."""
    sides = []
    for inside in (True, False):
        above = round(half * float((totals[inside] >= cut).mean()))
        sides.append(np.concatenate([np.ones(above), -np.ones(half - above)]))
    return CanaryScores(sides[0], sides[1])


def _from_rates(scores: CanaryScores, delta: float) -> float:
    """Epsilon at the measured error rates, which is no bound; 0 where there was no false alarm to measure."""
    alarms, hits = float((scores.outside >= 0).mean()), float((scores.inside >= 0).mean())
    return math.log(max(1.0, (hits - delta) / alarms)) if alarms else 0.0
