"""Trade-off functions: how small the errors of the best membership attack can get.

An attack that has to tell two neighbouring runs apart makes errors of type I (alpha: says "member" of a
non-member) and of type II (beta: misses a member). A mechanism's trade-off function is the smallest beta for each
alpha (Dong, Roth & Su 2019, arXiv 1905.02383, def. 2.1); 1 - alpha is perfect privacy. Every curve here is a
polyline that lies on or below the truth, unless it is marked as an approximation: what it says about an attack's
success is an upper bound.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from drencoder.privacy.accounting import Event, NonPrivateEvent, Relation, delta_pld, epsilon_pld, gdp_mu, merge
from drencoder.privacy.curves import chosen_view, clt_limit, composed_events
from drencoder.privacy.plan import PrivacyPlan

__all__ = [
    "TradeOff",
    "TradeOffs",
    "best_tradeoff",
    "gaussian_tradeoff",
    "max_auc",
    "pld_tradeoff",
    "point_tradeoff",
    "tradeoffs",
]

_NUM_SLOPES = 600  # tangents of the polyline; 600 leave less than 1e-4 of beta
_SMALLEST_DELTA = 1e-10  # beyond it the tangents are steeper than any attack can be measured
_MAX_SLOPE = 200.0  # in e-folds; exp(710) is no number any more


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


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
