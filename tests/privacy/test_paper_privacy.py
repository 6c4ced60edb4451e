"""The paper's analyses: Gaussian DP, its central limit and trade-off functions, each against a second method."""

import importlib.util
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import integrate, stats

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import GaussianEvent, NonPrivateEvent, PoissonGaussianEvent, epsilon_gaussian
from drencoder.privacy.budget_table import composed_events
from drencoder.privacy.make_plan import make_plan


def _script(name: str) -> ModuleType:
    """A script of `benchmarks/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


paper = _script("paper_privacy")
best_tradeoff, gaussian_tradeoff, max_auc = paper.best_tradeoff, paper.gaussian_tradeoff, paper.max_auc
pld_tradeoff, point_tradeoff, tradeoffs = paper.pld_tradeoff, paper.point_tradeoff, paper.tradeoffs

DELTA = 1e-5
REFERENCE = make_plan(
    trust="central", population=100, sampling_rate=0.05, rounds=20, delta=DELTA, noise_multiplier=0.997
)
EVENTS = (PoissonGaussianEvent(0.05, 0.997, 20),)
FULL = make_plan(
    trust="central", population=3, sampling_rate=1.0, rounds=8, delta=DELTA, noise_multiplier=6.0,
    stage1_rate=1.0, stage1_noise_ratio=2.0,
)  # fmt: skip
NON_PRIVATE = make_plan(
    trust="central", population=100, sampling_rate=0.05, rounds=4, delta=DELTA, stage1_rate=0.05,
    non_private=["stage1", "round"],
)  # fmt: skip

# Gaussian DP and its central limit


def test_the_limit_claims_less_than_the_truth_where_cohorts_are_sub_sampled():
    rows = paper.analyses(REFERENCE)
    assert [row.budget.round for row in rows] == list(range(1, 21))
    for row in rows:
        assert row.mu is None
        assert row.epsilon_gdp is None
        assert row.epsilon_clt < row.budget.epsilon_pld < row.budget.epsilon_rdp
    assert rows[-1].epsilon_clt == pytest.approx(1.11, abs=0.005)
    assert rows[-1].mu_clt == pytest.approx(math.sqrt(20) * 0.05 * math.sqrt(math.expm1(0.997**-2)))  # Bu et al. 2020
    assert all(row.epsilon_clt is None for row in paper.analyses(REFERENCE, relation="replace_one"))


@pytest.mark.parametrize(("relation", "shift"), [("add_remove", 1.0), ("replace_one", 2.0)])
def test_gaussian_dp_is_exact_where_all_take_part(relation, shift):
    for row in paper.analyses(FULL, relation=relation):
        mu = shift * math.sqrt(1 / 12.0**2 + row.budget.round / 6.0**2)  # squares add up
        assert row.mu == pytest.approx(mu, rel=1e-12)
        assert row.epsilon_gdp == pytest.approx(epsilon_gaussian(mu, FULL.gaussian_delta), rel=1e-9)
        assert row.budget.epsilon_pld == pytest.approx(row.epsilon_gdp, rel=1e-9)
        assert row.mu_clt is None


def test_the_conversion_from_mu_is_the_closed_form():
    for mu in (0.1, 1.0, 4.0):  # Balle & Wang 2018, theorem 8
        epsilon = epsilon_gaussian(mu, DELTA)
        delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(DELTA, rel=1e-4)


def test_unknown_views_are_refused():
    for options, words in (({"observer": "press"}, "server, clients, public"), ({"relation": "edit"}, "replace_one")):
        for analysis in (paper.analyses, tradeoffs):
            with pytest.raises(PrivacyError, match=words):
                analysis(REFERENCE, **options)


def test_the_command_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    report, plot = tmp_path / "report.json", tmp_path / "tradeoff.png"
    sets = [f"--set={knob}" for knob in ("privacy.trust=central", "federation.population=100", "prior.source=none",
                                         "federation.sampling_rate=0.05", "federation.rounds=3")]  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["x", "quickstart", *sets, "--sigmas", "1", "--json", str(report), "--plot", str(plot)]
    )
    paper.main()
    (one,) = json.loads(report.read_text())
    assert f"{one['rounds'][-1]['epsilon_clt']:.3f}" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


# The figure


def test_the_figure_shows_the_diagonal_and_marks_the_limit():
    curves = tradeoffs(REFERENCE)
    figure = paper.plot_tradeoff(curves)
    left, _ = figure.axes
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts[0] == f"PLD, AUC {curves.whole.auc:.3f}"
    assert "alone" in texts[1]
    assert "CLT-GDP (approximation, not a guarantee)" in texts[2]
    assert texts[3].startswith("perfect privacy")
    assert tuple(left.get_lines()[0].get_ydata()) == curves.whole.beta
    assert list(left.get_lines()[3].get_xdata()) == [0, 1]


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
    curves = tradeoffs(REFERENCE)
    assert curves.whole.label == "PLD"
    check_shape(curves.whole)
    check_shape(curves.point)
    epsilon = REFERENCE.epsilons()["public"].epsilon_pld
    alphas = np.array(curves.whole.alpha)
    gap = np.array(curves.whole.beta) - beta_at(curves.point, alphas)
    assert gap.min() > -1e-6
    # Its steep line 1 - delta - e^epsilon alpha is a tangent.
    assert np.min(np.array(curves.whole.beta) + math.exp(epsilon) * alphas) == pytest.approx(1 - DELTA, abs=1e-6)
    assert curves.point.auc > curves.whole.auc + 0.2
    assert (curves.limit.is_guarantee, curves.whole.is_guarantee, curves.point.is_guarantee) == (False, True, True)
    assert curves.whole.beta_at(1e-4) < curves.limit.beta_at(1e-4)
    json.dumps(asdict(curves), allow_nan=False)


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
