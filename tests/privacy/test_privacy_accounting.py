"""Events are data, and every epsilon agrees with a second method."""

import json
import logging
import math
import warnings

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import (
    GaussianEvent,
    NonPrivateEvent,
    PoissonGaussianEvent,
    clt_mu,
    epsilon_gaussian,
    epsilon_pld,
    epsilon_rdp,
    event_to_dict,
    gdp_mu,
    merge,
    sigma_gaussian,
    to_dp_event,
)
from drencoder.privacy.calibration import sigma_for

REFERENCE = (PoissonGaussianEvent(0.05, 0.997, 20),)  # N = 100, q = 0.05, T = 20 of METHOD.md
DELTA = 1e-5

positive = st.floats(1e-3, 1e3)
events = st.one_of(
    st.builds(GaussianEvent, positive, st.integers(1, 99)),
    st.builds(PoissonGaussianEvent, st.floats(1e-6, 1.0), positive, st.integers(1, 99)),
    st.builds(NonPrivateEvent, st.integers(1, 99)),
)


@given(events)
def test_events_are_json_that_says_all_of_them(event):
    facts = json.loads(json.dumps(event_to_dict(event)))
    kinds = {"gaussian": GaussianEvent, "poisson_gaussian": PoissonGaussianEvent, "non_private": NonPrivateEvent}
    assert kinds[facts.pop("kind")](**facts) == event


@pytest.mark.parametrize("event", [GaussianEvent(0.0), GaussianEvent(1.0, 0), PoissonGaussianEvent(1.1, 1.0)])
def test_impossible_events_raise(event):
    with pytest.raises(PrivacyError, match="A privacy event has"):
        to_dp_event([event])


def test_reference_values():
    assert epsilon_pld(REFERENCE, DELTA, "add_remove") == pytest.approx(2.00, abs=0.005)
    assert epsilon_rdp(REFERENCE, DELTA, "add_remove") == pytest.approx(2.50, abs=0.005)
    assert epsilon_gaussian(clt_mu(REFERENCE), DELTA) == pytest.approx(1.11, abs=0.005)
    assert epsilon_pld(REFERENCE, DELTA, "replace_one") == pytest.approx(2.38, abs=0.005)
    assert gdp_mu(REFERENCE, "add_remove") is None
    assert epsilon_rdp(REFERENCE, DELTA, "replace_one") is None


def test_opacus_agrees():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(0.997, 0.05, 20)]
        prv_epsilon = prv.get_epsilon(DELTA, eps_error=0.005)
        rdp_epsilon = rdp.get_epsilon(DELTA)
    assert epsilon_pld(REFERENCE, DELTA, "add_remove") == pytest.approx(prv_epsilon, abs=0.006)
    assert epsilon_rdp(REFERENCE, DELTA, "add_remove") == pytest.approx(rdp_epsilon, rel=0.02)


def test_one_poisson_step_by_integration():
    # delta(epsilon) of the dominating pairs by quadrature, for both adjacencies.
    q, sigma, epsilon = 0.1, 0.8, 1.2
    density = stats.norm.pdf

    def delta(upper_fn, lower_fn):
        gap = lambda x: max(0.0, upper_fn(x) - math.exp(epsilon) * lower_fn(x))  # noqa: E731
        return integrate.quad(gap, -12, 12, limit=500, points=[-1, 0, 1, 2])[0]

    def mixed(shift):
        return lambda x: (1 - q) * density(x, 0, sigma) + q * density(x, shift, sigma)

    empty = lambda x: density(x, 0, sigma)  # noqa: E731
    truth = {
        "add_remove": max(delta(mixed(1), empty), delta(empty, mixed(1))),
        "replace_one": delta(mixed(1), mixed(-1)),
    }
    for relation, wanted in truth.items():
        found = epsilon_pld([PoissonGaussianEvent(q, sigma)], wanted, relation)
        assert found == pytest.approx(epsilon, abs=2e-4)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_gaussian_compositions_are_exact(relation):
    composed = [GaussianEvent(4.0, 3), GaussianEvent(2.5), PoissonGaussianEvent(1.0, 5.0, 2)]
    shift = 1 if relation == "add_remove" else 2
    mu = shift * math.sqrt(3 / 16 + 1 / 6.25 + 2 / 25)
    assert gdp_mu(composed, relation) == pytest.approx(mu, rel=1e-12)

    def delta_at(eps):  # Balle & Wang 2018, theorem 8
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)

    by_hand = optimize.brentq(lambda eps: delta_at(eps) - DELTA, 0, 60)
    exact = epsilon_pld(composed, DELTA, relation)
    assert exact == pytest.approx(by_hand, abs=1e-6)
    neighbours = getattr(dp.NeighboringRelation, relation.upper().replace("ADD_", "ADD_OR_") + "_ONE" * (shift == 1))
    grid = PLDAccountant(neighbours).compose(to_dp_event(composed)).get_epsilon(DELTA)
    assert exact == pytest.approx(grid, abs=1e-6)
    assert exact < epsilon_rdp(composed, DELTA, relation) < 1.25 * exact + 0.1


def test_the_quick_grid_is_an_upper_bound_and_close():
    for relation in ("add_remove", "replace_one"):
        fine = epsilon_pld(REFERENCE, DELTA, relation, 1e-4)
        assert fine <= epsilon_pld(REFERENCE, DELTA, relation) <= fine + 3e-4
        assert fine <= epsilon_pld(REFERENCE, DELTA, relation, 1e-2) + 1e-9


def test_non_private_and_empty_compositions():
    for relation in ("add_remove", "replace_one"):
        mixed = [GaussianEvent(9.0), NonPrivateEvent()]
        assert epsilon_pld(mixed, DELTA, relation) == math.inf == epsilon_rdp(mixed, DELTA, relation)
        assert epsilon_pld([], DELTA, relation) == 0 == epsilon_rdp([], DELTA, relation)
    assert clt_mu([NonPrivateEvent()]) is None


def test_one_event_without_noise_is_infinite_whatever_the_order():
    sampled, silent = PoissonGaussianEvent(0.1, 1.0), NonPrivateEvent()
    for events in ((sampled, silent), (silent, sampled)):
        assert gdp_mu(events, "add_remove") == math.inf
    assert gdp_mu((sampled, GaussianEvent(1.0)), "add_remove") is None


def test_merging_changes_nothing():
    single = [PoissonGaussianEvent(0.05, 1.0)] * 4 + [GaussianEvent(3.0)] + [PoissonGaussianEvent(0.05, 1.0)] * 3
    assert merge(single) == (PoissonGaussianEvent(0.05, 1.0, 7), GaussianEvent(3.0))
    one_by_one = PLDAccountant(value_discretization_interval=1e-3)
    for event in single:
        one_by_one.compose(to_dp_event([event]))
    assert epsilon_pld(single, DELTA, "add_remove", 1e-3) == pytest.approx(one_by_one.get_epsilon(DELTA), abs=1e-6)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(("rate", "rounds", "epsilon"), [(0.05, 20, 2.0), (0.02, 200, 0.25)])
def test_calibration_round_trip(rate, rounds, epsilon, relation):
    def composed(sigma):
        return (PoissonGaussianEvent(0.03, 1.5 * sigma), PoissonGaussianEvent(rate, sigma, rounds))

    sigma = sigma_for(composed, epsilon, DELTA, relation)
    assert epsilon - 1.2e-3 <= epsilon_pld(composed(sigma), DELTA, relation) <= epsilon
    assert epsilon_pld(composed(0.97 * sigma), DELTA, relation) > epsilon


def test_calibration_out_of_reach_raises():
    with pytest.raises(PrivacyError, match="choose an epsilon"):
        sigma_for(lambda s: (PoissonGaussianEvent(0.5, s, 10_000),), 1e-6, 1e-9, "add_remove")


@given(st.floats(0.05, 30), st.sampled_from([1e-9, 1e-5, 1e-2]))
def test_gaussian_calibration_inverts(epsilon, delta):
    assert epsilon - 1e-5 <= epsilon_gaussian(1 / sigma_gaussian(epsilon, delta), delta) <= epsilon


def test_rdp_is_silent_about_left_out_orders(caplog):
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(epsilon_rdp([PoissonGaussianEvent(0.02, 0.5162, 20)], DELTA, "add_remove"))
    assert not caplog.records
