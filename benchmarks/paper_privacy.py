"""The analyses of the paper for one plan: exact Gaussian DP, its central limit, and trade-off functions, beside PLD and RDP.

    python benchmarks/paper_privacy.py [RECIPE] [--set KEY=VALUE] [--sigmas 0.8,1] [--plot FILE] [--json FILE]

A run is calibrated, charged and certified by PLD alone, and `drencoder plan --curve` shows PLD and RDP. What stands here is what
the literature shows next to them. Exact Gaussian DP is a guarantee, and only where nothing is sub-sampled. The central limit
(CLT) is an approximation that lies below the truth at the sizes of this method: never a guarantee.

An attack that has to tell two neighbouring runs apart makes errors of type I (alpha: says "member" of a
non-member) and of type II (beta: misses a member). A mechanism's trade-off function is the smallest beta for each
alpha (Dong, Roth & Su 2019, arXiv 1905.02383, def. 2.1); 1 - alpha is perfect privacy. Every curve here is a
polyline that lies on or below the truth, unless it is marked as an approximation: what it says about an attack's
success is an upper bound.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from drencoder import load_recipe
from drencoder.privacy.accounting import (
    Event,
    NonPrivateEvent,
    Relation,
    clt_mu,
    delta_pld,
    epsilon_gaussian,
    epsilon_pld,
    gdp_mu,
    merge,
)
from drencoder.privacy.budget_table import BudgetPoint, budget_table, chosen_view, composed_events, with_noise
from drencoder.privacy.plan import PrivacyPlan
from drencoder.runs.plan_overview import privacy_plan
from drencoder.runs.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST_CLT_MU = 50.0  # beyond it the limit has left every reality
_NUM_SLOPES = 600  # tangents of the polyline; 600 leave less than 1e-4 of beta
_SMALLEST_DELTA = 1e-10  # beyond it the tangents are steeper than any attack can be measured
_MAX_SLOPE = 200.0  # in e-folds; exp(710) is no number any more


# --- Gaussian DP, round by round ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """What has been spent after one round, by every analysis; `budget` holds PLD and RDP, at the plan's delta.

    `mu` and `epsilon_gdp` are exact Gaussian DP, None under sub-sampling. `mu_clt` and `epsilon_clt` are NOT a guarantee; None
    where exact GDP holds, under `replace_one`, where a stage has no noise, and beyond mu = 50.
    """

    budget: BudgetPoint
    mu: float | None
    epsilon_gdp: float | None
    mu_clt: float | None
    epsilon_clt: float | None


def analyses(plan: PrivacyPlan, *, observer: str | None = None, relation: Relation | None = None) -> list[Analysis]:
    """Every analysis after each round that `budget_table` evaluates. Raises PrivacyError as it does."""
    observer, relation = chosen_view(plan, observer, relation)
    rows = []
    for point in budget_table(plan, observer=observer, relation=relation).budgets[0].points:
        events = composed_events(plan, observer, point.round)
        mu, limit = gdp_mu(events, relation), clt_limit(events, relation)
        exact = None if mu is None else epsilon_gaussian(mu, plan.gaussian_delta)
        claimed = None if limit is None else epsilon_gaussian(limit, plan.gaussian_delta)
        rows.append(Analysis(point, mu, exact, limit, claimed))
    return rows


def clt_limit(events: tuple[Event, ...], relation: Relation) -> float | None:
    """The central limit's mu; None beyond 50, under `replace_one`, and where Gaussian DP is exact."""
    if gdp_mu(events, relation) is not None or relation == "replace_one":
        return None
    mu = clt_mu(events)
    return None if mu is None or mu > _LARGEST_CLT_MU else mu


# --- trade-off functions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TradeOff:
    """A trade-off function as a polyline from alpha = 0 to alpha = 1.

    `auc` bounds the area under the ROC curve of every membership attack, 1 - integral of beta; `advantage` bounds
    its true positive rate less its false positive rate, max(1 - alpha - beta). With `is_guarantee` False both are
    what an approximation claims.
    """

    label: str
    is_guarantee: bool
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    auc: float
    advantage: float

    def beta_at(self, alpha: float) -> float:
        """The smallest type II error at type I error `alpha` in [0, 1]."""
        return float(np.interp(alpha, self.alpha, self.beta))


@dataclass(frozen=True)
class TradeOffs:
    """The trade-off functions of one plan in the view of one observer.

    `whole` is the composition's own; `point` follows from the reported (epsilon, delta) alone and so lies below
    it; `limit` is the central limit's approximation, NOT a guarantee, None where exact GDP holds.
    """

    delta: float
    relation: Relation
    observer: str
    noise_multiplier: float
    whole: TradeOff
    point: TradeOff
    limit: TradeOff | None


def tradeoffs(plan: PrivacyPlan, *, observer: str | None = None, relation: Relation | None = None) -> TradeOffs:
    """The trade-off functions of the whole plan. Defaults: the observer and adjacency that the plan's budget bounds.

    Raises:
      PrivacyError: an unknown observer or adjacency.
    """
    observer, relation = chosen_view(plan, observer, relation)
    events = composed_events(plan, observer)
    mu = clt_limit(events, relation)
    limit = None if mu is None else gaussian_tradeoff(mu, "CLT-GDP", is_guarantee=False)
    return TradeOffs(
        delta=plan.delta,
        relation=relation,
        observer=observer,
        noise_multiplier=plan.noise_multiplier,
        whole=best_tradeoff(events, relation),
        point=point_tradeoff(epsilon_pld(events, plan.gaussian_delta, relation), plan.delta),
        limit=limit,
    )


def max_auc(events: Iterable[Event], relation: Relation) -> float:
    """The largest area under the ROC curve that any membership attack on this composition can have.

    Phi(mu / sqrt 2) where mu-GDP is exact, else an upper bound from the PLD. 0.5 without events, 1 without noise.
    """
    return best_tradeoff(events, relation).auc


def best_tradeoff(events: Iterable[Event], relation: Relation) -> TradeOff:
    """The composition's trade-off function: G_mu where nothing is sub-sampled, else from its PLD."""
    merged = merge(events)
    if any(isinstance(event, NonPrivateEvent) for event in merged):
        return gaussian_tradeoff(math.inf, "no noise")
    mu = gdp_mu(merged, relation)
    return pld_tradeoff(merged, relation) if mu is None else gaussian_tradeoff(mu)


def gaussian_tradeoff(mu: float, label: str = "exact GDP", *, is_guarantee: bool = True) -> TradeOff:
    """G_mu(alpha) = Phi(Phi^-1(1 - alpha) - mu) (Dong et al. 2019, eq. 6), whose area has a closed form.

    The vertices are tangents' intersections, as in `pld_tradeoff`: on or below the curve, by less than 1e-4.
    """
    from scipy.special import ndtr

    if not mu < 60:  # beta is below 1e-300 wherever alpha is measurable
        return TradeOff(label, is_guarantee, (0.0, 1.0), (0.0, 0.0), 1.0, 1.0)
    if mu == 0:
        return TradeOff(label, is_guarantee, (0.0, 1.0), (1.0, 0.0), 0.5, 0.0)
    # The tangent of slope -e^s touches where Phi^-1(1 - alpha) = s / mu + mu / 2; 8 standard deviations reach 1e-15.
    slope_S = np.linspace(0.0, min(_MAX_SLOPE, mu * (8 + mu / 2)), _NUM_SLOPES)
    delta_S = ndtr(mu / 2 - slope_S / mu) - np.exp(slope_S) * ndtr(-mu / 2 - slope_S / mu)
    alpha_V, beta_V = _envelope(slope_S, delta_S)
    auc, advantage = float(ndtr(mu / math.sqrt(2))), float(2 * ndtr(mu / 2) - 1)
    return TradeOff(label, is_guarantee, tuple(alpha_V.tolist()), tuple(beta_V.tolist()), auc, advantage)


def pld_tradeoff(events: Iterable[Event], relation: Relation, interval: float = 1e-3) -> TradeOff:
    """The trade-off function that all (epsilon, delta(epsilon)) pairs of the PLD imply together.

    It is symmetric: adding and removing a client are bounded at once. Pessimistic in the grid and in the finite
    number of epsilons, so the truth lies on or above it. The events must all be private.
    """
    merged = merge(events)
    steepest = epsilon_pld(merged, _SMALLEST_DELTA, relation, interval)
    slope_S = np.linspace(0.0, min(_MAX_SLOPE, max(steepest, 1e-6)), _NUM_SLOPES)
    delta_S = np.array(delta_pld(merged, slope_S.tolist(), relation, interval))
    return _from_pairs("PLD", slope_S, delta_S)


def point_tradeoff(epsilon: float, delta: float) -> TradeOff:
    """What one (epsilon, delta) pair alone implies (Wasserman & Zhou 2010; Dong et al. 2019, prop. 2.5)."""
    label = f"(epsilon, delta) = ({epsilon:.3g}, {delta:g}) alone"
    if epsilon > _MAX_SLOPE:
        return TradeOff(label, True, (0.0, 1.0), (0.0, 0.0), 1.0, 1.0)
    return _from_pairs(label, np.array([epsilon]), np.array([delta]))


def _from_pairs(label: str, slope_S: npt.NDArray[np.float64], delta_S: npt.NDArray[np.float64]) -> TradeOff:
    alpha_V, beta_V = _envelope(slope_S, delta_S)
    area = float(np.sum((alpha_V[1:] - alpha_V[:-1]) * (beta_V[1:] + beta_V[:-1])) / 2)  # exact: it is a polyline
    advantage = max(0.0, float(np.max(1 - alpha_V - beta_V)))  # reached at a vertex, for the same reason
    return TradeOff(label, True, tuple(alpha_V.tolist()), tuple(beta_V.tolist()), min(1.0, 1 - area), advantage)


def _envelope(
    slope_S: npt.NDArray[np.float64], delta_S: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Vertices (alpha_V, beta_V) of the highest of the lines that (epsilon, delta) pairs imply.

    beta >= max(0, 1 - delta - e^eps alpha, e^-eps (1 - delta - alpha)) for each pair (Dong et al. 2019, eq. 5). The
    second family mirrors the first in the diagonal alpha = beta, so the first gives all vertices above it.
    """
    rise_S = np.exp(slope_S)
    between = (delta_S[:-1] - delta_S[1:]) / np.diff(rise_S)  # where neighbouring lines meet
    diagonal = float(np.max((1 - delta_S) / (1 + rise_S)))  # where the envelope meets its mirror image
    alpha = np.unique(np.clip(np.concatenate([[0.0], between, [diagonal]]), 0.0, diagonal))
    beta = np.max((1 - delta_S)[:, None] - rise_S[:, None] * alpha[None, :], axis=0)
    alpha_V = np.concatenate([alpha, beta[::-1], [1.0]])
    beta_V = np.concatenate([beta, alpha[::-1], [0.0]])
    # Rounding at the diagonal must not turn the order round.
    return np.maximum.accumulate(alpha_V), np.maximum(np.minimum.accumulate(beta_V), 0.0)


# --- tables, figure and command ----------------------------------------------------------------------------


def plot_tradeoff(curves: TradeOffs) -> "Figure":
    """Type I against type II error of the best attack (left), and its power at small false positive rates (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn: list[tuple[TradeOff, dict[str, Any]]] = [
        (curves.whole, {"color": "#0072b2", "linewidth": 2.0}),
        (curves.point, {"color": "#d55e00", "linestyle": "-.", "linewidth": 1.3}),
    ]
    if curves.limit is not None:
        drawn.append((curves.limit, {"color": "#009e73", "linestyle": (0, (4, 2)), "linewidth": 1.5}))
    lowest = 10.0 ** math.floor(math.log10(curves.delta) / 2 - 1)
    rates = [lowest ** (1 - i / 300) for i in range(301)]
    for curve, style in drawn:
        label = curve.label if curve.is_guarantee else f"{curve.label} (approximation, not a guarantee)"
        left.plot(curve.alpha, curve.beta, label=f"{label}, AUC {curve.auc:.3f}", **style)
        right.plot(rates, [max(1 - curve.beta_at(rate), lowest / 10) for rate in rates], **style)
    perfect: dict[str, Any] = {"color": "#57606a", "linestyle": ":", "linewidth": 1.3}
    left.plot([0, 1], [1, 0], label="perfect privacy, AUC 0.500", **perfect)
    right.plot(rates, rates, **perfect)
    left.set(xlabel="type I error alpha (false alarm)", ylabel="smallest type II error beta (miss)", aspect="equal")
    left.set(xlim=(0, 1), ylim=(0, 1))
    right.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.2))
    right.set(xlabel="false positive rate alpha", ylabel="largest true positive rate 1 - beta")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"What a membership attack can reach: {curves.observer}'s view, {curves.relation}, sigma = {curves.noise_multiplier:.4g}",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def analysis_table(rows: Sequence[Analysis], curves: TradeOffs) -> Table:
    """Every analysis after a selection of rounds; the one that is no guarantee has a star."""
    table = Table(
        title=f"Epsilon at sigma = {curves.noise_multiplier:.4g}: {curves.observer}'s view, {curves.relation}, "
        f"delta = {curves.delta:g}",
        caption="* an approximation, not a guarantee: it can lie far below the truth\n"
        f"no membership attack has an AUC above {curves.whole.auc:.3f} or an advantage above {curves.whole.advantage:.3f}",
    )
    for column in ("after round", "PLD", "RDP", "exact GDP", "mu", "CLT-GDP*", "mu*"):
        table.add_column(column, justify="right")
    last, count = len(rows) - 1, min(len(rows), 9)
    for place in sorted({round(last * k / max(1, count - 1)) for k in range(count)}):
        row, point = rows[place], rows[place].budget
        values = (point.epsilon_pld, point.epsilon_rdp, row.epsilon_gdp, row.mu, row.epsilon_clt, row.mu_clt)
        name = "stage 1" if point.round == 0 else str(point.round)
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sigmas", type=lambda text: [float(part) for part in text.split(",")], metavar="LIST")
    parser.add_argument("--observer", help="server, clients or public")
    parser.add_argument("--relation", help="add_remove or replace_one")
    parser.add_argument("--plot", type=Path, help="the trade-off functions of the plan's own noise")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.set += ["federation.rounds=2"]
    plan, report = privacy_plan(load_recipe(args.recipe, args.set)), []
    for noised in with_noise(plan, args.sigmas):
        rows = analyses(noised, observer=args.observer, relation=args.relation)
        curves = tradeoffs(noised, observer=args.observer, relation=args.relation)
        Console().print(analysis_table(rows, curves))
        report.append({"rounds": [asdict(row) for row in rows], "tradeoffs": asdict(curves)})
    if args.plot is not None:
        print(
            "Plot:",
            save_figure(plot_tradeoff(tradeoffs(plan, observer=args.observer, relation=args.relation)), args.plot),
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
