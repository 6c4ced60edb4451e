"""Discrete Gaussian shares: the law is right, wrong scales are rejected, and every stated distance holds."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from drencoder.errors import PrivacyError
from drencoder.secure_aggregation.discrete import (
    SMOOTHING_STD,
    DiscreteGaussian,
    continuous_distance,
    discrete_gaussian,
    sum_distance,
)


def system_words(count):
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def seeded_words(seed):
    generator = np.random.Philox(seed)
    return lambda count: np.atleast_1d(generator.random_raw(count))


def law(std, reach=60):
    """Probabilities of -m..m, normalised over a range far beyond what any test can see."""
    k = np.arange(-math.ceil(reach * std), math.ceil(reach * std) + 1)
    weight = np.exp(-(k**2) / (2 * std**2))
    return k, weight / weight.sum()


def chi_square_p(draws, std):
    """The p-value of a chi-square test of the draws against N_Z(0, std^2), cells of expectation 20 or more."""
    k, probability = law(std)
    low, high = int(stats.norm.ppf(1e-4) * std), int(stats.norm.isf(1e-4) * std)
    inside = (k > low) & (k < high)
    step = max(1, int(std // 8))
    edges = np.arange(low + 1, high, step)
    expected = np.add.reduceat(probability[inside], np.arange(0, inside.sum(), step)) * len(draws)
    found = np.histogram(draws, bins=[*(edges - 0.5), high - 0.5])[0]
    rest_expected, rest_found = len(draws) - expected.sum(), len(draws) - found.sum()
    return stats.chisquare([*found, rest_found], [*expected, rest_expected]).pvalue


@pytest.mark.parametrize("std", [1.0, 4.0, 37.3, 2000.0])
def test_draws_have_the_law_of_the_discrete_gaussian(std):
    """Of the operating system's words a false alarm once in 1e10 runs; the seeded ones are the same in every run."""
    draws = discrete_gaussian(std).sample(200_000, seeded_words(3))
    assert chi_square_p(draws, std) > 1e-4
    assert chi_square_p(discrete_gaussian(std).sample(200_000, system_words), std) > 1e-10


@pytest.mark.parametrize("wrong", [2 / 3, 3 / 2, 0.98])
def test_the_law_test_rejects_wrong_scales(wrong):
    draws = discrete_gaussian(37.3 * wrong).sample(200_000, seeded_words(3))
    assert chi_square_p(draws, 37.3) < 1e-10


def test_values_signs_and_neighbours_are_independent():
    draws = discrete_gaussian(50.0).sample(100_000, seeded_words(5)).astype(float)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 5 / math.sqrt(len(draws))
    assert abs(np.corrcoef(draws, np.abs(draws))[0, 1]) < 5 / math.sqrt(len(draws))
    assert abs(np.sign(draws).mean()) < 5 / math.sqrt(len(draws))


def test_the_table_is_the_distribution_function():
    # A second method: logarithms of sums in float64, against the integers of the table.
    sampler = DiscreteGaussian(12.5)
    k, probability = law(12.5)
    cumulative = np.cumsum(np.where(np.arange(len(k)) == len(k) // 2, 1, 2)[len(k) // 2 :] * probability[len(k) // 2 :])
    rows = len(sampler._first)
    assert rows == math.ceil(16 * 12.5)
    np.testing.assert_allclose(sampler._first / 2.0**64, cumulative[:rows], rtol=0, atol=1e-14)


def test_the_first_64_bits_alone_do_not_decide_a_tie():
    sampler = DiscreteGaussian(5.0)
    row = 7
    first, rest = sampler._first[row], sampler._rest[row]
    below = (int(rest[0]) << 64 | int(rest[1])) - 1

    def words(low):
        stream = iter([np.array([first]), np.array([low >> 64, low & (2**64 - 1)], dtype=np.uint64)])
        return lambda count: next(stream, np.zeros(count, dtype=np.uint64))

    assert sampler.sample(1, words(below))[0] == row  # just below the threshold
    assert sampler.sample(1, words(below + 1))[0] == row + 1  # just on it


def test_a_tie_deep_in_the_tail_is_decided_among_many_rows():
    sampler = DiscreteGaussian(30.0)
    top = np.uint64(2**64 - 1)
    tied = np.flatnonzero(sampler._first == top)
    assert len(tied) > 100  # beyond 9 standard deviations

    def words(high):
        stream = iter([np.array([top]), np.array([high, 0], dtype=np.uint64)])
        return lambda count: next(stream, np.zeros(count, dtype=np.uint64))

    assert sampler.sample(1, words(0))[0] == tied[0]
    assert sampler.sample(1, words(2**64 - 1))[0] > tied[0] + 50


def test_the_distance_counts_the_tail_and_the_thresholds():
    k, probability = law(4.0)
    assert probability[np.abs(k) > 16 * 4].sum() < DiscreteGaussian(4.0).distance < 1e-50


@pytest.mark.parametrize(("std", "count"), [(0.5, 2), (0.5, 5), (0.7, 2), (0.7, 10), (1.0, 3)])
def test_a_sum_is_as_near_to_a_discrete_gaussian_as_stated(std, count):
    _, one = law(std, reach=14)
    total = one
    for _ in range(count - 1):
        total = np.convolve(total, one)
    middle, near = len(total) // 2, int(4 * std * math.sqrt(count))
    k = np.arange(-middle, middle + 1)
    weight = np.exp(-(k**2) / (2 * count * std**2))
    seen = slice(middle - near, middle + near + 1)
    ratio = np.log(total[seen] / (weight / weight.sum())[seen])
    assert np.abs(ratio).max() <= sum_distance(std, count) * 1.000001 + 1e-12
    if std == 0.5:
        assert np.abs(ratio).max() > 1e-3  # the distance is real: the bound is not vacuous
    assert sum_distance(SMOOTHING_STD, 10**6) < 1e-60


@pytest.mark.parametrize("smoothing", [0.5, 0.6, 0.8])
def test_a_discrete_gaussian_is_a_function_of_a_continuous_one(smoothing):
    # P(Z = z) when y ~ N(shift, s^2) and z is drawn around y from the integers, by quadrature, against N_Z(shift, s^2 + r^2).
    s, shift = 1.3, 2
    y = np.linspace(-14, 18, 64_001)
    z = np.arange(-24, 29)
    around = np.exp(-((z[:, None] - y[None]) ** 2) / (2 * smoothing**2))
    density = np.exp(-((y - shift) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
    made = np.trapezoid(around / around.sum(axis=0) * density, y, axis=1)
    weight = np.exp(-((z - shift) ** 2) / (2 * (s**2 + smoothing**2)))
    near = np.abs(z - shift) <= 5
    ratio = np.abs(np.log(made / (weight / weight.sum())))[near]
    assert ratio.max() <= continuous_distance(smoothing) + 1e-9
    if smoothing == 0.5:
        assert ratio.max() > 1e-4


def test_impossible_scales_are_refused():
    for std in (0.9, 0.0, -3.0, 140_000.0, math.nan, math.inf):
        with pytest.raises(PrivacyError, match="standard deviation"):
            DiscreteGaussian(std)
