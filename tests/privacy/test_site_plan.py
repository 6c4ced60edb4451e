"""Plans, draws, ledgers and epsilons where the unit is a record, or an owner inside a site."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom

from drencoder.errors import ArtifactError, PrivacyError
from drencoder.privacy.accounting import PoissonGaussianEvent
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.ledger_check import ledger_troubles
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.plan import PrivacyPlan
from drencoder.privacy.sampling import UnitSampler
from drencoder.privacy.site_epsilons import site_epsilons, unit_terms
from drencoder.privacy.site_ledger import AnsweredError, SiteLedger

SITES, RATE, ROUNDS, DELTA, SIGMA = 6, 0.25, 4, 1e-5, 1.1
KEY = bytes(range(32))
SECURE = {"trust": "secure-aggregation", "dropout_share": 0.25, "honest_share": 0.75}

RELATED = {
    "add_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp.NeighboringRelation.REPLACE_ONE,
}


def site_plan(**changes: Any) -> PrivacyPlan:
    known = {
        "trust": "local", "population": SITES, "sampling_rate": RATE, "rounds": ROUNDS, "delta": DELTA, "noise_multiplier": SIGMA,
        "stage1_rate": RATE, "unit": "owner", "site_units": 50,
    }  # fmt: skip
    return make_plan(**(known | changes))


def independent(sigma: float, count: int, relation: str, delta: float = DELTA) -> float:
    """The epsilon of `count` Poisson-sampled Gaussians, by dp_accounting's own hand."""
    accountant = PLDAccountant(RELATED[relation])
    event = dp.PoissonSampledDpEvent(RATE, dp.GaussianDpEvent(sigma))
    return float(accountant.compose(event, count).get_epsilon(delta)) if count else 0.0


# --- the plan --------------------------------------------------------------------------------------


def test_every_site_is_in_every_slot_and_every_unit_pays_for_a_secret_draw() -> None:
    plan = site_plan()
    for slot in plan.slots:
        assert plan.sampler(KEY).cohort(slot) == list(range(SITES))
        assert plan.event(slot) == PoissonGaussianEvent(RATE, SIGMA)
        assert plan.denominator(slot) == RATE * SITES * 50
        assert plan.senders(slot) == plan.cohort_bound(slot) == SITES
    assert plan.expected_cohort == plan.stage1_cohort == RATE * SITES * 50


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_local_trust_is_amplified_against_everybody(relation: Any) -> None:
    """The site's own draw is known to nobody else: the server pays for (q, sigma), who sees a sum of all sites for more noise."""
    found = site_plan(relation=relation).epsilons()
    for observer, noises in (("server", 1), ("public", SITES), ("clients", SITES - 1)):
        expected = independent(SIGMA * math.sqrt(noises), ROUNDS + 1, relation)
        assert found[observer].by_relation[relation].epsilon_pld == pytest.approx(expected, rel=1e-3), observer


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
def test_stage_1_has_a_rate_and_noise_of_its_own(trust: str) -> None:
    shares = SECURE if trust == "secure-aggregation" else {"trust": trust}
    plan = site_plan(**shares, stage1_rate=0.6, stage1_noise_ratio=1.5)
    assert plan.event(0) == PoissonGaussianEvent(0.6, pytest.approx(1.5 * SIGMA))
    assert plan.event(1) == PoissonGaussianEvent(RATE, SIGMA)
    assert plan.denominator(0) == plan.stage1_cohort == pytest.approx(0.6 * SITES * 50)
    honest = plan.share_terms(0).honest if trust == "secure-aggregation" else 0
    for relation, neighbours in RELATED.items():
        for observer, more in (("server", 1.0), ("clients", (honest - 1) / honest if honest else SITES - 1)):
            accountant = PLDAccountant(neighbours)
            for rate, sigma, count in ((0.6, 1.5 * SIGMA, 1), (RATE, SIGMA, ROUNDS)):
                event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma * math.sqrt(more)))
                accountant.compose(event, count)
            expected = accountant.get_epsilon(plan.gaussian_delta)
            stated = plan.epsilons()[observer].by_relation[relation].epsilon_pld
            assert stated == pytest.approx(expected, rel=1e-3), (observer, relation)


def test_secure_aggregation_has_the_noise_of_the_fewest_honest_sites() -> None:
    plan = site_plan(**SECURE)
    least = math.ceil(0.75 * SITES)
    honest = math.floor(0.75 * least)
    terms = plan.share_terms(1)
    assert (terms.least_contributors, terms.most_contributors, terms.honest) == (least, SITES, honest)
    assert terms.multiplier == pytest.approx(SIGMA / math.sqrt(honest))
    assert plan.most_codes(1) >= 3 * RATE * SITES * 50
    found = plan.epsilons()
    for observer, noise in (
        ("server", SIGMA),
        ("public", SIGMA),
        ("clients", SIGMA * math.sqrt((honest - 1) / honest)),
    ):
        expected = independent(noise, ROUNDS + 1, "add_remove", plan.gaussian_delta)
        assert found[observer].epsilon_pld == pytest.approx(expected, rel=1e-3), observer


@pytest.mark.parametrize("trust", [{"trust": "local"}, SECURE])
@pytest.mark.parametrize("epsilon", [0.5, 4.0])
def test_noise_is_found_for_the_epsilon_of_the_strongest_observer(trust: dict[str, Any], epsilon: float) -> None:
    plan = site_plan(**trust, noise_multiplier=None, epsilon=epsilon)
    strongest = max(guarantee.epsilon_pld for guarantee in plan.epsilons().values())
    assert epsilon - 2e-3 <= strongest <= epsilon + 1e-9


def test_k_star_counts_the_noise_of_all_sites() -> None:
    n = RATE * SITES * 50
    assert site_plan().k_star() == pytest.approx(0.5 * n**2 / (SITES * SIGMA**2))
    secure = site_plan(**SECURE)
    assert secure.k_star() == pytest.approx(0.5 * n**2 / (SITES * secure.share_terms(1).multiplier ** 2))
    assert site_plan(population=30, site_units=100).k_star() > 1000 > site_plan(site_units=2).k_star()


def test_no_number_of_the_plan_is_a_sites_own() -> None:
    """What is divided by is public, and equal for neighbours: it is a field of the plan, and the plan never sees the data."""
    plan = site_plan()
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["unit"] == "owner"
    assert plan.to_dict()["site_units"] == 50
    client = make_plan(trust="local", population=60, sampling_rate=0.1, rounds=4, delta=1e-3, noise_multiplier=1.0)
    assert not {"unit", "site_units"} & client.to_dict().keys()  # ledgers of clients look as they did


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trust": "central"}, "each site adds the noise itself"),
        ({"site_units": 0}, "site_units is 0; it must be how many owners everybody takes a site to have"),
        ({"unit": "ward"}, "unit is 'ward'"),
        ({"non_private": ["stage1"]}, "a site sends nothing without noise"),
        ({"delta": 0.01}, "delta is 0.01 with 300 owners; delta must be below 1 / number of owners"),
        ({"noise_multiplier": 0.05}, "with secret cohorts it must be at least 0.1"),
    ],
)
def test_what_sites_cannot_be_planned_for(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        site_plan(**changes)


# --- the draw --------------------------------------------------------------------------------------


def test_a_units_part_depends_on_no_other_unit() -> None:
    sampler, units = UnitSampler(KEY), list(range(1000, 1400))
    joining = sampler.joining(units, 0.3, 2, 5)
    for unit in units[:50]:
        assert sampler.joining([unit], 0.3, 2, 5) == [unit] * (unit in joining)
        without = [other for other in units if other != unit]
        assert sampler.joining(without, 0.3, 2, 5) == [other for other in joining if other != unit]
    assert sampler.joining([], 0.3, 2, 5) == []
    assert sampler.joining(units, 1.0, 2, 5) == units


@pytest.mark.parametrize("unit", [0, 7, 1 << 62])
def test_a_unit_joins_where_its_own_53_bits_are_below_the_rate_and_nowhere_else(unit: int) -> None:
    words = hashlib.shake_256(KEY + f"unit\x1f3\x1f2\x1f{unit}".encode()).digest(8)
    chance = (int.from_bytes(words, "little") >> 11) / 2**53
    assert UnitSampler(KEY).joining([unit], chance, 3, 2) == []
    assert UnitSampler(KEY).joining([unit], math.nextafter(chance, 1), 3, 2) == [unit]


def test_draws_of_slots_sites_and_keys_are_independent_and_have_the_rate() -> None:
    units, rate = list(range(2000)), 0.3
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
    draws = {
        (key, slot, site): np.isin(units, UnitSampler(key).joining(units, rate, slot, site))
        for key in keys
        for slot in (0, 1, 2)
        for site in (0, 1, 2)
    }
    for joined in draws.values():
        low, high = binom.ppf([1e-12, 1 - 1e-12], len(units), rate)
        assert low <= joined.sum() <= high
    pairs = list(draws.values())
    low, high = binom.ppf([1e-12, 1 - 1e-12], len(units), rate**2)  # both of an independent pair
    for index, first in enumerate(pairs):
        for second in pairs[:index]:
            assert low <= (first & second).sum() <= high


# --- ledgers ---------------------------------------------------------------------------------------


def ledger_of(folder: Path, unasked: dict[int, list[int]], **changes: Any) -> Ledger:
    ledger = Ledger.create(folder / "ledger.jsonl", site_plan(**changes), run_id="r")
    for slot in ledger.plan.slots:
        ledger.charge(slot)
        ledger.record_unasked(slot, unasked.get(slot, []))
        ledger.record_contributors(slot, SITES - len(unasked.get(slot, [])))
    return ledger


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_a_site_that_was_asked_less_often_has_spent_less(tmp_path: Path, relation: Any) -> None:
    with ledger_of(tmp_path, {1: [2], 3: [5, 2]}) as ledger:
        assert ledger_troubles(ledger) == []
        rows = site_epsilons(ledger)
        observers = ledger.guarantees()
    assert [(row["sites"], row["slots"]) for row in rows] == [([0, 1, 3, 4], 5), ([5], 4), ([2], 3)]
    for row in rows:
        assert row["epsilon"][relation]["server"] == pytest.approx(independent(SIGMA, row["slots"], relation), abs=1e-6)
    assert rows[0]["epsilon"][relation]["server"] == observers["server"].by_relation[relation].epsilon_pld
    others = rows[2]["epsilon"][relation]  # slots 0, 2 and 4, with all six sites in each
    assert others["public"] == pytest.approx(independent(SIGMA * math.sqrt(6), 3, relation), abs=1e-6)
    assert others["clients"] == pytest.approx(independent(SIGMA * math.sqrt(5), 3, relation), abs=1e-6)
    came = (6, 5, 6, 4, 6)  # in slots 0 to 4: of those who did not come there is no noise
    for observer, noises in (("public", came), ("clients", [count - 1 for count in came])):
        accountant = PLDAccountant(RELATED[relation])
        for count in noises:
            accountant.compose(dp.PoissonSampledDpEvent(RATE, dp.GaussianDpEvent(SIGMA * math.sqrt(count))))
        assert rows[0]["epsilon"][relation][observer] == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-6)
    for row in rows:  # a row has all that its numbers are made from
        for observer, events in row["events"].items():
            accountant = PLDAccountant(RELATED[relation])
            for event in events:
                gaussian = dp.GaussianDpEvent(event["noise_multiplier"])
                accountant.compose(dp.PoissonSampledDpEvent(event["sampling_rate"], gaussian), event["count"])
            stated = row["epsilon"][relation][observer]
            assert accountant.get_epsilon(DELTA * (1 - 1e-6)) == pytest.approx(stated, rel=1e-9)


def test_a_site_that_did_not_answer_is_charged_all_the_same(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.jsonl", site_plan(), run_id="r") as ledger:
        ledger.charge(0)
        ledger.record_contributors(0, 2)
        (row,) = site_epsilons(ledger)
    assert row["sites"] == list(range(SITES))
    assert row["slots"] == 1


def test_lines_about_sites_that_the_plan_does_not_have_are_found(tmp_path: Path) -> None:
    with ledger_of(tmp_path, {1: [SITES]}) as ledger:
        assert any("names sites that slot 1 of this plan cannot leave out" in line for line in ledger_troubles(ledger))


def test_a_client_ledger_has_no_such_lines(tmp_path: Path) -> None:
    plan = make_plan(trust="local", population=60, sampling_rate=0.1, rounds=4, delta=1e-3, noise_multiplier=1.0)
    with Ledger.create(tmp_path / "ledger.jsonl", plan, run_id="r") as ledger:
        ledger.charge(1)
        ledger.record_unasked(1, [3])
        assert site_epsilons(ledger) == []
        assert "unasked" not in {record["kind"] for record in ledger.records}


def test_a_lost_slot_is_skipped_so_that_no_site_sends_two_sums(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.jsonl", site_plan(), run_id="r") as ledger:
        ledger.charge(1)
        assert ledger.resume_rule(1) == "skip"
        with pytest.raises(PrivacyError, match="charged already"):
            ledger.charge(1)


def test_a_sites_own_ledger_answers_each_slot_once_and_knows_what_it_spent(tmp_path: Path) -> None:
    plan = site_plan()
    ledger = SiteLedger.open(tmp_path / "site.jsonl", "recipe", plan)
    for slot in (0, 1, 2):
        ledger.charge("run", slot, 0, [4])
    with pytest.raises(AnsweredError):
        ledger.charge("run", 1, 1, [4])
    for observer in (
        "server",
        "clients",
        "public",
    ):  # a site does not know how many others added noise: it counts on none
        assert ledger.spent()[observer] == pytest.approx(independent(SIGMA, 3, "add_remove"), rel=1e-3)
    lines = (tmp_path / "site.jsonl").read_text()
    assert Counter(line.split('"kind": "')[1].split('"')[0] for line in lines.splitlines())["answer"] == 3
    ledger.close()
    with pytest.raises(ArtifactError):
        SiteLedger.open(tmp_path / "site.jsonl", "recipe", site_plan(site_units=51))


def test_the_terms_name_what_is_public_and_what_is_not(tmp_path: Path) -> None:
    with ledger_of(tmp_path, {}) as ledger:
        terms = unit_terms(ledger)
    assert terms["protects"] == "one owner inside a site, with all its records there"
    assert terms["assumed_public"] == {
        "units_per_site": 50, "sampling_rate": RATE, "stage1_rate": RATE, "mean_divided_by": RATE * SITES * 50,
        "stage1_mean_divided_by": RATE * SITES * 50,
    }  # fmt: skip
    assert "How many owners a site has" in terms["private"]
