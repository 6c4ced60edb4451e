"""This module measures how well an attack tells two cases apart: the area under its ROC curve, with a 95 % interval.

Legend: P positives, Q negatives, C clusters (rows of dependent scores: one client's, one release's), H hypotheses
(columns: one token, one candidate).

AUC is the chance that a positive scores higher than a negative, ties counted half (Mann-Whitney). Two designs:

* `estimate_auc`: all scores are independent. Variance by DeLong, DeLong and Clarke-Pearson 1988
  (https://doi.org/10.2307/2531595), on the logit scale so that the interval stays inside (0, 1).
* `estimate_clustered_auc`: scores of one row depend on each other, and only scores of the same column are compared. Then a token
  that is simply frequent, or a client that is simply unusual, wins nothing. Interval by resampling rows.

Scores that separate perfectly have no variance to estimate; `_limits_without_variance` says what the sample size still allows.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

import torch
from torch import Tensor

from drencoder.errors import DataError
from drencoder.rng import derive_seed

_TAIL = 0.025  # chance to lie beyond one end of the interval
_ALARM_TAIL = 0.0005  # the same for `floor`
_RESAMPLES = 2000
_NORMAL = NormalDist()


@final
@dataclass(frozen=True)
class Auc:
    """An estimate with its 95 % interval; `clusters` is None where all scores are independent.

    `floor` is a lower limit that the truth is below with a chance of 1 in 2,000 only: what an alarm rests on.
    """

    value: float
    low: float
    high: float
    floor: float
    positives: int
    negatives: int
    clusters: int | None = None


def estimate_auc(positive_P: Tensor, negative_Q: Tensor) -> Auc:
    """Estimates the AUC of independent scores, with DeLong's interval.

    Raises:
      DataError: fewer than two scores on a side, or a score that is not a number.
    """
    positive_P, negative_Q = positive_P.detach().double().cpu(), negative_Q.detach().double().cpu()
    num_P, num_Q = positive_P.numel(), negative_Q.numel()
    if min(num_P, num_Q) < 2:
        raise DataError(f"An AUC needs at least 2 positives and 2 negatives, got {num_P} and {num_Q}: add clients.")
    if bool(positive_P.isnan().any() or negative_Q.isnan().any()):
        raise DataError("A score is not a number, so no AUC can be computed: check that all updates are finite.")
    won_P = _share_below(positive_P, negative_Q)
    won_Q = 1.0 - _share_below(negative_Q, positive_P)
    value = float(won_P.mean())
    variance = float(won_P.var() / num_P + won_Q.var() / num_Q)
    if variance > 0:
        low, high, floor = (_logit_quantile(value, variance, tail) for tail in (_TAIL, 1 - _TAIL, _ALARM_TAIL))
    else:
        low, high, floor = _limits_without_variance(value, min(num_P, num_Q))
    return Auc(value, low, high, floor, num_P, num_Q)


def estimate_clustered_auc(score_CH: Tensor, positive_CH: Tensor, seed: int) -> Auc:
    """Estimates the AUC over pairs of scores in the same column, one where `positive_CH` is true and one where it is false.

    Resamples rows 2,000 times; the same for the same seed.

    Raises:
      DataError: fewer than 8 rows, a score that is not a number, or no column with both cases.
    """
    rows = score_CH.shape[0]
    if rows < 8:
        raise DataError(f"A resampled interval needs at least 8 rows, got {rows}: add clients.")
    won_CC, met_CC = _count_won_pairs(score_CH.detach().double().cpu(), positive_CH.cpu())
    if not float(met_CC.sum()):
        raise DataError("Every hypothesis is true for all rows or for none, so there is nothing to tell apart.")
    value = float(won_CC.sum() / met_CC.sum())
    generator = torch.Generator().manual_seed(derive_seed(seed, "auc-bootstrap"))
    drawn_BC = torch.randint(rows, (_RESAMPLES, rows), generator=generator)
    weight_BC = torch.zeros(_RESAMPLES, rows, dtype=torch.float64)
    weight_BC.scatter_add_(1, drawn_BC, torch.ones_like(drawn_BC, dtype=torch.float64))
    won_B, met_B = ((weight_BC @ pairs_CC * weight_BC).sum(1) for pairs_CC in (won_CC, met_CC))
    drawn_B = (won_B / met_B)[met_B > 0]
    tails = torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)
    low, high = torch.quantile(drawn_B, tails).tolist()
    floor = value + _NORMAL.inv_cdf(_ALARM_TAIL) * float(drawn_B.std())  # 2,000 resamples have no such quantile
    if low == high:
        low, high, floor = _limits_without_variance(value, rows // 2)
    contested_H = positive_CH.any(0) & ~positive_CH.all(0)
    positives = int(positive_CH[:, contested_H].sum())
    return Auc(value, low, high, floor, positives, int(contested_H.sum()) * rows - positives, rows)


def gaussian_max_auc(mu: float) -> float:
    """Returns the largest AUC of any attack on a mu-GDP release: Phi(mu / sqrt 2).

    From the trade-off function of Dong, Roth and Su 2019 (https://arxiv.org/abs/1905.02383, definition 2.6): the best
    test of N(0, 1) against N(mu, 1) has power Phi(mu + Phi^-1(alpha)), whose integral over alpha is this.
    """
    return _NORMAL.cdf(mu / math.sqrt(2))


def gaussian_mu_from_auc(auc: float) -> float:
    """Inverts `gaussian_max_auc` on [0.5, 1]: a release with this AUC is not mu-GDP for any smaller mu."""
    if auc >= 1:
        return math.inf
    return math.sqrt(2) * _NORMAL.inv_cdf(max(0.5, auc))


def _share_below(score_N: Tensor, other_M: Tensor) -> Tensor:
    """Returns for each score the share of `other_M` below it, ties counted half."""
    ordered_M = other_M.sort().values
    below_N = torch.searchsorted(ordered_M, score_N, right=False)
    up_to_N = torch.searchsorted(ordered_M, score_N, right=True)
    return (below_N + up_to_N).double() / (2 * other_M.numel())


def _logit_quantile(value: float, variance: float, tail: float) -> float:
    """Returns a quantile of a normal on the logit scale (Pepe 2003, ISBN 0198509847, section 5.2)."""
    centre = math.log(value / (1 - value))
    return 1 / (1 + math.exp(-centre - _NORMAL.inv_cdf(tail) * math.sqrt(variance) / (value * (1 - value))))


def _limits_without_variance(value: float, pairs: int) -> tuple[float, float, float]:
    """Returns (low, high, floor) when all pairs had one outcome: `pairs` disjoint pairs agree, so another outcome is rarer than `rare`.

    (1 - rare)^pairs = tail: Clopper and Pearson's bound for no event in `pairs` trials.
    """
    rare, rarest = (1 - tail ** (1 / pairs) for tail in (_TAIL, _ALARM_TAIL))
    return value * (1 - rare), value + (1 - value) * rare, value * (1 - rarest)


def _count_won_pairs(score_CH: Tensor, positive_CH: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (won_CC, met_CC). won_CC[i, j]: points of row i's positives against row j's negatives in the same columns; met_CC: how many."""
    if bool(score_CH.isnan().any()):
        raise DataError("A score is not a number, so no AUC can be computed: check that all updates are finite.")
    rows = score_CH.shape[0]
    won_CC, met_CC = torch.zeros(2, rows, rows, dtype=torch.float64)
    for column in (positive_CH.any(0) & ~positive_CH.all(0)).nonzero()[:, 0].tolist():
        score_C, true_C = score_CH[:, column], positive_CH[:, column]
        positive_p, negative_q = true_C.nonzero()[:, 0], (~true_C).nonzero()[:, 0]
        ahead_pq = (score_C[positive_p][:, None] - score_C[negative_q]).sign()
        won_CC[positive_p[:, None], negative_q] += (ahead_pq + 1) / 2
        met_CC[positive_p[:, None], negative_q] += 1
    return won_CC, met_CC
