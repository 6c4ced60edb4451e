"""`privacy.trust = "secure-aggregation"`: what is planned, charged, released and refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from drencoder.encoders.wire import WireFormat
from drencoder.errors import PrivacyError, RecipeError, SecureError, VoidRoundError
from drencoder.federated.query import Query, QuerySpec
from drencoder.federated.query_encoders import UpdatesEncoder
from drencoder.federated.round import client_message, client_share, server_release
from drencoder.federated.secure_round import clients_by_node, round_settings, secure_node, secure_sum
from drencoder.privacy.accounting import GaussianEvent, epsilon_gaussian, epsilon_pld
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import clip_rows, quantiser_for, release_shares, unmasked_sum
from drencoder.privacy.noise_source import ReplayNoise, SecureNoise
from drencoder.privacy.noise_terms import noise_terms
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import survey
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep

ROOT = Path(__file__).parents[2]
PLAN: dict[str, Any] = {
    "trust": "secure-aggregation", "population": 1000, "sampling_rate": 0.05, "rounds": 10, "delta": 1e-5,
    "dropout_share": 0.25, "honest_share": 0.75,
}  # fmt: skip
KEY = bytes(range(32))


@pytest.fixture
def ledger_fn(tmp_path):
    opened = []

    def build_ledger(**change):
        facts = {**PLAN, "noise_multiplier": 1.0, **change}
        plan = make_plan(**facts)
        opened.append(Ledger.create(tmp_path / f"{len(opened)}.jsonl", plan, run_id="r", key=KEY))
        return opened[-1]

    yield build_ledger
    for ledger in opened:
        ledger.close()


def query_of(values=64, clip=0.5, slot=1):
    spec = QuerySpec("update", slot, "code", clip, 0, 1, True, values, WireFormat(values, 7))
    return Query(spec, UpdatesEncoder(values))


# The plan


def test_the_fewest_honest_shares_together_have_the_noise_of_the_charge():
    plan = make_plan(**PLAN, epsilon=2.0)
    terms = plan.share_terms(1)
    bound = int(stats.binom.ppf(1e-6, 1000, 0.05))
    assert terms.least_contributors == math.ceil(0.75 * bound) == plan.least_contributors(1)
    assert terms.honest == math.floor(0.75 * terms.least_contributors)
    assert terms.multiplier * math.sqrt(terms.honest) == pytest.approx(plan.noise_multiplier)
    assert stats.binom.sf(terms.most_contributors, 1000, 0.05) < 1e-12


def test_the_target_binds_the_client_who_knows_its_own_share():
    plan = make_plan(**PLAN, epsilon=2.0)
    seen = plan.epsilons()
    honest = plan.share_terms(1).honest
    assert plan.budget_observer == "clients"
    assert seen["clients"].epsilon_pld == pytest.approx(2.0, abs=1e-6)
    for observer, unknown in (("server", honest), ("clients", honest - 1), ("public", honest)):
        mu = math.sqrt(honest / unknown) / plan.noise_multiplier
        assert seen[observer].epsilon_pld == pytest.approx(epsilon_gaussian(mu, 1e-5), abs=1e-5)
        assert seen[observer].by_relation["replace_one"].epsilon_pld == pytest.approx(
            epsilon_gaussian(2 * mu, 1e-5), abs=1e-5
        )
    assert seen["server"].epsilon_pld < 2.0


@pytest.mark.parametrize("trust", ["secure-aggregation", "local", "central"])
def test_epsilon_is_stated_at_a_delta_that_leaves_room_for_discrete_noise(trust):
    plan = make_plan(**{**PLAN, "trust": trust}, noise_multiplier=1.0)
    assert plan.gaussian_delta == 1e-5 * (1 - 1e-6)
    observer = plan.budget_observer
    events = plan.composition(observer, plan.schedule())
    assert plan.epsilons()[observer].epsilon_pld == epsilon_pld(events, plan.gaussian_delta, "add_remove")
    assert plan.epsilons()[observer].epsilon_pld > epsilon_pld(events, 1e-5, "add_remove")
    assert plan.epsilons()[observer].delta == 1e-5
    terms = noise_terms(plan, 1)
    worst = plan.epsilons()[observer].by_relation["replace_one"].epsilon_pld
    # A million releases, each this far from Gaussian noise, spend a millionth of delta at the largest epsilon that is stated.
    spent = terms.log_slack + math.log(1e6) + math.log1p(math.exp(worst))
    assert math.log(1e-6 * 1e-5) - 0.05 < spent <= math.log(1e-6 * 1e-5) + 1e-9


def test_more_contributors_than_planned_make_every_epsilon_smaller_and_fewer_cannot_be():
    plan = make_plan(**PLAN, epsilon=4.0)
    least = plan.least_contributors(1)
    (few,) = plan.composition("server", {1: (1, 1)}) or ()
    (planned,) = plan.composition("server", {1: (1, least)}) or ()
    (many,) = plan.composition("server", {1: (1, 2 * least)}) or ()
    assert few == planned == GaussianEvent(plan.noise_multiplier)
    ratio = plan.honest(2 * least) / plan.honest(least)
    assert isinstance(many, GaussianEvent)
    assert many.noise_multiplier == pytest.approx(plan.noise_multiplier * math.sqrt(ratio))


def test_dropouts_and_dishonest_clients_make_shares_larger():
    def share(**change):
        return make_plan(**{**PLAN, **change}, noise_multiplier=1.0).share_terms(1).multiplier

    assert share(dropout_share=0.0) < share() < share(dropout_share=0.49)
    assert share(honest_share=1.0) < share() < share(honest_share=0.3)
    # Under local trust each client would add all of it.
    assert share() < 0.3


def test_nothing_is_amplified_and_a_client_pays_once_a_block():
    plan = make_plan(**PLAN, noise_multiplier=1.0)
    twice = make_plan(**PLAN, noise_multiplier=1.0, participation_cap=2)
    assert len(plan.composition("server", plan.schedule()) or ()) == 1
    (event,) = twice.composition("server", twice.schedule()) or ()
    assert event == GaussianEvent(1.0, count=2)
    with pytest.raises(PrivacyError, match="raise the participation cap"):
        make_plan(**{**PLAN, "sampling_rate": 0.2}, noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dropout_share": 0.5}, r"\[0, 0.5\)"),
        ({"honest_share": 0.0}, r"\(0, 1\]"),
        ({"non_private": ("round",), "noise_multiplier": None}, "without noise"),
        ({"nonlinear_decoding": True}, "only their sum"),
    ],
)
def test_impossible_plans_are_refused(change, match):
    with pytest.raises(PrivacyError, match=match):
        make_plan(**{**PLAN, "noise_multiplier": 1.0, **change})


def test_the_plan_survives_json_and_other_modes_look_as_before():
    plan = make_plan(**PLAN, epsilon=3.0)
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    local = make_plan(**{**PLAN, "trust": "local", "dropout_share": 0.0, "honest_share": 1.0}, epsilon=3.0)
    assert "honest_share" not in local.to_dict()
    assert PrivacyPlan.from_dict(local.to_dict()) == local
    with pytest.raises(PrivacyError, match="honest_share"):
        PrivacyPlan.from_dict({k: v for k, v in plan.to_dict().items() if k != "honest_share"})


def test_a_plan_whose_epsilon_is_too_large_for_discrete_noise_is_refused(ledger_fn):
    permit = ledger_fn(noise_multiplier=0.03).charge(1)
    with pytest.raises(PrivacyError, match="smaller epsilon"):
        quantiser_for(permit, 64, 0.5)


@pytest.mark.parametrize("trust", ["secure-aggregation", "local"])
def test_such_a_recipe_is_refused_before_anything_is_charged(trust):
    with pytest.raises(PrivacyError, match="smaller epsilon"):
        survey(load_recipe("quickstart", [f"privacy.trust={trust}", "privacy.epsilon=1000"]))
    survey(
        load_recipe("quickstart", ["privacy.trust=secure-aggregation", "privacy.epsilon=20", "encoder.name=identity"])
    )


# Shares and their sum


def aggregate_rows(query, permit, cohort, update_ND, *, nodes=4, threshold=3, drop=None, noise=None):
    noise = noise or SecureNoise()
    keys = [NodeKey.generate() for _ in range(nodes)]
    own = clients_by_node(cohort, nodes)
    settings = round_settings(query, permit, list(map(len, own)), [key.public for key in keys], threshold)
    rows = {client: row for row, client in enumerate(cohort)}

    def share_of(clients):
        return client_share(query, update_ND[[rows[client] for client in clients]], clients, permit, noise)

    party = [secure_node(settings, node, key, own[node], share_of(own[node])) for node, key in enumerate(keys)]

    def exchange(stage, requests):
        return {n: party[n].answer(stage, data) for n, data in requests.items() if (stage, n) != drop}

    return server_release(query, [secure_sum(settings, own, exchange)], permit, noise)


def test_the_released_sum_has_the_promised_noise_and_no_other(ledger_fn):
    ledger, query = ledger_fn(), query_of(values=6000)
    permit = ledger.charge(1)
    cohort = list(permit.cohort)
    update_ND = torch.randn(len(cohort), 6000)
    outcome = aggregate_rows(query, permit, cohort, update_ND)
    exact = clip_rows(update_ND, 0.5).values_NV.sum(0, dtype=torch.float64)
    noise = (outcome.release.value.double() - exact).numpy()
    assert outcome.release.contributors == len(cohort)
    for scale, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        p_value = stats.kstest(noise / (scale * outcome.release.noise_std), "norm").pvalue
        assert (p_value > 1e-10) == right  # a false alarm once in 1e10 runs
    # The promise of the ledger: sigma C for the fewest honest ones, so this much for all who came, and hardly more.
    promised = 0.5 * math.sqrt(len(cohort) / permit.shares.honest)
    assert promised <= outcome.release.noise_std <= promised * 1.02


def test_the_sum_does_not_depend_on_how_clients_are_spread(ledger_fn):
    sums = []
    for nodes, threshold in ((2, 2), (4, 3), (5, 5)):
        ledger, query = ledger_fn(noise="replay"), query_of()
        permit = ledger.charge(1)
        cohort = list(permit.cohort)
        update_ND = torch.randn(len(cohort), 64, generator=torch.Generator().manual_seed(1))
        sums.append(
            aggregate_rows(query, permit, cohort, update_ND, nodes=nodes, threshold=threshold, noise=ReplayNoise(3))
        )
    assert all(torch.equal(found.release.value, sums[0].release.value) for found in sums)


def test_a_lost_node_takes_its_clients_and_their_noise_with_it(ledger_fn):
    ledger, query = ledger_fn(), query_of()
    permit = ledger.charge(1)
    cohort = list(permit.cohort)
    outcome = aggregate_rows(query, permit, cohort, torch.zeros(len(cohort), 64), drop=(ProtocolStep.MASK, 1))
    stayed = sum(client % 4 != 1 for client in cohort)
    assert outcome.release.contributors == stayed < len(cohort)
    shares = quantiser_for(permit, 64, 0.5).noise_std * math.sqrt(stayed)
    assert outcome.release.noise_std == pytest.approx(shares)
    ledger.record_contributors(1, stayed)
    assert ledger.spent()["server"] <= ledger.plan.epsilons()["server"].epsilon_pld


def test_a_broken_update_goes_as_zero_and_is_not_told(ledger_fn):
    ledger, query = ledger_fn(), query_of()
    permit = ledger.charge(1)
    cohort = list(permit.cohort)
    update_ND = torch.zeros(len(cohort), 64)
    update_ND[3, 5], update_ND[4, 0] = math.nan, math.inf
    outcome = aggregate_rows(query, permit, cohort, update_ND)
    assert outcome.nonfinite == 0
    assert outcome.release.value.abs().max() < 8 * outcome.release.noise_std  # exceeded once in 1e13 runs


def test_shares_and_sums_need_their_permit(ledger_fn):
    ledger = ledger_fn()
    permit = ledger.charge(1)
    cohort = list(permit.cohort)
    codes = clip_rows(torch.zeros(2, 8), 0.5)
    release_shares(codes, cohort[:2], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="second time"):
        release_shares(codes, cohort[1:3], permit, SecureNoise())
    stranger = next(client for client in range(1000) if client not in cohort)
    with pytest.raises(PrivacyError, match="not in the cohort"):
        release_shares(codes, [stranger, cohort[4]], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="secure noise"):
        release_shares(codes, cohort[4:6], permit, ReplayNoise(1))
    total = np.zeros(8, dtype=np.uint32)
    least = permit.shares.least_contributors
    with pytest.raises(PrivacyError, match="void"):
        unmasked_sum(total, cohort[: least - 1], permit, 0.5)
    with pytest.raises(PrivacyError, match="void"):
        unmasked_sum(total, [*cohort[:least], cohort[0]], permit, 0.5)
    with pytest.raises(PrivacyError, match="not in the cohort"):
        unmasked_sum(total, [*cohort, stranger], permit, 0.5)
    unmasked_sum(total, cohort, permit, 0.5)
    with pytest.raises(PrivacyError, match="charged for one release"):
        unmasked_sum(total, cohort, permit, 0.5)


def test_no_client_has_a_message_of_its_own(ledger_fn):
    permit, query = ledger_fn().charge(1), query_of()
    with pytest.raises(PrivacyError, match="no message of its own"):
        client_message(query, torch.zeros(1, 64), [0], permit, SecureNoise())
    fixed = dataclasses.replace(query, spec=dataclasses.replace(query.spec, summable=False))
    with pytest.raises(PrivacyError, match="linear encoder"):
        client_share(fixed, torch.zeros(1, 64), [0], permit, SecureNoise())
    local = ledger_fn(trust="local", dropout_share=0.0, honest_share=1.0).charge(1)
    with pytest.raises(PrivacyError, match="no shares to add up"):
        client_share(query, torch.zeros(1, 64), local.cohort[:1], local, SecureNoise())
    with pytest.raises(PrivacyError, match="no modular sum"):
        unmasked_sum(np.zeros(64, dtype=np.uint32), local.cohort, local, 0.5)


def test_a_cohort_that_is_too_small_is_void_before_anybody_trains(ledger_fn):
    permit = ledger_fn().charge(1)
    with pytest.raises(VoidRoundError, match="plan needs"):
        round_settings(query_of(), permit, [1, 2], [KEY], 1)
    with pytest.raises(VoidRoundError, match="plan needs"):
        round_settings(query_of(), permit, [500, 400], [KEY], 1)


def test_a_node_refuses_a_round_that_counts_other_clients_for_it(ledger_fn):
    permit, keys = ledger_fn().charge(1), [NodeKey.generate() for _ in range(3)]
    settings = round_settings(query_of(), permit, [20, 20, 20], [key.public for key in keys], 2)
    with pytest.raises(SecureError, match="hosts 2 clients and the round counts 20"):
        secure_node(settings, 1, keys[1], [4, 7], np.zeros(64, dtype=np.uint32))


# Recipes


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["encoder.name=autoencoder"], "set encoder.name = 'random'"),
        (["privacy.noise_in=update"], "set privacy.noise_in = 'code'"),
        (["encoder.wire_dtype=rotated4"], "set encoder.wire_dtype = 'float32'"),
        (["encoder.name=autoencoder", "prior.source=gradients"], "secure-aggregation"),
        (["federation.nodes=10", "privacy.dropout_share=0.45"], "raise honest_share"),
    ],
)
def test_what_secure_aggregation_cannot_do_is_refused_in_one_sentence(overrides, match):
    with pytest.raises(RecipeError, match=match):
        survey(load_recipe("quickstart", ["privacy.trust=secure-aggregation", *overrides]))


@pytest.mark.parametrize(("nodes", "threshold"), [(2, 2), (3, 3), (4, 3), (10, 8)])
def test_more_than_half_of_the_nodes_are_needed_to_the_end(nodes, threshold):
    recipe = load_recipe("quickstart", ["privacy.trust=secure-aggregation", f"federation.nodes={nodes}"])
    assert recipe.threshold == threshold > nodes / 2


def test_few_honest_contributors_are_warned_about():
    few = survey(load_recipe("quickstart", ["privacy.trust=secure-aggregation", "federation.sampling_rate=0.002"]))
    many = survey(load_recipe("quickstart", ["privacy.trust=secure-aggregation"]))
    assert any("are sure and honest" in sentence for sentence in few.warnings())
    assert many.warnings() == []
