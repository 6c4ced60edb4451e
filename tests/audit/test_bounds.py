"""Lower bounds on epsilon: exact where a formula is known, true at their level, and near the mark of an ideal audit."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom, nct

from drencoder.audit.clopper_pearson_bound import epsilon_from_errors, gdp_mu_from_errors
from drencoder.audit.gaussian_bound import gaussian_mu
from drencoder.audit.one_run_bound import one_run_mu, rejects_mu
from drencoder.audit.sampled_bounds import SampledFamily
from drencoder.audit.scores import CanaryScores
from drencoder.audit.trade_off import largest_power, protection_sentence
from drencoder.privacy.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_gaussian, sigma_gaussian

BOUNDS = (gaussian_mu, gdp_mu_from_errors, one_run_mu)


def ideal(mu: float, seed: int, count: int = 1000) -> CanaryScores:
    generator = np.random.default_rng(seed)
    coin = generator.random(count) < 0.5
    return CanaryScores.of(np.where(coin, 1.0, -1.0) + 2 / mu * generator.standard_normal(count), coin)


@pytest.mark.parametrize(("epsilon", "marks"), [(8.0, (7.5, 6.6, 3.2)), (1.0, (0.6, 0.2, 0.2))])
def test_an_ideal_audit_comes_within_a_tenth_of_the_mark_and_stays_below(
    epsilon: float, marks: tuple[float, ...]
) -> None:
    mu = 1 / sigma_gaussian(epsilon, 1e-5)
    found = {
        error: [[bound(ideal(mu, seed), error) for bound in BOUNDS] for seed in range(20)] for error in (0.05, 0.001)
    }
    for mean, mark in zip(
        np.mean([[epsilon_gaussian(one, 1e-5) for one in row] for row in found[0.05]], axis=0), marks, strict=True
    ):
        assert mean >= 0.9 * mark
    assert max(map(max, found[0.001])) <= mu


@pytest.mark.parametrize("bound", BOUNDS, ids=["gaussian", "gdp", "one_run"])
@pytest.mark.parametrize("mu", [0.3, 1.7])
def test_a_bound_is_above_the_truth_no_more_often_than_its_error(bound, mu: float) -> None:
    above = sum(bound(ideal(mu, seed, 200), 0.05) > mu for seed in range(400))
    assert above <= binom.isf(1e-6, 400, 0.05)


@pytest.mark.parametrize("bound", BOUNDS, ids=["gaussian", "gdp", "one_run"])
def test_a_bound_falls_with_its_error_and_is_nothing_for_a_blind_score(bound) -> None:
    scores = ideal(1.7, 1)
    assert bound(scores, 0.05) > bound(scores, 0.001) > bound(scores, 1e-6) > 0
    blind = CanaryScores(np.zeros(50) - 1, np.zeros(50) + 1)  # always wrong
    assert bound(blind, 0.05) == 0


def test_the_gaussian_bound_inverts_the_non_central_t() -> None:
    scores = ideal(1.7, 3, 300)
    mu, x = gaussian_mu(scores, 0.01), scores.mirrored
    observed = math.sqrt(300) * x.mean() / x.std(ddof=1)
    assert nct.sf(observed, 299, math.sqrt(300) * mu / 2) == pytest.approx(0.01, rel=1e-4)
    assert gaussian_mu(CanaryScores(np.ones(9), -np.ones(9)), 0.05) == math.inf


def test_clopper_and_pearson_by_hand() -> None:
    """3 of 40 false alarms, none missed: the bounds are the roots of binomial tails."""
    scores = CanaryScores(np.ones(30), np.concatenate([np.ones(3), -np.ones(37)]))
    mu = gdp_mu_from_errors(scores, 0.05)
    beta = 1 - 0.025 ** (1 / 30)
    alpha = next(rate for rate in np.linspace(0.07, 0.4, 100_000) if binom.cdf(3, 40, rate) <= 0.025)
    normal = NormalDist()
    assert mu == pytest.approx(normal.inv_cdf(1 - alpha) - normal.inv_cdf(beta), abs=1e-3)
    epsilon = epsilon_from_errors(scores, 1e-5, 0.05)
    assert epsilon == pytest.approx(math.log(max((1 - beta - 1e-5) / alpha, (1 - alpha - 1e-5) / beta)), abs=1e-3)


def test_one_run_rejects_what_a_binomial_would() -> None:
    """With mu = 0 every guess is right with chance 1/2; the recursion never rejects more than the binomial tail allows."""
    for guesses, right in ((100, 60), (100, 75), (400, 230), (20, 20)):
        tail = float(binom.sf(right - 1, guesses, 0.5))
        assert not rejects_mu(guesses, guesses, right, 0.0, tail * 0.99)
    assert rejects_mu(400, 400, 300, 0.0, 0.01)
    assert not rejects_mu(400, 400, 300, 3.0, 0.01)
    assert one_run_mu(CanaryScores(np.ones(500), -np.ones(500)), 0.05) > 2


def test_what_a_promise_lets_an_attacker_do() -> None:
    """Gaussian: the closed form. Sub-sampled: between the truth of one release and the (epsilon, delta) bound."""
    normal = NormalDist()
    assert largest_power((GaussianEvent(0.6),), "add_remove") == pytest.approx(
        normal.cdf(normal.inv_cdf(0.01) + 1 / 0.6)
    )
    assert largest_power((GaussianEvent(0.6),), "replace_one") > largest_power((GaussianEvent(0.6),), "add_remove")
    power = largest_power((PoissonGaussianEvent(0.1, 1.0),), "add_remove")
    true = 0.1 * normal.cdf(normal.inv_cdf(0.01) + 1.0) + 0.9 * 0.01  # the test that does not know whether it was asked
    assert true <= power <= 1.5 * true
    sentence = protection_sentence(8.0, 1e-5, 0.254)
    assert "at most 25 of 100" in sentence
    assert sentence.count(".") <= 2


FAMILY = SampledFamily((PoissonGaussianEvent(0.3, 0.75),) * 4, 1e-5, 0)


def scores_of(family: SampledFamily, scale: float, seed: int) -> CanaryScores:
    """What 500 canaries on each side score if the noise is `scale` times what the family's first member has."""
    drawn = replace(family, seed=1000 + seed)
    return CanaryScores(drawn.simulate(scale, True)[:500], drawn.simulate(scale, False)[:500])


def test_a_family_without_sub_sampling_has_the_gaussian_trade_off() -> None:
    family = SampledFamily((PoissonGaussianEvent(1.0, 0.8),), 1e-5, 0)
    for alpha in (0.001, 0.05, 0.3):
        exact = NormalDist().cdf(NormalDist().inv_cdf(1 - alpha) - 1 / 0.8)
        assert exact - 2e-3 < family.trade_off(1.0, alpha) <= exact + 1e-12


def test_sub_sampled_scores_are_bounded_near_the_promise_and_not_above() -> None:
    promised = FAMILY.epsilon(1.0)
    found = [FAMILY.bounds(scores_of(FAMILY, 1.0, seed), 0.001) for seed in range(10)]
    assert all(one[name] <= promised for one in found for name in one)
    assert max(one["gaussian"] for one in found) > 0.6 * promised
    assert max(one["gdp"] for one in found) > 0.4 * promised
    assert max(one["one_run"] for one in found) > 0.1 * promised
    assert not any(FAMILY.exceeded(scores_of(FAMILY, scale, seed), 1e-6) for scale in (1.0, 1.3) for seed in range(10))


def test_sub_sampled_releases_with_too_little_noise_exceed_the_promise() -> None:
    assert "gaussian" in FAMILY.exceeded(scores_of(FAMILY, 0.5, 0), 1e-6)
    assert FAMILY.bounds(scores_of(FAMILY, 0.5, 0), 0.001)["gaussian"] > FAMILY.epsilon(1.0)


def test_faint_scores_prove_nothing() -> None:
    """With much noise the mean of scores hardly depends on the noise: a bound from the mean alone was infinite here."""
    family = SampledFamily((PoissonGaussianEvent(0.3, 4.0),) * 4, 1e-5, 0)
    promised = family.epsilon(1.0)
    for seed in range(10):
        assert max(family.bounds(scores_of(family, 1.0, seed), 0.001).values()) <= promised
