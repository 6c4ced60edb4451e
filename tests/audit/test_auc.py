"""AUC and its intervals against brute force and known coverage."""

import math

import pytest
import torch
from torch import Tensor

from drencoder.audit.auc import estimate_auc, estimate_clustered_auc, gaussian_max_auc, gaussian_mu_from_auc
from drencoder.errors import DataError


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_auc(positive: Tensor, negative: Tensor) -> float:
    pairs = [(float(p > q) + float(p == q) / 2) for p in positive for q in negative]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_share_of_won_pairs_ties_counted_half(seed: int) -> None:
    positive, negative = (normal(17, seed=seed) + 0.5).round(decimals=0), normal(11, seed=9 + seed).round(decimals=0)
    assert estimate_auc(positive, negative).value == pytest.approx(brute_auc(positive, negative), abs=1e-12)
    mirrored = estimate_auc(-positive, -negative)
    assert mirrored.value == pytest.approx(1 - estimate_auc(positive, negative).value, abs=1e-12)


def test_delong_is_the_variance_of_placements() -> None:
    positive, negative = normal(40, seed=1) + 1, normal(30, seed=2)
    won = (positive[:, None] > negative).double()
    deviation = math.sqrt(float(won.mean(1).var() / 40 + won.mean(0).var() / 30))
    auc, value = estimate_auc(positive, negative), float(won.mean())
    half = 1.959964 * deviation / (value * (1 - value))
    assert math.log(auc.low / (1 - auc.low)) == pytest.approx(math.log(value / (1 - value)) - half, abs=1e-4)
    assert auc.floor < auc.low < auc.value < auc.high < 1


def test_intervals_cover_and_the_wrong_one_does_not() -> None:
    """300 samples of known AUC. Clustered scores defeat DeLong's interval, and resampling rows does not."""
    covered = clustered = naive = 0
    for seed in range(300):
        truth = gaussian_max_auc(1.0)
        auc = estimate_auc(normal(40, seed=3 * seed) + 1, normal(40, seed=3 * seed + 1))
        covered += auc.low <= truth <= auc.high
        score = normal(24, 1, seed=3 * seed) * 2 + normal(24, 10, seed=3 * seed + 1)  # a row's scores rise together
        true = (torch.arange(24) % 2 == 0)[:, None].expand(24, 10)
        within, flat = estimate_clustered_auc(score, true, seed), estimate_auc(score[true], score[~true])
        clustered += within.low <= 0.5 <= within.high
        naive += flat.low <= 0.5 <= flat.high
    assert 270 <= covered <= 297  # 285 expected, 4 sigma is 15
    assert clustered >= 265  # resampling 24 rows is a little too sure
    assert naive < 200


def test_within_compares_the_same_column_only() -> None:
    score, true = normal(9, 6, seed=4), normal(9, 6, seed=5) > 0
    true[:, 0] = True  # never contested
    won = [
        brute_auc(score[true[:, c], c], score[~true[:, c], c]) * true[:, c].sum() * (~true[:, c]).sum()
        for c in range(1, 6)
    ]
    met = [int(true[:, c].sum() * (~true[:, c]).sum()) for c in range(1, 6)]
    auc = estimate_clustered_auc(score, true, 0)
    assert auc.value == pytest.approx(float(sum(won)) / sum(met), abs=1e-12)
    assert estimate_clustered_auc(score + 100 * torch.arange(6), true, 0) == auc  # a column's level wins nothing
    assert auc.positives == int(true[:, 1:].sum())
    assert auc == estimate_clustered_auc(score, true, 0)


def test_perfect_and_blind_attacks_keep_an_interval() -> None:
    ones, zeros = torch.ones(30), torch.zeros(30)
    perfect, blind = estimate_auc(ones, zeros), estimate_auc(ones, ones)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(0.025 ** (1 / 30))
    assert (blind.value, blind.high - 0.5) == (0.5, pytest.approx(0.5 - blind.low))
    with pytest.raises(DataError, match="at least 2"):
        estimate_auc(ones[:1], zeros)
    with pytest.raises(DataError, match="not a number"):
        estimate_auc(ones * math.nan, zeros)
    with pytest.raises(DataError, match="at least 8 rows"):
        estimate_clustered_auc(torch.ones(7, 2), torch.ones(7, 2) > 0, 0)
    with pytest.raises(DataError, match="nothing to tell apart"):
        estimate_clustered_auc(torch.ones(8, 2), torch.ones(8, 2) > 0, 0)


@pytest.mark.parametrize("mu", [0.1, 1.0, 2.5])
def test_the_gaussian_bound_is_the_area_and_has_an_inverse(mu: float) -> None:
    auc = estimate_auc(normal(100_000, seed=6) + mu, normal(100_000, seed=7))
    assert abs(auc.value - gaussian_max_auc(mu)) < 6 * (auc.value - auc.floor) / 3.29
    assert gaussian_mu_from_auc(gaussian_max_auc(mu)) == pytest.approx(mu)
    assert gaussian_mu_from_auc(0.4) == 0.0
    assert gaussian_mu_from_auc(1.0) == math.inf
