"""The budget per round under PLD and RDP, each against a second method."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import (
    GaussianEvent,
    NonPrivateEvent,
    PoissonGaussianEvent,
    delta_pld,
    epsilon_gaussian,
    epsilon_pld,
    epsilon_rdp,
    to_dp_event,
)
from drencoder.privacy.budget_table import budget_table
from drencoder.privacy.make_plan import make_plan

DELTA = 1e-5
REFERENCE = make_plan(
    trust="central", population=100, sampling_rate=0.05, rounds=20, delta=DELTA, noise_multiplier=0.997
)
EVENTS = (PoissonGaussianEvent(0.05, 0.997, 20),)
FULL = make_plan(
    trust="central", population=3, sampling_rate=1.0, rounds=8, delta=DELTA, noise_multiplier=6.0,
    stage1_rate=1.0, stage1_noise_ratio=2.0,
)  # fmt: skip
LOCAL = make_plan(
    trust="local", population=1000, sampling_rate=0.02, rounds=20, delta=DELTA, noise_multiplier=1.5,
    stage1_rate=0.02, stage1_noise_ratio=2.0, participation_cap=3,
)  # fmt: skip
NON_PRIVATE = make_plan(
    trust="central", population=100, sampling_rate=0.05, rounds=4, delta=DELTA, stage1_rate=0.05,
    non_private=["stage1", "round"],
)  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return budget_table(REFERENCE, [0.7, 0.997, 2.0])


def test_the_reference_values_end_the_curve(reference):
    last = reference.budgets[1].last
    assert last.round == 20
    assert last.epsilon_pld == pytest.approx(2.00, abs=0.005)
    assert last.epsilon_rdp == pytest.approx(2.50, abs=0.005)
    assert last.epsilon_pld == REFERENCE.epsilons()["public"].epsilon_pld  # the plan's own number, to the last bit
    swapped = budget_table(REFERENCE, relation="replace_one").budgets[0].last
    assert swapped.epsilon_pld == pytest.approx(2.38, abs=0.005)
    assert swapped.epsilon_rdp is None


def test_budgets_grow_with_rounds_and_shrink_with_noise(reference):
    for field in ("epsilon_pld", "epsilon_rdp"):
        table = np.array([[getattr(point, field) for point in budget.points] for budget in reference.budgets])
        assert (np.diff(table, axis=1) > 0).all()
        assert (np.diff(table, axis=0) < 0).all()
    for budget in reference.budgets:
        assert [point.round for point in budget.points] == list(range(1, 21))
        for point in budget.points:
            assert point.epsilon_pld < point.epsilon_rdp


def test_rounds_before_the_last_are_bounds_and_the_stated_error_holds(reference):
    budget = reference.budgets[1]
    point = budget.points[9]
    fine = epsilon_pld([PoissonGaussianEvent(0.05, 0.997, 10)], DELTA, "add_remove", 1e-4)
    assert fine <= point.epsilon_pld <= fine + budget.grid_error + 1e-6
    assert 0 < budget.grid_error < 1e-3


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_kept_parts_give_what_dp_accounting_composes(relation):
    composed = [PoissonGaussianEvent(0.1, 2.0), PoissonGaussianEvent(0.05, 1.0, 7), GaussianEvent(6.0, 3)]
    neighbours = {"add_remove": 0, "replace_one": 1}
    relations = [PLDAccountant().neighboring_relation, type(PLDAccountant().neighboring_relation).REPLACE_ONE]
    accountant = PLDAccountant(relations[neighbours[relation]], 1e-3).compose(to_dp_event(composed))
    assert epsilon_pld(composed, DELTA, relation, 1e-3) == accountant.get_epsilon(DELTA)  # to the last digit
    for epsilon, delta in zip([0.5, 1.0, 2.0], delta_pld(composed, [0.5, 1.0, 2.0], relation, 1e-3), strict=True):
        assert delta == pytest.approx(accountant.get_delta(epsilon), rel=1e-9)
    assert delta_pld([], [0.0, 1.0], relation) == [0.0, 0.0]
    assert delta_pld([*composed, NonPrivateEvent()], [0.0, 9.0], relation) == [1.0, 1.0]


def test_kept_orders_give_what_the_rdp_accountant_composes():
    composed = [PoissonGaussianEvent(0.1, 2.0), PoissonGaussianEvent(0.05, 1.0, 7), GaussianEvent(6.0, 3)]
    truth = RdpAccountant().compose(to_dp_event(composed)).get_epsilon(DELTA)
    assert epsilon_rdp(composed, DELTA, "add_remove") == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize(("relation", "shift"), [("add_remove", 1.0), ("replace_one", 2.0)])
def test_full_participation_is_the_closed_form_in_every_round(relation, shift):
    table = budget_table(FULL, [3.0, 6.0], relation=relation)
    for budget in table.budgets:
        sigma, first = budget.noise_multiplier, budget.stage1_noise_multiplier
        assert first == pytest.approx(2 * sigma)  # the plan's ratio
        assert [point.round for point in budget.points] == list(range(9))
        for point in budget.points:
            mu = shift * math.sqrt(1 / first**2 + point.round / sigma**2)
            assert point.epsilon_pld == pytest.approx(epsilon_gaussian(mu, FULL.gaussian_delta), rel=1e-9)
            assert point.epsilon_pld <= point.epsilon_rdp
        assert budget.grid_error == 0


def test_a_sub_sampled_stage_1_is_the_first_point_and_the_last_is_the_plans_number():
    plan = dataclasses.replace(REFERENCE, stage1_rate=0.1, stage1_noise_multiplier=2.0, rounds=2)
    budget = budget_table(plan).budgets[0]
    assert budget.points[0].round == 0
    assert budget.points[0].epsilon_pld == pytest.approx(
        epsilon_pld([PoissonGaussianEvent(0.1, 2.0)], DELTA, "add_remove"), abs=2e-4
    )
    assert budget.last.epsilon_pld == plan.epsilons()["public"].epsilon_pld


@pytest.mark.parametrize("observer", ["server", "clients", "public"])
def test_local_trust_is_a_staircase_that_ends_at_the_plans_number(observer):
    table = budget_table(LOCAL, observer=observer)
    assert table.staircase
    points = table.budgets[0].points
    starts = [block[0] for block in LOCAL.blocks]  # 0, 7, 14
    moves = [b.round for a, b in itertools.pairwise(points) if b.epsilon_pld > a.epsilon_pld]
    assert moves == [1, *starts[1:]]  # round 1 has less noise than stage 1 and so is its block's dearest slot
    assert points[-1].epsilon_pld == LOCAL.epsilons()[observer].epsilon_pld


def test_many_rounds_are_thinned_and_quick():
    plan = make_plan(
        trust="central", population=10_000, sampling_rate=0.02, rounds=200, delta=DELTA, noise_multiplier=1.0,
        stage1_rate=0.02,
    )  # fmt: skip
    budget_table(REFERENCE)  # imports
    started = time.process_time()
    rounds = [point.round for point in budget_table(plan).budgets[0].points]
    assert time.process_time() - started < 10
    assert rounds[:2] == [0, 1]
    assert rounds[-1] == 200
    assert len(rounds) <= 26


def test_no_guarantee_is_infinite_everywhere():
    for table in (budget_table(NON_PRIVATE), budget_table(REFERENCE, [0.5, 1.0], observer="server")):
        for budget in table.budgets:
            assert all(point.epsilon_pld == math.inf == point.epsilon_rdp for point in budget.points)
            assert budget.grid_error == 0
        assert json.dumps(table.to_dict(), allow_nan=False).count('"inf"') >= 8
    assert "NON-PRIVATE" in budget_table(NON_PRIVATE).assumption
    half = make_plan(
        trust="central", population=100, sampling_rate=0.05, rounds=2, delta=DELTA, noise_multiplier=1.0,
        stage1_rate=0.05, non_private=["round"],
    )  # fmt: skip
    points = budget_table(half).budgets[0].points
    assert math.isfinite(points[0].epsilon_pld)  # stage 1 by itself has noise
    assert points[1].epsilon_pld == points[2].epsilon_pld == math.inf


def test_a_table_is_json_of_its_numbers(reference):
    data = json.loads(json.dumps(reference.to_dict(), allow_nan=False))
    last = data["budgets"][1]["points"][-1]
    assert last == {
        "round": 20,
        "epsilon_pld": reference.budgets[1].last.epsilon_pld,
        "epsilon_rdp": last["epsilon_rdp"],
    }
    assert data["delta"] == DELTA


@pytest.mark.parametrize(
    ("plan", "sigmas", "options", "words"),
    [
        (REFERENCE, [], {}, "1 to 8"),
        (REFERENCE, [1.0 + i for i in range(9)], {}, "name fewer"),
        (REFERENCE, [0.0], {}, "positive and finite"),
        (REFERENCE, [-1.0], {}, "positive and finite"),
        (REFERENCE, [math.inf], {}, "positive and finite"),
        (REFERENCE, [math.nan], {}, "positive and finite"),
        (NON_PRIVATE, [1.0], {}, "leave them out"),
        (REFERENCE, [1.0], {"observer": "press"}, "server, clients, public"),
        (REFERENCE, [1.0], {"relation": "edit"}, "add_remove, replace_one"),
    ],
)
def test_refusals_say_value_bound_and_cure(plan, sigmas, options, words):
    with pytest.raises(PrivacyError, match=words):
        budget_table(plan, sigmas, **options)
