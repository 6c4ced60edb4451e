"""The budget per round under four accountants, and trade-off functions, each against a second method."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import integrate, stats

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import (
    GaussianEvent,
    NonPrivateEvent,
    PoissonGaussianEvent,
    delta_pld,
    epsilon_gaussian,
    epsilon_pld,
    epsilon_rdp,
    epsilons_pld,
    to_dp_event,
)
from drencoder.privacy.curves import ACCOUNTANTS, budget_curves, composed_events, events_text, mu_conversion
from drencoder.privacy.plan import make_plan
from drencoder.privacy.tradeoff import (
    best_tradeoff,
    gaussian_tradeoff,
    max_auc,
    pld_tradeoff,
    point_tradeoff,
    tradeoffs,
)

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
    return budget_curves(REFERENCE, [0.7, 0.997, 2.0])


def test_the_reference_values_end_the_curve(reference):
    last = reference.curves[1].last
    assert last.round == 20
    assert last.epsilon_pld == pytest.approx(2.00, abs=0.005)
    assert last.epsilon_rdp == pytest.approx(2.50, abs=0.005)
    assert last.epsilon_clt == pytest.approx(1.11, abs=0.005)
    assert last.mu is None
    assert last.epsilon_gdp is None
    assert last.epsilon_pld == REFERENCE.epsilons()["public"].epsilon_pld  # the plan's own number, to the last bit
    swapped = budget_curves(REFERENCE, relation="replace_one").curves[0].last
    assert swapped.epsilon_pld == pytest.approx(2.38, abs=0.005)
    assert swapped.epsilon_rdp is None
    assert swapped.epsilon_clt is None


def test_budgets_grow_with_rounds_and_shrink_with_noise(reference):
    for field in ("epsilon_pld", "epsilon_rdp", "epsilon_clt"):
        table = np.array([[getattr(point, field) for point in curve.points] for curve in reference.curves])
        assert (np.diff(table, axis=1) > 0).all()
        assert (np.diff(table, axis=0) < 0).all()
    for curve in reference.curves:
        assert [point.round for point in curve.points] == list(range(1, 21))
        for point in curve.points:
            assert point.epsilon_clt < point.epsilon_pld < point.epsilon_rdp  # here the limit claims too little


def test_rounds_before_the_last_are_bounds_and_the_stated_error_holds(reference):
    curve = reference.curves[1]
    point = curve.points[9]
    fine = epsilon_pld([PoissonGaussianEvent(0.05, 0.997, 10)], DELTA, "add_remove", 1e-4)
    assert fine <= point.epsilon_pld <= fine + curve.grid_error + 1e-6
    assert 0 < curve.grid_error < 1e-3


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_kept_parts_give_what_dp_accounting_composes(relation):
    composed = [PoissonGaussianEvent(0.1, 2.0), PoissonGaussianEvent(0.05, 1.0, 7), GaussianEvent(6.0, 3)]
    kept = epsilons_pld([composed], DELTA, relation, 1e-3)
    assert kept == pytest.approx([epsilon_pld(composed, DELTA, relation, 1e-3)], rel=1e-9)
    neighbours = {"add_remove": 0, "replace_one": 1}
    relations = [PLDAccountant().neighboring_relation, type(PLDAccountant().neighboring_relation).REPLACE_ONE]
    accountant = PLDAccountant(relations[neighbours[relation]], 1e-3).compose(to_dp_event(composed))
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
    curves = budget_curves(FULL, [3.0, 6.0], relation=relation)
    for curve in curves.curves:
        sigma, first = curve.noise_multiplier, curve.stage1_noise_multiplier
        assert first == pytest.approx(2 * sigma)  # the plan's ratio
        assert [point.round for point in curve.points] == list(range(9))
        for point in curve.points:
            mu = shift * math.sqrt(1 / first**2 + point.round / sigma**2)
            assert point.mu == pytest.approx(mu, rel=1e-12)
            assert point.epsilon_gdp == pytest.approx(epsilon_gaussian(mu, DELTA), rel=1e-9)
            assert point.epsilon_pld == pytest.approx(point.epsilon_gdp, rel=1e-9)
            assert point.epsilon_pld <= point.epsilon_rdp
            assert point.epsilon_clt is None
        assert [part.name for part in curve.parts] == ["stage 1", "rounds 1 to 8"]
        assert sum(part.mu**2 for part in curve.parts) == pytest.approx(curve.last.mu**2, rel=1e-12)
        assert curve.grid_error == 0


def test_sub_sampled_parts_are_listed_and_only_the_limit_adds_up():
    plan = dataclasses.replace(REFERENCE, stage1_rate=0.1, stage1_noise_multiplier=2.0, rounds=2)
    curve = budget_curves(plan).curves[0]
    assert [part.events for part in curve.parts] == [
        "1 x Gaussian(sigma = 2), Poisson q = 0.1",
        "2 x Gaussian(sigma = 0.997), Poisson q = 0.05",
    ]
    assert all(part.mu is None for part in curve.parts)
    assert sum(part.mu_clt**2 for part in curve.parts) == pytest.approx(curve.last.mu_clt**2, rel=1e-12)
    assert curve.points[0].epsilon_pld == pytest.approx(
        epsilon_pld([PoissonGaussianEvent(0.1, 2.0)], DELTA, "add_remove"), abs=2e-4
    )
    assert curve.last.epsilon_pld == plan.epsilons()["public"].epsilon_pld


@pytest.mark.parametrize("observer", ["server", "clients", "public"])
def test_local_trust_is_a_staircase_that_ends_at_the_plans_number(observer):
    curves = budget_curves(LOCAL, observer=observer)
    assert curves.staircase
    points = curves.curves[0].points
    starts = [block[0] for block in LOCAL.blocks]  # 0, 7, 14
    moves = [b.round for a, b in itertools.pairwise(points) if b.epsilon_pld > a.epsilon_pld]
    assert moves == [1, *starts[1:]]  # round 1 has less noise than stage 1 and so is its block's dearest slot
    assert points[-1].epsilon_pld == LOCAL.epsilons()[observer].epsilon_pld
    assert points[-1].mu == pytest.approx(LOCAL.epsilons()[observer].mu)
    assert sum(part.mu**2 for part in curves.curves[0].parts) == pytest.approx(points[-1].mu ** 2)


def test_many_rounds_are_thinned_and_quick():
    plan = make_plan(
        trust="central", population=10_000, sampling_rate=0.02, rounds=200, delta=DELTA, noise_multiplier=1.0,
        stage1_rate=0.02,
    )  # fmt: skip
    budget_curves(REFERENCE)  # imports
    started = time.process_time()
    rounds = [point.round for point in budget_curves(plan).curves[0].points]
    assert time.process_time() - started < 10
    assert rounds[:2] == [0, 1]
    assert rounds[-1] == 200
    assert len(rounds) <= 26


def test_no_guarantee_is_infinite_everywhere():
    for curves in (budget_curves(NON_PRIVATE), budget_curves(REFERENCE, [0.5, 1.0], observer="server")):
        for curve in curves.curves:
            assert all(point.epsilon_pld == math.inf == point.epsilon_rdp for point in curve.points)
            assert all(point.epsilon_clt is None for point in curve.points)
            assert curve.grid_error == 0
        assert json.dumps(curves.to_dict(), allow_nan=False).count('"inf"') >= 8
    assert "NON-PRIVATE" in budget_curves(NON_PRIVATE).assumption
    half = make_plan(
        trust="central", population=100, sampling_rate=0.05, rounds=2, delta=DELTA, noise_multiplier=1.0,
        stage1_rate=0.05, non_private=["round"],
    )  # fmt: skip
    points = budget_curves(half).curves[0].points
    assert math.isfinite(points[0].epsilon_pld)  # stage 1 by itself has noise
    assert points[1].epsilon_pld == points[2].epsilon_pld == math.inf


def test_curves_say_which_numbers_are_guarantees(reference):
    data = json.loads(json.dumps(reference.to_dict(), allow_nan=False))
    assert data["is_guarantee"] == {
        "epsilon_pld": True,
        "epsilon_rdp": True,
        "epsilon_gdp": True,
        "epsilon_clt": False,
    }
    assert data["curves"][1]["points"][-1]["epsilon_pld"] == reference.curves[1].last.epsilon_pld
    assert {a.field for a in ACCOUNTANTS} < set(data["curves"][0]["points"][0])
    assert data["delta"] == DELTA


def test_conversion_and_words():
    for mu, epsilon in mu_conversion([0.1, 1.0, 4.0], DELTA):  # Balle & Wang 2018, theorem 8
        delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(DELTA, rel=1e-4)
    assert (
        events_text([GaussianEvent(2.0), NonPrivateEvent(2)]) == "1 x Gaussian(sigma = 2) + 2 x release without noise"
    )
    assert events_text([]) == "nothing"


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
        budget_curves(plan, sigmas, **options)
    if options:
        with pytest.raises(PrivacyError, match=words):
            tradeoffs(plan, **options)


# Trade-off functions

ALPHAS = np.concatenate([np.logspace(-8, -1, 150), np.linspace(0.1, 0.9999, 150)])


def beta_at(curve, alphas):
    return np.interp(alphas, curve.alpha, curve.beta)


def gaussian(mu, alphas):
    return stats.norm.cdf(stats.norm.ppf(1 - alphas) - mu)


def check_shape(curve):
    alpha, beta = np.array(curve.alpha), np.array(curve.beta)
    assert alpha[0] == 0
    assert (alpha[-1], beta[-1]) == (1, 0)
    assert (np.diff(alpha) >= 0).all()
    assert (np.diff(beta) <= 0).all()
    wide = np.diff(alpha) > 1e-9
    slopes = np.diff(beta)[wide] / np.diff(alpha)[wide]
    assert (np.diff(slopes) > -1e-5 * (1 + np.abs(slopes[1:]))).all()  # convex
    assert np.interp(beta_at(curve, ALPHAS), curve.alpha, curve.beta) == pytest.approx(ALPHAS, abs=1e-9)  # symmetric
    assert (alpha + beta <= 1 + 1e-12).all()
    area = integrate.trapezoid(beta, alpha)
    assert curve.auc == pytest.approx(1 - area, abs=1e-4)
    assert curve.advantage == pytest.approx(np.max(1 - alpha - beta), abs=1e-4)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 3.0, 8.0])
def test_the_gaussian_curve_is_its_closed_form_from_below(mu):
    curve = gaussian_tradeoff(mu)
    check_shape(curve)
    gap = gaussian(mu, ALPHAS) - beta_at(curve, ALPHAS)
    assert gap.min() > -1e-12
    assert gap.max() < 1e-4
    assert curve.auc == pytest.approx(stats.norm.cdf(mu / math.sqrt(2)), rel=1e-12)
    assert curve.advantage == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, rel=1e-9)


@pytest.mark.parametrize(("relation", "shift"), [("add_remove", 1.0), ("replace_one", 2.0)])
@pytest.mark.parametrize(("sigma", "count"), [(1.0, 1), (5.0, 8)])
def test_the_plds_curve_is_the_closed_form_where_nothing_is_sub_sampled(relation, shift, sigma, count):
    mu = shift * math.sqrt(count) / sigma
    curve = pld_tradeoff([PoissonGaussianEvent(1.0, sigma, count)], relation)
    check_shape(curve)
    gap = gaussian(mu, ALPHAS) - beta_at(curve, ALPHAS)
    assert gap.min() > -1e-9  # pessimistic
    assert gap.max() < 1e-4
    assert 0 <= curve.auc - stats.norm.cdf(mu / math.sqrt(2)) < 1e-5
    exact = best_tradeoff([PoissonGaussianEvent(1.0, sigma, count)], relation)
    assert exact.label == "exact GDP"
    assert exact.auc == pytest.approx(curve.auc, abs=1e-5)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_one_sub_sampled_round_by_integration(relation):
    # The likelihood-ratio test of the dominating pair by its densities: N(0) against (1 - q) N(0) + q N(1), and for
    # replacing (1 - q) N(0) + q N(-1) against (1 - q) N(0) + q N(1). Both ratios grow with x: tests are thresholds.
    q, sigma = 0.3, 0.7
    x = np.linspace(-8, 9, 4001)
    tail = lambda shift: (1 - q) * stats.norm.sf(x, 0, sigma) + q * stats.norm.sf(x, shift, sigma)  # noqa: E731
    alpha = stats.norm.sf(x, 0, sigma) if relation == "add_remove" else tail(-1.0)
    beta = 1 - tail(1.0)
    curve = pld_tradeoff([PoissonGaussianEvent(q, sigma)], relation)
    check_shape(curve)
    assert (beta - beta_at(curve, alpha)).min() > -1e-6
    # The curve bounds adding and removing at once, so it touches this test's curve or its mirror image.
    mirrored = np.interp(alpha, beta, alpha)
    gap = np.minimum(beta, mirrored) - beta_at(curve, alpha)
    advantage = np.max(1 - alpha - beta)
    assert curve.advantage == pytest.approx(advantage, abs=1e-4)
    if relation == "replace_one":
        assert gap.max() < 1e-4


def test_no_likelihood_ratio_attack_beats_the_sub_sampled_curve():
    # 20 rounds of q = 0.05: membership guessed from the exact likelihood ratio, the best statistic there is.
    rng, trials, q, sigma = np.random.default_rng(7), 200_000, 0.05, 0.997

    def scores(member):
        total = np.zeros(trials)
        for _ in range(20):
            x = sigma * rng.standard_normal(trials)
            if member:
                x += rng.random(trials) < q
            total += np.log1p(q * np.expm1((x - 0.5) / sigma**2))
        return total

    outside, inside = np.sort(scores(member=False)), np.sort(scores(member=True))
    curve, half = pld_tradeoff(EVENTS, "add_remove"), pld_tradeoff([PoissonGaussianEvent(q, sigma, 10)], "add_remove")
    for alpha in (1e-3, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        threshold = outside[int((1 - alpha) * trials)]
        power = 1 - np.searchsorted(inside, threshold) / trials
        sigmas = 6 * math.hypot(math.sqrt(power / trials), power / alpha * math.sqrt(alpha / trials))
        assert power <= 1 - curve.beta_at(alpha) + sigmas
        if alpha == 0.3:  # the same attack refutes the curve of half the rounds, so this test can tell
            assert power > 1 - half.beta_at(alpha) + sigmas
    rates = np.searchsorted(inside, outside)
    auc = 1 - rates.mean() / trials
    assert auc <= curve.auc + 6 * 0.3 / math.sqrt(trials)
    assert auc > 0.5 + 0.9 * (curve.auc - 0.5)  # the bound is nearly reached


def test_the_reported_pair_touches_the_curve():
    found = tradeoffs(REFERENCE)
    assert found.whole.label == "PLD"
    check_shape(found.whole)
    check_shape(found.point)
    epsilon = REFERENCE.epsilons()["public"].epsilon_pld
    alphas = np.array(found.whole.alpha)
    gap = np.array(found.whole.beta) - beta_at(found.point, alphas)
    assert gap.min() > -1e-6
    # Its steep line 1 - delta - e^epsilon alpha is a tangent.
    assert np.min(np.array(found.whole.beta) + math.exp(epsilon) * alphas) == pytest.approx(1 - DELTA, abs=1e-6)
    assert found.point.auc > found.whole.auc + 0.2
    assert (found.limit.is_guarantee, found.whole.is_guarantee, found.point.is_guarantee) == (False, True, True)
    assert found.whole.beta_at(1e-4) < found.limit.beta_at(1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_pair_by_hand():
    curve = point_tradeoff(1.0, 0.1)
    for alpha in np.linspace(0, 1, 101):  # Dong et al. 2019, equation 5
        by_hand = max(0.0, 0.9 - math.e * alpha, (0.9 - alpha) / math.e)
        assert curve.beta_at(alpha) == pytest.approx(by_hand, abs=1e-12)
    assert curve.advantage == pytest.approx(1 - 2 * 0.9 / (1 + math.e))


def test_the_largest_auc():
    assert max_auc([], "add_remove") == 0.5
    assert max_auc([GaussianEvent(2.0, 3), NonPrivateEvent()], "add_remove") == 1.0
    assert max_auc([GaussianEvent(2.0, 3)], "add_remove") == pytest.approx(
        stats.norm.cdf(math.sqrt(3) / 2 / math.sqrt(2))
    )
    assert max_auc([GaussianEvent(2.0, 3)], "replace_one") == pytest.approx(stats.norm.cdf(math.sqrt(3 / 2)))
    assert max_auc([GaussianEvent(0.001)], "add_remove") == 1.0
    fewer, more = (max_auc([PoissonGaussianEvent(0.05, 1.0, n)], "add_remove") for n in (5, 50))
    assert 0.5 < fewer < more < max_auc([GaussianEvent(1.0, 50)], "add_remove")
    assert max_auc(EVENTS, "replace_one") > max_auc(EVENTS, "add_remove")
    weak = max_auc([PoissonGaussianEvent(0.01, 1000.0)], "add_remove")
    assert 0.5 <= weak < 0.5001


def test_tradeoffs_of_plans_without_and_with_exact_gdp():
    nothing = tradeoffs(NON_PRIVATE)
    assert nothing.whole.auc == nothing.point.auc == nothing.whole.advantage == 1.0
    assert nothing.limit is None
    server = tradeoffs(REFERENCE, observer="server")
    assert server.whole.auc == 1.0
    full = tradeoffs(FULL)
    assert full.limit is None
    assert full.whole.auc == max_auc(composed_events(FULL, "public"), "add_remove")
    assert tradeoffs(REFERENCE, relation="replace_one").limit is None
