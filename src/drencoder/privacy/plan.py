"""The privacy plan: sampler, noise and events of a run, born together from one set of public facts.

The unit is a client, or a record or owner inside a site (`curated`, at the end). Three trust models:

- `central`: the server is trusted. Cohorts are Poisson and secret; the server adds N(0, sigma^2 C^2) to
  the sum of the clipped codes and divides by the fixed expected size q * N.
- `local`: the server is not trusted. Each client adds N(0, sigma^2 C^2) to its own clipped code, and nobody
  takes part more often than `participation_cap` times; nothing is amplified. A client that takes part in
  one slot only pays for one release: different clients' releases compose in parallel.
- `secure-aggregation`: the server sees nothing but the sum of all contributors' codes, each with a share of the noise.
  Participation is capped as under local trust. A round of fewer than `least_contributors` is void: honest nodes
  do not unmask it. Of those who contribute `honest_share` are assumed to add their share and to keep it to themselves;
  the shares are so large that the fewest honest ones together have noise sigma C.

Where the unit is a record or an owner, `population` counts sites. Every site is in every slot: it draws its own units in secret,
each with the sampling rate, and sends one noised sum. That is a message of local trust, or a share of secure aggregation, whose
units have the sub-sampled events of central trust against everybody, since nobody but the site knows the draw.

Slot 0 is stage 1 (the prior's query), slots 1..T are the rounds. `docs/guarantee.md` has the theorems.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from drencoder.errors import PrivacyError
from drencoder.privacy import accounting
from drencoder.privacy.accounting import Event, GaussianEvent, NonPrivateEvent, PoissonGaussianEvent, Relation
from drencoder.privacy.calibration import LEAST_SAMPLED_NOISE
from drencoder.privacy.noise_terms import DISCRETE_SHARE, ShareTerms
from drencoder.privacy.observers import ASSUMPTIONS, OBSERVERS, SITE_ASSUMPTIONS, ObserverGuarantee, report
from drencoder.privacy.plan_checks import Noise, Stage, Trust, Unit, check_facts, refuse, unused_fields
from drencoder.privacy.sampling import CappedSampler, PoissonSampler, Sampler, binomial_quantile, split_blocks

ALIGNMENT = 0.5  # |mean clipped update|^2 / C^2, as plans assume it

_COHORT_RISK = 1e-6  # chance that one round's cohort is smaller than the plan says
_CROWD_RISK = 1e-12  # and that it is larger than what the modulus of secure aggregation was made for
_SURE = 1e-9  # shares of whole numbers: 0.7 of 10 is 7, whatever floating point says
_FULLER = 4  # times the units that everybody expects in a sum, the modulus of secure aggregation holds


@dataclass(frozen=True)
class PrivacyPlan:
    """Public facts of a run, all checked. Make one with `make_plan.make_plan`; `from_dict` reads one back.

    `noise_multiplier` is noise std / clip, of the sum (central), of each client's code (local) or of the fewest honest
    shares together (secure-aggregation, see `share_terms`).
    `noise` = "replay" marks a run whose noise can be computed again: for tests, without any guarantee.
    `non_private` names the stages that are released without noise, of "stage1" and "round".
    `nonlinear_decoding`: the rounds' codes pass a non-linear map one by one before they are summed. Such a sum is
    no function of the sum of the codes, so under local trust clients do not hide behind each other's noise.
    `dropout_share`, `honest_share`: secure aggregation only; see `least_contributors` and `honest`.
    `unit`: what is protected; but for "client", `population` counts sites and `site_units` is how many units everybody takes a
    site to have. A site's true number is its secret: nothing is divided by it, and no number of the plan comes from it.
    """

    trust: Trust
    population: int
    sampling_rate: float
    rounds: int
    stage1_rate: float
    noise_multiplier: float
    stage1_noise_multiplier: float
    delta: float
    relation: Relation
    participation_cap: int
    target_epsilon: float | None
    noise: Noise = "secure"
    non_private: tuple[Stage, ...] = ()
    nonlinear_decoding: bool = False
    dropout_share: float = 0.0
    honest_share: float = 1.0
    unit: Unit = "client"
    site_units: int = 0

    def __post_init__(self) -> None:
        check_facts(self)
        for stage, used in (("round", True), ("stage1", self.stage1_rate > 0)):
            sigma = self.noise_multiplier if stage == "round" else self.stage1_noise_multiplier
            if (used and (sigma == 0) != (stage in self.non_private)) or not 0 <= sigma < math.inf:
                refuse(
                    f"The noise multiplier of {stage} is {sigma}",
                    "it must be positive and finite",
                    f"name '{stage}' in non_private for a run without noise and without a guarantee there",
                )
            secret = used and self.secret_draw and self.rate(0 if stage == "stage1" else 1) < 1
            if secret and 0 < sigma < LEAST_SAMPLED_NOISE:
                refuse(
                    f"The noise multiplier of {stage} is {sigma:g}",
                    f"with secret cohorts it must be at least {LEAST_SAMPLED_NOISE:g}",
                    "raise it; less noise protects nobody",
                )
        if self.capped:
            self.sampler(bytes(32))  # checks that each block's rates fit into one

    # The schedule and its sampler

    @property
    def capped(self) -> bool:
        """Whether cohorts are no secret and each client's releases are capped instead: all trust but central."""
        return self.trust != "central"

    @property
    def curated(self) -> bool:
        """Whether sites curate the units: a unit is a record, or an owner inside a site, and what a site sends is a noised sum."""
        return self.unit != "client"

    @property
    def secret_draw(self) -> bool:
        """Whether nobody but who adds the noise knows which units are in a slot: the server, or each site of its own units."""
        return self.curated or not self.capped

    @property
    def units(self) -> int:
        """How many units there are, as everybody may know it: N."""
        return self.population * (self.site_units if self.curated else 1)

    @property
    def gaussian_delta(self) -> float:
        """The delta that epsilons are computed at: a millionth is set aside for noise that is discrete."""
        return self.delta * (1 - DISCRETE_SHARE)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """0 for stage 1 where there is one, then 1..rounds."""
        return tuple(range(0 if self.stage1_rate > 0 else 1, self.rounds + 1))

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Where cohorts are capped: runs of slots, in each of which a client takes part at most once."""
        return split_blocks(self.slots, self.participation_cap)

    @property
    def expected_cohort(self) -> float:
        """q * N, the fixed denominator of every round's mean. Never the realised size."""
        return self.sampling_rate * self.units

    @property
    def stage1_cohort(self) -> float:
        """The fixed denominator of stage 1; 0 without one."""
        return self.stage1_rate * self.units

    def denominator(self, slot: int) -> float:
        """What the released sum of `slot` is divided by: fixed before the run, never the realised size."""
        return self.rate(slot) * self.units

    def senders(self, slot: int) -> float:
        """How many messages `slot` is expected to have: of the clients of its cohort, or of all sites."""
        return self.population if self.curated else self.denominator(slot)

    def rate(self, slot: int) -> float:
        """The chance of each unit to take part in `slot`."""
        return self.stage1_rate if slot == 0 else self.sampling_rate

    def sampler(self, key: bytes) -> Sampler:
        """The sampler whose law the events state. `key`: 32 bytes, secret under central trust."""
        rates = {slot: 1.0 if self.curated else self.rate(slot) for slot in self.slots}
        if self.capped:
            return CappedSampler(key, self.population, rates, self.blocks)
        return PoissonSampler(key, self.population, rates, fresh_attempts=self.noise == "secure")

    # Events and what they cost

    def stage(self, slot: int) -> Stage:
        return "stage1" if slot == 0 else "round"

    def event(self, slot: int) -> Event:
        """What one release of `slot` is charged as (capped cohorts: for each client of its cohort; sites: for each unit)."""
        if not self.slots[0] <= slot <= self.rounds:
            raise PrivacyError(f"Slot {slot} is not in the plan, which has slots {self.slots[0]} to {self.rounds}.")
        if self.stage(slot) in self.non_private:
            return NonPrivateEvent()
        sigma = self.sigma(slot)
        return PoissonGaussianEvent(self.rate(slot), sigma) if self.secret_draw else GaussianEvent(sigma)

    def cohort_bound(self, slot: int) -> int:
        """How many contributors `slot` has at least, save with chance 1e-6; never below 1."""
        if self.curated:
            return self.population
        return max(1, binomial_quantile(_COHORT_RISK, self.population, self.rate(slot)))

    # Secure aggregation's shares of noise

    def least_contributors(self, slot: int) -> int:
        """How many contributors a release of `slot` has at least: a cohort of the lower bound less the drop-outs.

        Not a chance: honest nodes do not unmask a sum of fewer.
        """
        return max(1, math.ceil((1 - self.dropout_share) * self.cohort_bound(slot) - _SURE))

    def honest(self, contributors: int) -> int:
        """How many of them are assumed to add their share and to tell it to nobody; never below 1, the client itself."""
        return max(1, math.floor(self.honest_share * contributors + _SURE))

    def share_terms(self, slot: int) -> ShareTerms:
        """The bounds of `slot`: m honest shares of sigma / sqrt(m) add up to sigma (Kairouz, Liu and Steinke 2021)."""
        if self.trust != "secure-aggregation":
            raise PrivacyError(
                f"Under {self.trust} trust there are no shares of noise: each release has all of its own."
            )
        least = self.least_contributors(slot)
        honest = self.honest(least)
        return ShareTerms(self.sigma(slot) / math.sqrt(honest), least, self.most_contributors(slot), honest)

    def sigma(self, slot: int) -> float:
        """Noise std / clip of one release of `slot`; 0 for a stage without noise."""
        return self.stage1_noise_multiplier if slot == 0 else self.noise_multiplier

    def most_contributors(self, slot: int) -> int:
        """Of all sites, or of clients: more than so many are drawn with a chance of 1e-12 only, and none above the population."""
        return self.population if self.curated else self.most_codes(slot)

    def most_codes(self, slot: int) -> int:
        """How many codes a modular sum holds. A sum of more, which only sites can have, may wrap around and tells nothing more."""
        drawn = 1 + binomial_quantile(1 - _CROWD_RISK, self.units, self.rate(slot))
        return _FULLER * drawn if self.curated else min(self.population, drawn)

    @cached_property
    def largest_epsilon(self) -> float:
        """Of the whole plan's private stages: the strongest observer's, under replace-one."""
        events = self.budget_events(dict.fromkeys(self.slots, 1))
        return accounting.epsilon_pld(events, self.gaussian_delta, "replace_one", accounting.COARSE_INTERVAL)

    def composition(self, observer: str, charged: Mapping[int, tuple[int, int]]) -> tuple[Event, ...] | None:
        """The worst client's events in the view of `observer`; None where there is no guarantee.

        `charged` maps a slot to (number of charges, number of contributors known at least).

        Central: every charge composes. Local: a client takes part once in a block at most, so each block
        costs its dearest slot. The server sees a client's release with noise sigma; the public sees it
        inside a sum of m independent noises, sigma * sqrt(m); a fellow contributor can take its own noise
        off, sigma * sqrt(m - 1). Nothing is claimed for not knowing the cohort. Secure aggregation: everybody sees
        sums only, with the noise of their honest contributors; a fellow contributor knows one share of it.
        """
        if self.trust == "central":
            if observer == "server":
                return None
            return accounting.merge(self.event(slot) for slot, (count, _) in charged.items() for _ in range(count))
        events = []
        for block in self.blocks:
            seen = [self._seen(s, observer, charged[s][1]) for s in block if charged.get(s, (0, 0))[0]]
            if seen:
                events.append(min(seen, key=lambda e: 0.0 if isinstance(e, NonPrivateEvent) else e.noise_multiplier))
        return accounting.merge(events)

    def _seen(self, slot: int, observer: str, contributors: int) -> Event:
        event = self.event(slot)
        if self.trust == "secure-aggregation" and not isinstance(event, NonPrivateEvent):
            least = self.least_contributors(slot)
            honest = self.honest(max(least, contributors))
            unknown = max(1, honest - 1 if observer == "clients" else honest)
            return replace(event, noise_multiplier=event.noise_multiplier * math.sqrt(unknown / self.honest(least)))
        if isinstance(event, NonPrivateEvent) or observer == "server" or (self.nonlinear_decoding and slot > 0):
            return event
        others = contributors - 1 if observer == "clients" else contributors
        return replace(event, noise_multiplier=event.noise_multiplier * math.sqrt(max(1, others)))

    def guarantee(
        self, observer: str, events: tuple[Event, ...] | None, interval: float | None = None
    ) -> ObserverGuarantee:
        """All epsilons of a composition for one observer; `events` None means no guarantee."""
        events = (NonPrivateEvent(),) if events is None else events
        reports = {
            relation: report(events, self.gaussian_delta, relation, interval) for relation in accounting.RELATIONS
        }
        assumption = (SITE_ASSUMPTIONS if self.curated else ASSUMPTIONS)[self.trust, observer]
        if self.noise == "replay":
            assumption = "NOT PRIVATE, replayable noise: these numbers hold for secure noise only. " + assumption
        if self.non_private:
            assumption = f"NON-PRIVATE, no noise in {' and '.join(self.non_private)}. " + assumption
        return ObserverGuarantee(
            observer=observer, delta=self.delta, relation=self.relation, by_relation=reports, events=events,
            assumption=assumption, **asdict(reports[self.relation]),
        )  # fmt: skip

    def schedule(self) -> dict[int, tuple[int, int]]:
        """Every slot once, with the lower bound of contributors: what `composition` takes for the whole plan."""
        bound = self.least_contributors if self.trust == "secure-aggregation" else self.cohort_bound
        bounds = {stage: bound(slot) for stage, slot in {self.stage(s): s for s in self.slots}.items()}
        return {slot: (1, bounds[self.stage(slot)]) for slot in self.slots}

    def epsilons(self) -> dict[str, ObserverGuarantee]:
        """The whole plan's guarantee for every observer.

        Under local trust those of clients and public rest on each cohort being no smaller than `cohort_bound`; the certificate
        counts the realised contributors instead.
        """
        schedule = self.schedule()
        return {name: self.guarantee(name, self.composition(name, schedule)) for name in OBSERVERS}

    @property
    def budget_observer(self) -> str:
        """Whose epsilon the target bounds: the server's under local trust, the public's under central.

        Under secure aggregation the other clients': each sees what the server sees, and its own noise besides.
        """
        return {"local": "server", "central": "public", "secure-aggregation": "clients"}[self.trust]

    def budget_events(self, charges: Mapping[int, int]) -> tuple[Event, ...]:
        """The charges (slot -> count) that count against the budget: all but the ones named non-private.

        Those are left out before the worst client is looked for, else under local trust a client of an un-noised stage
        would hide what the others pay.
        """
        counted = {slot: (count, 1) for slot, count in charges.items() if self.stage(slot) not in self.non_private}
        return self.composition(self.budget_observer, counted) or ()

    @cached_property
    def budget(self) -> float:
        """The epsilon no charge may pass: the target, or without one what the schedule costs."""
        return self.target_epsilon or accounting.epsilon_pld(
            self.budget_events(dict.fromkeys(self.slots, 1)), self.gaussian_delta, self.relation
        )

    def k_star(self, alignment: float = ALIGNMENT) -> float:
        """Coordinates that one round can learn, n^2 |g|^2 / (noise variance of the sum) (METHOD 2.5).

        `alignment` is the assumed |mean clipped update|^2 / C^2. The variance is sigma^2 C^2 under central
        trust, that of as many noises as there are senders under local trust, and as many shares' under secure aggregation.
        """
        if self.noise_multiplier == 0:
            return math.inf
        n, noises = self.expected_cohort, 1 if self.trust == "central" else self.senders(1)
        sigma = self.share_terms(1).multiplier if self.trust == "secure-aggregation" else self.noise_multiplier
        return alignment * (n * (n / noises)) / sigma**2

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives an equal plan back."""
        facts = {**asdict(self), "non_private": list(self.non_private)}
        unused = unused_fields(self.trust, self.unit)
        return {name: value for name, value in facts.items() if name not in unused}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PrivacyPlan":
        """Inverse of `to_dict`. Raises PrivacyError on missing or unknown fields and on impossible values."""
        names = {field.name for field in fields(cls)} - unused_fields(data.get("trust"), data.get("unit", "client"))
        if set(data) != names:
            raise PrivacyError(f"A privacy plan's fields do not match: {sorted(names ^ set(data))}.")
        return cls(**{**data, "non_private": tuple(data["non_private"])})
