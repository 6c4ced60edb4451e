"""Discrete Gaussian shares: the law is right, wrong scales are rejected, and every stated distance holds."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from drencoder.errors import PrivacyError
from drencoder.secure_aggregation import discrete
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


def then_zeros(*given):
    """A stream that gives these words, cut to what is asked for, and zeros from then on: signs that are plus."""
    stream = iter(given)
    return lambda count: next(stream, np.zeros(count, dtype=np.uint64))[:count]


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


@pytest.mark.parametrize("std", [1.0, 4.0, 37.3, 2000.0, 5000.0, 1e6])  # the last two are sums of two and three tables
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
    first = discrete._table(12.5)._first
    k, probability = law(12.5)
    cumulative = np.cumsum(np.where(np.arange(len(k)) == len(k) // 2, 1, 2)[len(k) // 2 :] * probability[len(k) // 2 :])
    assert first[-1] == 2**64 - 1 > first[-2]  # the last row stands for all beyond it
    assert 9 * 12.5 < len(first) < 10 * 12.5
    np.testing.assert_allclose(first / 2.0**64, cumulative[: len(first)], rtol=0, atol=1e-14)


@pytest.mark.parametrize("std", [1.0, 37.3, 384.0])
def test_the_guide_gives_what_a_search_of_the_whole_table_gives(std):
    table = discrete._table(std)
    clear = table._first[table._first < 2**64 - 2**20]  # others are too near to each other for a number between
    heads = np.concatenate([seeded_words(1)(100_000), clear + np.uint64(1), clear - np.uint64(1)])
    drawn = table.sample(len(heads), then_zeros(heads))
    assert np.array_equal(drawn, np.searchsorted(table._first, heads, side="right"))


@pytest.mark.parametrize("std", [4.0, 384.0])
def test_sixteen_bits_decide_as_sixty_four_do(std):
    """All 65,536 first bits, with zeros and with ones after them."""
    table, firsts = discrete._table(std), np.arange(1 << 16, dtype=np.uint16)
    for after in (0, 2**64 - 1):
        more = np.full(1 << 16, after, dtype=np.uint64)
        short = table.sample_short(1 << 16, then_zeros(firsts.view(np.uint64), more))
        heads = firsts.astype(np.uint64) << np.uint64(48) | more >> np.uint64(16)
        wanted = np.searchsorted(table._first, heads, side="right")
        assert np.array_equal(short[:-1], wanted[:-1])
        assert wanted[-1] - 1 <= short[-1] <= wanted[-1]  # with ones after it, a tie with the end of the table


def exact_thresholds(std, rows):
    """P(|X| <= k) with 2,048 bits, rounded down."""
    cumulative, total = discrete._cumulative(std, 2048 + 256)
    return [(part << 2048) // total for part in cumulative[:rows]]


def test_the_first_64_bits_alone_do_not_decide_a_tie():
    sampler, row = DiscreteGaussian(5.0), 7
    threshold = exact_thresholds(5.0, row + 1)[row]

    def words(uniform):
        head, *rest = (uniform >> (64 * place) & (2**64 - 1) for place in range(31, -1, -1))
        return then_zeros(np.array([head], dtype=np.uint64), np.array(rest, dtype=np.uint64))

    assert threshold >> (2048 - 64) == discrete._table(5.0)._first[row]
    assert sampler.sample(1, words(threshold - 1))[0] == row  # just below the threshold
    assert sampler.sample(1, words(threshold))[0] == row + 1  # just on it


def test_a_tie_in_the_tail_is_decided_among_the_rows_that_no_table_has():
    sampler, first = DiscreteGaussian(30.0), discrete._table(30.0)._first

    def words(rest):
        return then_zeros(np.array([2**64 - 1], dtype=np.uint64), np.full(31, rest, dtype=np.uint64))

    assert sampler.sample(1, words(0))[0] == len(first) - 1
    assert sampler.sample(1, words(2**64 - 1))[0] == 48 * 30  # the end of what is drawn


def test_a_threshold_whose_first_bits_are_not_certain_makes_no_table(monkeypatch):
    exact = discrete._cumulative
    monkeypatch.setattr(discrete, "_cumulative", lambda std, bits: ([1 << bits, 2 << bits], 4 << bits))
    with pytest.raises(PrivacyError, match="No table can be made"):
        discrete._first_words(5.0)  # a quarter: zeros behind its first 64 bits, which rounding may have made
    monkeypatch.setattr(discrete, "_cumulative", exact)
    assert len(discrete._first_words(5.0))


def test_the_distance_counts_the_tail_and_the_thresholds():
    k, probability = law(4.0)
    assert probability[np.abs(k) > 12 * 4].sum() < math.exp(-(12**2) / 2)  # the tail's bound, where it can be seen
    assert DiscreteGaussian(4.0).log_distance == pytest.approx(math.log(3) - 48**2 / 2)
    assert math.log(2**18) - 2040 * math.log(2) < -(48**2) / 2  # thresholds are far finer than the tail


@pytest.mark.parametrize(("fine", "stride", "coarse"), [(1.0, 2, 0.5), (1.5, 3, 0.5), (2.0, 2, 1.0), (3.0, 5, 0.6)])
def test_a_split_is_as_near_to_a_discrete_gaussian_as_stated(fine, stride, coarse):
    """X + kY against N_Z by exact convolution, at scales where the distance can be seen."""
    k_fine, p_fine = law(fine, 14)
    k_coarse, p_coarse = law(coarse, 14)
    spread = np.zeros(2 * stride * k_coarse[-1] + 1)
    spread[::stride] = p_coarse
    total = np.convolve(p_fine, spread)
    reach = k_fine[-1] + stride * k_coarse[-1]
    k, std = np.arange(-reach, reach + 1), math.hypot(fine, stride * coarse)
    seen = np.abs(k) <= 4 * std
    weight = np.exp(-(k**2) / (2 * std**2))
    ratio = np.abs(np.log(total[seen] / (weight / weight.sum())[seen])).max()
    width = (coarse**-2 + (stride / fine) ** 2) ** -0.5
    assert ratio <= continuous_distance(width) * 1.02 + 1e-12
    if width < 0.5:
        assert ratio > 1e-2  # the distance is real: the bound is not vacuous


@pytest.mark.parametrize("std", [4096.0, 4097.0, 131_072.0, 7e6, 1e12])
def test_a_wide_distribution_is_split_without_losing_variance(std):
    *fine, last = discrete._split(std)
    variance = sum((64**place * one) ** 2 for place, one in enumerate([*fine, last]))
    assert std**2 * (1 - 1e-15) <= variance <= std**2 * (1 + 1e-13)
    assert set(fine) <= {384.0}
    assert 63 < last <= 4096.0 or not fine
    assert DiscreteGaussian(std).log_ratio < 1e-300


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
    for std in (0.9, 0.0, -3.0, 2.0**51, math.nan, math.inf):
        with pytest.raises(PrivacyError, match="standard deviation"):
            DiscreteGaussian(std)
