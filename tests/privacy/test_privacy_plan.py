"""A plan states sampler, noise and events together, and costs what METHOD.md says."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import (
    GaussianEvent,
    NonPrivateEvent,
    PoissonGaussianEvent,
    epsilon_gaussian,
    epsilon_pld,
)
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import BoundedSum, clip_rows
from drencoder.privacy.plan import PrivacyPlan
from drencoder.privacy.sampling import CappedSampler, PoissonSampler

CENTRAL = {
    "trust": "central",
    "population": 10_000,
    "sampling_rate": 0.02,
    "rounds": 20,
    "stage1_rate": 0.02,
    "delta": 1e-5,
    "epsilon": 6.0,
}
LOCAL = {**CENTRAL, "trust": "local"}


def test_central_composes_stage_1_with_every_round():
    plan = make_plan(**CENTRAL, stage1_noise_ratio=2.0)
    assert plan.stage1_noise_multiplier == 2 * plan.noise_multiplier
    whole = (
        PoissonGaussianEvent(0.02, 2 * plan.noise_multiplier),
        PoissonGaussianEvent(0.02, plan.noise_multiplier, 20),
    )
    views = plan.epsilons()
    assert views["server"].epsilon_pld == math.inf
    assert "No guarantee" in views["server"].assumption
    for name in ("clients", "public"):
        assert views[name].events == whole
        assert 5.998 < views[name].epsilon_pld <= 6.0
        assert views[name].epsilon_rdp > 6
        assert views[name].epsilon_clt_approx < 6  # below the truth, hence no guarantee
        assert views[name].mu is None
        assert views[name].by_relation["replace_one"].epsilon_pld > 6
    # The rounds by themselves cost less: stage 1 is not free.
    assert epsilon_pld(whole[1:], 1e-5, "add_remove") < views["public"].epsilon_pld - 5e-4


def test_local_with_cap_1_pays_for_one_release_only():
    plan = make_plan(**LOCAL)
    assert plan.blocks == (tuple(range(21)),)
    views = plan.epsilons()
    assert views["server"].events == (GaussianEvent(plan.noise_multiplier),)
    assert 6 - 1e-4 < views["server"].epsilon_pld <= 6
    assert plan == dataclasses.replace(make_plan(**{**LOCAL, "rounds": 40}), rounds=20)  # more rounds, same noise
    m = plan.cohort_bound(1)
    assert 130 < m < 200  # 200 expected, standard deviation 14, the one-in-a-million quantile
    assert views["public"].epsilon_pld == pytest.approx(
        epsilon_gaussian(1 / (plan.noise_multiplier * math.sqrt(m)), plan.gaussian_delta), rel=1e-9
    )
    assert views["public"].epsilon_pld < views["clients"].epsilon_pld < views["server"].epsilon_pld


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_local_cap_composes_the_worst_slots_of_the_blocks(ratio):
    plan = make_plan(**LOCAL, participation_cap=3, stage1_noise_ratio=ratio)
    sigma = plan.noise_multiplier
    worst_first = min(1.0, ratio) * sigma
    mu = math.sqrt(1 / worst_first**2 + 2 / sigma**2)
    assert plan.epsilons()["server"].mu == pytest.approx(mu, rel=1e-12)
    assert plan.epsilons()["server"].epsilon_pld == pytest.approx(6.0, abs=1e-4)


def test_local_cap_above_the_schedule_is_every_slot():
    plan = make_plan(
        trust="local", population=3, sampling_rate=1.0, rounds=8, delta=1e-5, epsilon=2.0, participation_cap=50
    )
    assert plan.epsilons()["server"].mu == pytest.approx(math.sqrt(8) / plan.noise_multiplier)
    assert plan.epsilons()["public"].events == (GaussianEvent(plan.noise_multiplier * math.sqrt(3), 8),)
    assert plan.epsilons()["clients"].events == (GaussianEvent(plan.noise_multiplier * math.sqrt(2), 8),)


def test_decoding_one_by_one_gives_up_the_others_noise():
    # decode(code_1 + noise_1) + decode(code_2 + noise_2) is no function of the sum of noised codes.
    views = make_plan(**{**LOCAL, "stage1_rate": 0.0}, nonlinear_decoding=True).epsilons()
    assert views["public"].epsilon_pld == views["clients"].epsilon_pld == views["server"].epsilon_pld
    with_moments = make_plan(**LOCAL, participation_cap=2, nonlinear_decoding=True)
    bound, sigma = with_moments.cohort_bound(0), with_moments.noise_multiplier
    first_block = with_moments.composition("public", {0: (1, bound)})
    assert first_block == (GaussianEvent(sigma * math.sqrt(bound)),)  # moments are summed as they come
    assert views["public"].by_relation.keys() == {"add_remove", "replace_one"}


def test_one_contributor_protects_nobody_but_itself():
    plan = make_plan(**LOCAL)
    alone = {1: (1, 1)}
    views = {name: plan.composition(name, alone) for name in ("server", "clients", "public")}
    assert views["server"] == views["public"] == views["clients"] == (GaussianEvent(plan.noise_multiplier),)


def test_replace_one_pays_for_twice_the_shift():
    one, two = make_plan(**LOCAL), make_plan(**LOCAL, relation="replace_one")
    assert two.noise_multiplier == pytest.approx(2 * one.noise_multiplier, rel=1e-9)
    central = make_plan(**CENTRAL, relation="replace_one")
    assert 5.998 < central.epsilons()["public"].epsilon_pld <= 6
    assert central.noise_multiplier > make_plan(**CENTRAL).noise_multiplier


def test_full_participation_is_exact_gdp():
    plan = make_plan(
        trust="central", population=3, sampling_rate=1.0, rounds=8, delta=1e-5, epsilon=2.0, stage1_rate=1.0
    )
    view = plan.epsilons()["public"]
    assert view.mu == pytest.approx(3 / plan.noise_multiplier)
    assert view.epsilon_pld == pytest.approx(2.0, abs=1e-4)
    assert view.epsilon_pld <= 2.0
    assert view.epsilon_clt_approx is None


def test_k_star_reproduces_the_method():
    plan = make_plan(**{**CENTRAL, "population": 100, "sampling_rate": 0.05, "stage1_rate": 0.0, "epsilon": 2.0})
    assert plan.k_star() == pytest.approx(0.5 * 25 / plan.noise_multiplier**2)
    assert plan.k_star() == pytest.approx(13, abs=1)  # METHOD 2.5
    local = make_plan(**LOCAL)
    assert local.k_star(1.0) == pytest.approx(200 / local.noise_multiplier**2)


def test_the_denominator_is_the_same_for_both_neighbours_and_one_that_is_not_doubles_what_a_client_moves():
    """N in qN is public: the client that is removed leaves a registered client without text (arXiv 2605.15648)."""
    clip, rate, population = 0.5, 0.2, 200
    plan = make_plan(
        trust="central", population=population, sampling_rate=rate, rounds=1, delta=1e-5, noise_multiplier=1.0
    )
    rows = torch.zeros(population, 4)
    rows[:, 0] = clip * (1 - 1e-6)
    rows[0] *= -1  # the client that is removed stands against all others
    whole = BoundedSum.zero(4, clip).add(clip_rows(rows, clip))
    less = BoundedSum.zero(4, clip).add(clip_rows(rows[1:], clip))
    silent = BoundedSum.zero(4, clip).add(clip_rows(torch.cat([torch.zeros(1, 4), rows[1:]]), clip))
    assert torch.equal(less.steps_V, silent.steps_V)  # without text is as good as not there
    bound = whole.sensitivity("add_remove") / (rate * population)
    assert (
        plan.denominator(1) == plan.expected_cohort == rate * population
    )  # of the plan, which has no cohort and no data
    moved = (whole.sum_V - less.sum_V) / plan.denominator(1)
    assert bound * (1 - 1e-3) < moved.norm() <= bound
    # An expected size that is counted from the data, as it is without the client, breaks the bound that noise is scaled to.
    counted = whole.sum_V / (rate * population) - less.sum_V / (rate * (population - 1))
    assert counted.norm() > 1.9 * bound


def test_samplers_and_denominators_come_from_the_plan():
    key = bytes(32)
    central, local = make_plan(**CENTRAL), make_plan(**LOCAL)
    assert isinstance(central.sampler(key), PoissonSampler)
    assert isinstance(local.sampler(key), CappedSampler)
    assert central.expected_cohort == 200.0 == central.stage1_cohort
    assert len(central.sampler(key).cohort(1)) != 200  # so the fixed denominator is not the realised one
    assert central.sampler(key).cohort(1, 0) != central.sampler(key).cohort(1, 1)
    replayed = make_plan(**CENTRAL, noise="replay")
    assert replayed.sampler(key).cohort(1, 0) == replayed.sampler(key).cohort(1, 1)
    assert "NOT PRIVATE" in replayed.epsilons()["public"].assumption


@pytest.mark.parametrize("trust", ["local", "central"])
def test_a_stage_without_noise_leaves_the_others_budget_as_it_is(trust):
    # FedCG: stage 1 sends real gradients. Its clients are not those of the rounds, and must not hide what these pay.
    silent = make_plan(**{**CENTRAL, "trust": trust}, non_private=("stage1",))
    alone = make_plan(**{**CENTRAL, "trust": trust, "stage1_rate": 0.0})
    assert silent.noise_multiplier == alone.noise_multiplier > 0
    assert silent.stage1_noise_multiplier == 0
    assert silent.budget_events(dict.fromkeys(silent.slots, 1)) == alone.budget_events(dict.fromkeys(alone.slots, 1))
    assert silent.epsilons()["public"].epsilon_pld == math.inf
    assert silent.epsilons()["server"].epsilon_pld == math.inf


def test_non_private_stages_are_named_and_infinite():
    stage1 = make_plan(**CENTRAL, non_private=["stage1"])
    assert stage1.event(0) == NonPrivateEvent()
    assert stage1.epsilons()["public"].epsilon_pld == math.inf
    assert "NON-PRIVATE" in stage1.epsilons()["public"].assumption
    assert 5.998 < epsilon_pld((stage1.event(1),) * 20, 1e-5, "add_remove") <= 6  # the rest keeps the budget
    nothing = make_plan(**{**CENTRAL, "epsilon": None}, non_private=["stage1", "round"])
    assert nothing.noise_multiplier == 0.0
    assert all(view.epsilon_pld == math.inf for view in nothing.epsilons().values())
    assert json.dumps(nothing.epsilons()["public"].to_dict(), allow_nan=False).count('"inf"') > 2


@pytest.mark.parametrize("change", [{}, {"trust": "local", "participation_cap": 2}, {"non_private": ("stage1",)}])
def test_plans_survive_a_round_trip(change):
    plan = make_plan(**{**CENTRAL, **change})
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(PrivacyError, match="extra"):
        PrivacyPlan.from_dict({**plan.to_dict(), "extra": 1})
    with pytest.raises(PrivacyError, match="non_private"):
        PrivacyPlan.from_dict({**plan.to_dict(), "noise_multiplier": 0.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trust": "server"}, "local, central"),
        ({"relation": "edit"}, "add_remove, replace_one"),
        ({"population": 0}, "at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"rounds": 2.5}, "whole number"),
        ({"participation_cap": 0}, "at least 1"),
        ({"sampling_rate": 0.0}, r"\(0, 1\]"),
        ({"sampling_rate": 1.2}, r"\(0, 1\]"),
        ({"stage1_rate": -0.1}, r"\[0, 1\]"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"delta": 1e-3}, "1 / population"),
        ({"epsilon": 0.0}, "positive and finite"),
        ({"epsilon": math.nan}, "positive and finite"),
        ({"epsilon": None}, "one of them is needed"),
        ({"noise_multiplier": 0.0}, "non_private"),
        ({"noise_multiplier": 0.1}, "costs epsilon"),
        ({"stage1_noise_ratio": 0.0}, "positive and finite"),
        ({"non_private": ["prior"]}, "stage1 and round"),
        ({"non_private": ["stage1", "round"]}, "drop it"),
        ({"trust": "local", "sampling_rate": 0.2}, "raise the participation cap"),
    ],
)
def test_refusals_say_value_bound_and_cure(change, words):
    with pytest.raises(PrivacyError, match=words):
        make_plan(**{**CENTRAL, **change})


def test_planning_imports_no_torch_and_importing_is_quick():
    code = (
        "import sys; import drencoder.privacy.ledger as l; assert 'scipy' not in sys.modules;"
        "from drencoder.privacy.make_plan import make_plan;"
        "make_plan(trust='central', population=10000, sampling_rate=0.02, rounds=20, delta=1e-5, epsilon=6.0).epsilons();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
