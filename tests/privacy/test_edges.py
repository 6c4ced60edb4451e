"""Plans at the edges of what can be asked: a right number, or one sentence with the value, the bound and the cure."""

import math
from typing import Any

import pytest
from scipy.stats import binom

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import RELATIONS, Relation
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.plan import PrivacyPlan

TRUSTS = ("central", "local", "secure-aggregation")


def plan_of(trust: str, **asked: Any) -> PrivacyPlan:
    return make_plan(
        **{
            "trust": trust, "population": 10_000, "sampling_rate": 0.02, "rounds": 20, "delta": 1e-5,
            **({} if "noise_multiplier" in asked else {"epsilon": 8.0}), **asked,
        }
    )  # fmt: skip


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"epsilon": 0}, "epsilon is 0; it must be positive and finite"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must be positive and finite"),
        ({"epsilon": math.inf}, "epsilon is inf; it must be positive and finite"),
        ({"epsilon": math.nan}, "epsilon is nan; it must be positive and finite"),
        ({"delta": 0}, "delta is 0; it must lie strictly between 0 and 1"),
        ({"delta": 1}, "delta is 1; it must lie strictly between 0 and 1"),
        ({"delta": math.nan}, "delta is nan; it must lie strictly between 0 and 1"),
        ({"delta": 0.5}, "delta is 0.5 with 10000 clients; delta must be below 1 / population"),
        ({"rounds": 0}, "rounds is 0; it must be a whole number of at least 1"),
        ({"sampling_rate": 0}, r"sampling_rate is 0; it must lie in \(0, 1\]"),
        ({"sampling_rate": math.nan}, r"sampling_rate is nan; it must lie in \(0, 1\]"),
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0; it must lie between 0.0001 and 1e"),
        ({"noise_multiplier": 1e-300}, "noise_multiplier is 1e-300; it must lie between 0.0001 and 1e"),
        ({"noise_multiplier": 1e300}, r"noise_multiplier is 1e\+300; it must lie between 0.0001 and 1e"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf; it must lie between"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan; it must lie between"),
    ],
    ids=str,
)
def test_what_no_plan_can_be_made_of_is_one_sentence(trust: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        plan_of(trust, **asked)


@pytest.mark.parametrize("epsilon", [1000.0, 1e6])
def test_an_epsilon_that_secret_cohorts_always_keep_is_refused_at_once(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match=r"the least noise multiplier of secret cohorts, 0.1, costs 24"):
        plan_of("central", epsilon=epsilon)


def test_secret_cohorts_have_a_least_noise() -> None:
    with pytest.raises(PrivacyError, match=r"round is 0.01; with secret cohorts it must be at least 0.1"):
        plan_of("central", noise_multiplier=0.01)
    assert plan_of("central", noise_multiplier=0.01, sampling_rate=1.0).noise_multiplier == 0.01  # no cohort is secret


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    "asked",
    [{"rounds": 1}, {"sampling_rate": 1.0, "participation_cap": 20}, {"epsilon": 100.0}, {"epsilon": 0.05}],
    ids=str,
)
def test_a_plan_at_the_edge_costs_what_was_asked_for(trust: str, relation: Relation, asked: dict[str, Any]) -> None:
    plan = plan_of(trust, relation=relation, **asked)
    cost = plan.epsilons()[plan.budget_observer].epsilon_pld
    target = asked.get("epsilon", 8.0)
    assert target * (1 - 2e-3) <= cost <= target * (1 + 1e-6)


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
@pytest.mark.parametrize("epsilon", [1e-6, 1000.0])
def test_cohorts_that_are_no_secret_reach_every_epsilon(trust: str, epsilon: float) -> None:
    plan = plan_of(trust, epsilon=epsilon)
    assert plan.epsilons()[plan.budget_observer].epsilon_pld == pytest.approx(epsilon, rel=1e-6)


def test_a_plan_of_ten_thousand_rounds_looks_at_each_slot_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    event = PrivacyPlan.event
    monkeypatch.setattr(PrivacyPlan, "event", lambda self, slot: asked.append(slot) or event(self, slot))
    plan = plan_of("local", rounds=10_000, participation_cap=1000)
    assert plan.epsilons()["server"].epsilon_pld == pytest.approx(8.0, rel=1e-6)
    assert len(asked) <= 10 * 10_000
    assert plan.slots is plan.slots  # made once


@pytest.mark.parametrize(("dropout_share", "honest_share"), [(0.0, 1.0), (0.25, 0.75), (0.4, 0.5)])
def test_shares_of_noise_are_sized_for_the_honest_among_those_who_stay(
    dropout_share: float, honest_share: float
) -> None:
    plan = plan_of(
        "secure-aggregation", noise_multiplier=1.5, dropout_share=dropout_share, honest_share=honest_share, rounds=3
    )
    cohort = int(binom.ppf(1e-6, 10_000, 0.02))  # at least so many are asked
    least = math.ceil((1 - dropout_share) * cohort - 1e-9)
    honest = math.floor(honest_share * least + 1e-9)
    terms = plan.share_terms(1)
    assert (terms.least_contributors, terms.honest) == (least, honest)
    assert terms.multiplier == pytest.approx(1.5 / math.sqrt(honest), rel=1e-12)
    # The honest shares of the smallest sum add up to the noise that is charged, and no less.
    assert terms.multiplier * math.sqrt(honest) == pytest.approx(plan.noise_multiplier, rel=1e-12)
