"""The whole run in the view of those who see all of it: canary clients take part as the recipe's own sampler says.

Legend: N followed clients, or units of sites, T slots.

N clients are in or out by a coin each, for the whole run. A client that is in answers whenever it is asked; one that is out sends
nothing of its own. The attacker sees every release of the run and does not know secret cohorts. With x_t a client's part of release t in units
of the clip, r the length of its contribution and q_t the chance to be asked, the most telling score is the logarithm of the
likelihood ratio (Neyman and Pearson 1933),

    sum over t of log(1 - q_t + q_t exp((r x_t - r^2 / 2) / s_t^2)).

Where nothing is sub-sampled it is Gaussian, and all bounds of `observers` apply. Else the composition is not mu-GDP, and the bounds are
those of `sampled_bounds`, and `clopper_pearson_bound.epsilon_from_errors`, which assumes nothing of the mechanism, at a threshold that is
chosen on simulated scores of the promised mechanism, before any score is seen.

A unit of a site is in it for the whole run, or is no unit of it; the site's curator draws among those that it has. The promise is what a
certificate says of the worst site: one that was asked in every slot.

Every observer is followed with its own bytes: the server with messages or sums, the public under every trust with the states that a run
publishes after each round, which tell the sums (`released_states`). Where what is promised counts contributors, those that these runs had are
counted, as a certificate does. Under local trust few clients answer together: the more noises hide each other in a sum, the less there is to
measure of what the public is promised. All rounds are followed also where a cap lets nobody be in two of them: that is what shows whether the
cap is kept. The noise of all rounds is added up, too, since it could be loud in each and cancel over the run.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.audit.canaries import Planted, crafted, draw_coins, num_directions, spread_over_sites
from drencoder.audit.clopper_pearson_bound import epsilon_from_errors
from drencoder.audit.noise_checks import Check, check_run_noise
from drencoder.audit.observers import ALARM, LEVELS, View, measure
from drencoder.audit.released_states import PublishedRun
from drencoder.audit.sampled_bounds import SampledFamily, log_ratio
from drencoder.audit.scores import CanaryScores, Floats
from drencoder.audit.trials import QueryMaker, Seen, Trial, Trials, promised_std, telling_values, trial_values
from drencoder.federated.query import Query
from drencoder.privacy.accounting import Event, NonPrivateEvent, PoissonGaussianEvent, Relation, epsilon_pld, gdp_mu
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.plan import PrivacyPlan
from drencoder.rng import derive_seed

_MOST_SLOTS = {
    "local": 1000,
    "central": 1500,
    "secure-aggregation": 60,
}  # of all runs; a secure one takes half a second
_TOGETHER = 4  # the fewest clients in a sum of local trust
_LOCAL_SLOTS = 250  # of local trust, in which all canaries are to be followed
_ADD_REMOVE: Relation = "add_remove"
_AT_ONCE = 256  # codes


def follows_runs(plan: PrivacyPlan) -> bool:
    """Whether there are several releases to put together. Units of sites are followed in any case: only so is the draw a secret."""
    return plan.curated or len(plan.slots) > 1


def audit_run(
    trials: Trials, queries: QueryMaker, plan: PrivacyPlan, *, canaries: int, seed: int
) -> tuple[list[View], list[Check]]:
    """Whole runs of the plan until so many clients were followed; nothing where nothing is promised, or there is nobody to compare with."""
    if plan.non_private or not all(plan.composition(who, plan.schedule()) for who, _ in _onlookers(plan)):
        return [], []
    room = min(num_directions(queries(slot)) for slot in (plan.slots[0], plan.slots[-1]))
    most = min(canaries, room)  # of a sum every canary needs a direction of its own
    most_runs = max(1, _MOST_SLOTS[plan.trust] // len(plan.slots))
    runs: list[_Following] = []
    while sum(len(run.coin_N) for run in runs) < canaries and len(runs) < most_runs:
        published = PublishedRun(trials.recipe.server, plan, trials.adapter_D)
        following = _Following(
            plan, published, min(most, canaries - sum(len(run.coin_N) for run in runs)), canaries, seed, len(runs)
        )
        for trial in trials.of_one_run(queries, plan.slots, following.plant, following.choose):
            following.add(trial)
        runs.append(following)
    score_ON = np.concatenate([run.score_ON for run in runs], axis=1)
    return _views(plan, score_ON, runs, canaries, seed), [*_check_cap(plan, runs), *_check_noise(runs)]


def _check_cap(plan: PrivacyPlan, runs: "Sequence[_Following]") -> list[Check]:
    """Where cohorts are no secret: whether anybody is asked more often than the plan charges each client for."""
    if plan.curated or not plan.capped:
        return []
    often, cap = max(run.often for run in runs), len(plan.blocks)
    found = f"Nobody was asked in more than {often} of {len(plan.slots)} releases of a run, and each pays for {cap}"
    return [Check("clients are asked no more often than was charged", often <= cap, f"{found}.")]


def _check_noise(runs: "Sequence[_Following]") -> list[Check]:
    rows = [run.rest_V / math.sqrt(run.rounds) for run in runs if run.rest_V is not None and run.rounds > 1]
    return [check_run_noise(torch.stack(rows), runs[0].rounds)] if rows else []


def _views(plan: PrivacyPlan, score_ON: Floats, runs: "Sequence[_Following]", canaries: int, seed: int) -> list[View]:
    coin_N = np.concatenate([run.coin_N for run in runs])
    if min(int(coin_N.sum()), int((~coin_N).sum())) < 2:
        return []
    charged, views = plan.schedule(), []
    if plan.capped:  # contributors are no secret; where nobody came in any run, nobody was followed
        came = {slot: [run.contributors[slot] for run in runs if run.contributors[slot]] for slot in plan.slots}
        charged = {slot: (1, min(counts)) for slot, counts in came.items() if counts}
    for score_N, (observer, seen) in zip(score_ON, _onlookers(plan), strict=True):
        events = plan.composition(observer, charged)
        words = {"observer": observer, "sees": _words(plan, seen), "canary": "worst case"}
        mu = gdp_mu(events or (), _ADD_REMOVE)
        if mu is None:
            views.append(_sampled_view(plan, CanaryScores.of(score_N, coin_N), events or (), canaries, seed, words))
        else:
            scores = CanaryScores.of(2 * score_N / mu**2, coin_N)
            views.append(measure(scores, relation=_ADD_REMOVE, mu=mu, delta=plan.gaussian_delta, **words))
    return views


def _onlookers(plan: PrivacyPlan) -> list[tuple[str, Seen]]:
    """Who looks on, and what is scored."""
    if plan.trust == "central":
        return [("public", "states")]
    onlookers: list[tuple[str, Seen]] = [("server", "messages" if plan.trust == "local" else "sum")]
    if plan.curated:
        onlookers.append(("clients", "sum of others"))
    return [*onlookers, ("public", "states")]


def _words(plan: PrivacyPlan, seen: Seen) -> str:
    what = f"all {len(plan.slots)} releases of the run"
    own = "message" if plan.trust == "local" else "share of noise"
    parts = {
        "messages": "each site by itself",
        "sum of others": f"sums, of which a site knows its own {own}",
        "sum": "sums",
        "states": "computed back from what it publishes",
    }
    return f"{what} ({parts[seen]})" if plan.curated or seen == "states" else what


def _sampled_view(
    plan: PrivacyPlan,
    scores: CanaryScores,
    events: tuple[Event, ...],
    canaries: int,
    seed: int,
    words: Mapping[str, str],
) -> View:
    delta = plan.gaussian_delta
    slots = [event for event in events if isinstance(event, PoissonGaussianEvent) for _ in range(event.count)]
    family = SampledFamily(tuple(replace(event, count=1) for event in slots), delta, seed)
    threshold = _best_threshold(family, canaries)
    moved = CanaryScores(scores.inside - threshold, scores.outside - threshold)
    bounds: dict[str, dict[str, float]] = {name: {} for name in ("gaussian", "gdp", "one_run", "any")}
    for level, error in LEVELS.items():
        for name, epsilon in (family.bounds(scores, error) | {"any": epsilon_from_errors(moved, delta, error)}).items():
            bounds[name][level] = epsilon
    promised = epsilon_pld(events, delta, _ADD_REMOVE)
    exceeded = family.exceeded(scores, ALARM)
    exceeded += ("any",) if epsilon_from_errors(moved, delta, ALARM) > promised else ()
    return View(
        relation=_ADD_REMOVE, inside=scores.inside.size, outside=scores.outside.size, promised=promised, delta=delta,
        estimate=_from_rates(moved, delta), bounds=bounds, exceeded=exceeded, found=scores.power_at_one_percent, **words,
        note="sub-sampled by a draw that the attacker does not know",
    )  # fmt: skip


@final
class _Following:
    """The followed clients of one run, and the sum of their log likelihood ratios.

    `rest_V` is the noise of all `rounds` of its rounds, added up, in units of what was promised of one: float64 (V,), or None where no
    round's noise can be told from what else is in its sum. `contributors`: slot -> how many there were. `often`: in how many releases a
    client was at most, where cohorts are no secret.
    """

    def __init__(
        self, plan: PrivacyPlan, published: PublishedRun, most: int, canaries: int, seed: int, run: int
    ) -> None:
        self._plan, self._published, self._most, self._canaries, self._seed, self._run = (
            plan, published, most, canaries, seed, run,
        )  # fmt: skip
        self.rest_V: Tensor | None = None
        self.rounds = self.often = 0
        self.contributors: dict[int, int] = {}
        self._clients: Sequence[int] = ()
        self._places: list[int] = []
        self._together: int | None = None  # how many clients answer together, where not all that are asked do
        self.coin_N: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self.score_ON: Floats = np.zeros((0, 0))  # of each onlooker

    def choose(self, ledger: Ledger) -> None:
        """Follows clients that nobody chose by what they do; where cohorts are no secret, those that are asked most often."""
        plan = self._plan
        if plan.curated:
            self._clients = range(self._most)
        elif plan.capped:
            cohorts = [ledger.sampler().cohort(slot) for slot in plan.slots]
            asked = Counter(client for cohort in cohorts for client in cohort)
            self.often = max(asked.values(), default=0)
            clients = sorted(client for client, times in asked.items() if times == self.often)
            if plan.trust == "local":
                enough = max(_TOGETHER, math.ceil(self._canaries * self.often / _LOCAL_SLOTS))
                self._together = min([enough, *(len(cohort) for cohort in cohorts if cohort)])
                clients = _few_of_each(clients, cohorts, self._together)
            self._clients = clients[: self._most]
        else:
            most = min(self._most, plan.population)
            first = derive_seed(self._seed, "audit-followed", self._run) % (plan.population - most + 1)
            self._clients = range(first, first + most)
        self.coin_N = draw_coins(self._seed, len(self._clients), -1, self._run)
        self.score_ON = np.zeros((len(_onlookers(plan)), len(self._clients)))

    def plant(self, query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        """All followed clients of the cohort are canaries. Under central trust the others have canaries' directions, too, and are out."""
        room = num_directions(query)
        if self._plan.curated:
            homes = spread_over_sites(len(self._clients), cohort[:-1])  # the last one looks on
            along = [unit % room for unit in self._clients]
            return crafted(self._clients, self.coin_N, cohort, directions=along, site_of=homes, secret=True)
        asked = set(cohort)
        self._places = [place for place, client in enumerate(self._clients) if client in asked]
        here = [self._clients[place] for place in self._places]
        answering: Sequence[int] = here
        if permit.shares is not None or self._together is not None:
            others = [client for client in cohort if client not in set(here)]
            answering = sorted([*here, *others][: self._together])
        return crafted(here, self.coin_N[self._places], answering, directions=[place % room for place in self._places])

    def add(self, trial: Trial) -> None:
        """Adds what one release says about each followed client."""
        plan, slot = self._plan, trial.query.spec.slot
        self.contributors[slot] = trial.contributors
        seen_of = {seen: self._values(trial, seen) for _, seen in _onlookers(plan)}
        self._add_noise(trial)
        if plan.secret_draw:
            for row, (observer, seen) in enumerate(_onlookers(plan)):
                x_N, length = _along_directions(trial, seen_of[seen], len(self._clients))
                noise = math.sqrt(self._variance(observer, slot, trial.contributors))
                self.score_ON[row] += log_ratio(x_N, length, noise, plan.rate(slot))
            return
        if not self._places:
            return
        for row, (observer, seen) in enumerate(_onlookers(plan)):
            own_NV, clip = telling_values(trial, seen).double(), trial.query.spec.clip_l2
            length_N = own_NV.norm(dim=1)
            along_N = (seen_of[seen] * own_NV).sum(1) / length_N
            variance = self._variance(observer, slot, trial.contributors)
            self.score_ON[row, self._places] += ((length_N * along_N - length_N**2 / 2) / (clip**2 * variance)).numpy()

    def _values(self, trial: Trial, seen: Seen) -> Tensor:
        return (self._published.next_sum(trial) if seen == "states" else trial_values(trial, seen)).double()

    def _add_noise(self, trial: Trial) -> None:
        """Adds a round's noise to that of the rounds before, where the sum is one of codes that were noised, or the server's own."""
        spec, of_codes = trial.query.spec, trial.sums_codes and trial.query.spec.noise_in == "code"
        if spec.kind != "update" or not trial.contributors or not (of_codes or self._plan.trust == "central"):
            return
        sent_V = _sum_of_codes(trial, self.coin_N) if self._plan.curated else _sum_of_planted(trial)
        rest_V = (trial.released.release.value.double() - sent_V) / promised_std(trial, "sum")
        self.rest_V = rest_V if self.rest_V is None else self.rest_V + rest_V
        self.rounds += 1

    def _variance(self, observer: str, slot: int, contributors: int) -> float:
        """Of the noise that the accounting promises in this view, in squared clips."""
        (event,) = self._plan.composition(observer, {slot: (1, contributors)}) or ()
        assert not isinstance(event, NonPrivateEvent)
        return float(event.noise_multiplier**2)


def _few_of_each(clients: Sequence[int], cohorts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Of `clients`, in their order, as many as put no more than `most` into a cohort."""
    places_of: dict[int, list[int]] = {client: [] for client in clients}
    for place, cohort in enumerate(cohorts):
        for client in places_of.keys() & set(cohort):
            places_of[client].append(place)
    kept, room = [], [most] * len(cohorts)
    for client, places in places_of.items():
        if all(room[place] for place in places):
            kept.append(client)
            for place in places:
                room[place] -= 1
    return kept


def _sum_of_planted(trial: Trial) -> Tensor:
    """What the canaries put into a sum (V,), float64."""
    sign_N = trial.planted.signs(range(len(trial.own_NV))).double()
    return sign_N @ trial.own_NV.double()


def _sum_of_codes(trial: Trial, coin_N: npt.NDArray[np.bool_]) -> Tensor:
    """What the units that sites drew put into a sum (V,), float64: place i of `coin_N` is unit i."""
    room = num_directions(trial.query)
    times = Counter(unit % room for unit in trial.joined if coin_N[unit])
    total_V = torch.zeros(trial.released.release.value.numel(), dtype=torch.float64)
    directions = sorted(times)
    for start in range(0, len(directions), _AT_ONCE):
        some = directions[start : start + _AT_ONCE]
        total_V += torch.tensor([times[one] for one in some], dtype=torch.float64) @ _codes(trial, some)
    return total_V


def _along_directions(trial: Trial, values: Tensor, count: int) -> tuple[Floats, float]:
    """`values` that are seen along the direction of each followed client (N,), in units of the clip, and a contribution's length.

    Crafted codes are unit vectors times the clip wherever the sum is one of codes, so no client's update need be encoded.
    """
    room, clip = num_directions(trial.query), trial.query.spec.clip_l2
    if trial.sums_codes and trial.query.spec.kind == "update" and trial.query.spec.adaptive_clip is None:
        few = min(count, room, 2)
        own_NV = _codes(trial, range(few))
        if bool((own_NV.diagonal().abs() > 0.999 * clip).all()):
            along = np.arange(count) % room
            return (values[..., along].diagonal() if values.dim() == 2 else values[along]).numpy() / clip, 1.0
    own_NV = _codes(trial, [place % room for place in range(count)])
    if trial.query.spec.adaptive_clip is not None:
        own_NV[:, -1] = 0.0  # common to all of a sum
    length_N = own_NV.norm(dim=1)
    return ((values * own_NV).sum(1) / length_N / clip).numpy(), float(length_N.mean()) / clip


def _codes(trial: Trial, directions: Sequence[int]) -> Tensor:
    """What canaries with these directions add to what is seen (N, V), float64."""
    everybody = crafted(range(len(directions)), np.ones(len(directions), dtype=bool), (), directions=directions)
    return replace(trial, planted=everybody).own_NV.double()


def _best_threshold(family: SampledFamily, canaries: int) -> float:
    """The threshold under which simulated scores of the promised mechanism give the largest bound."""
    totals = {inside: family.simulate(1.0, inside) for inside in (True, False)}
    half = max(2, canaries // 2)
    best = max(
        np.quantile(totals[False], np.linspace(0.5, 0.999, 40)),
        key=lambda cut: epsilon_from_errors(_expected(totals, cut, half), family.delta, LEVELS["95"]),
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
