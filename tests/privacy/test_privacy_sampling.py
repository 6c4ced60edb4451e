"""The samplers follow the law that the accounting states, and a capped client keeps to its cap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drencoder.errors import PrivacyError
from drencoder.privacy.sampling import CappedSampler, PoissonSampler, split_blocks

KEY = bytes(range(32))


def rates(rounds, rate, stage1=None):
    return {**({0: stage1} if stage1 else {}), **dict.fromkeys(range(1, rounds + 1), rate)}


def membership(sampler, slots, population):
    table = np.zeros((len(slots), population), dtype=bool)
    for row, slot in enumerate(slots):
        table[row, sampler.cohort(slot)] = True
    return table


def make(kind, population, rounds, rate, cap=1):
    slots = tuple(range(1, rounds + 1))
    if kind == "poisson":
        return PoissonSampler(KEY, population, rates(rounds, rate))
    return CappedSampler(KEY, population, rates(rounds, rate), split_blocks(slots, cap))


@pytest.mark.parametrize("kind", ["poisson", "capped"])
def test_cohort_sizes_are_binomial(kind):
    # 400 slots of Binomial(500, 0.05): mean 25, variance 23.75. A fixed-size cohort has variance 0,
    # whole-cohort switching or duplicated clients at least double it. Bounds are 6 standard errors.
    population, rate = 500, 0.05
    sizes = []
    for seed in range(20):
        sampler = make(kind, population, 20, rate)
        object.__setattr__(sampler, "key", bytes([seed]) * 32)
        sizes += [len(sampler.cohort(slot)) for slot in range(1, 21)]
    assert abs(np.mean(sizes) - 25) < 6 * np.sqrt(23.75 / 400)
    assert abs(np.var(sizes) / 23.75 - 1) < 6 * np.sqrt(2 / 400)


@pytest.mark.parametrize("kind", ["poisson", "capped"])
def test_clients_are_independent_and_equally_likely(kind):
    population, trials, rate = 60, 4000, 0.3
    table = np.zeros((trials, population))
    sampler = make(kind, population, 1, rate)
    for trial in range(trials):
        object.__setattr__(sampler, "key", trial.to_bytes(32, "big"))
        table[trial, sampler.cohort(1)] = 1
    assert np.abs(table.mean(0) - rate).max() < 5.5 * np.sqrt(rate * (1 - rate) / trials)
    correlation = np.corrcoef(table.T) - np.eye(population)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(trials)


def test_poisson_slots_are_independent_and_capped_slots_exclude_each_other():
    slots = tuple(range(1, 5))
    poisson = membership(make("poisson", 20_000, 4, 0.25), slots, 20_000)
    capped = membership(make("capped", 20_000, 4, 0.25), slots, 20_000)
    both = (poisson[0] & poisson[1]).mean()
    assert abs(both - 0.0625) < 6 * np.sqrt(0.0625 / 20_000)
    assert not (capped[0] & capped[1]).any()
    assert capped.sum(0).tolist() == [1] * 20_000  # four times 0.25 fill the block


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(1, 12),
    rounds=st.integers(1, 12),
    stage1=st.sampled_from([None, 0.1, 0.5]),
    share=st.floats(0.01, 1.0),
    key=st.binary(min_size=32, max_size=32),
)
def test_nobody_takes_part_more_often_than_the_cap(cap, rounds, stage1, share, key):
    slots = tuple(range(0 if stage1 else 1, rounds + 1))
    blocks = split_blocks(slots, cap)
    assert [slot for block in blocks for slot in block] == list(slots)
    assert len(blocks) == min(cap, len(slots))
    rate = share * min(1.0, 0.5 if stage1 else 1.0) / max(map(len, blocks))
    sampler = CappedSampler(key, 300, rates(rounds, rate, stage1), blocks)
    assert membership(sampler, slots, 300).sum(0).max() <= cap


def test_attempts():
    poisson = PoissonSampler(KEY, 5000, rates(2, 0.1))
    assert poisson.cohort(1) == poisson.cohort(1, attempt=0) != poisson.cohort(1, attempt=1)
    assert poisson.cohort(1) != poisson.cohort(2)
    replayed = PoissonSampler(KEY, 5000, rates(2, 0.1), fresh_attempts=False)
    assert replayed.cohort(1, attempt=7) == replayed.cohort(1)
    capped = make("capped", 5000, 2, 0.1)
    assert capped.cohort(1, attempt=7) == capped.cohort(1)
    assert PoissonSampler(bytes(32), 5000, rates(2, 0.1)).cohort(1) != poisson.cohort(1)


def test_edges():
    assert PoissonSampler(KEY, 7, {1: 1.0}).cohort(1) == list(range(7))
    assert CappedSampler(KEY, 7, {1: 1.0, 2: 1.0}, ((1,), (2,))).cohort(2) == list(range(7))
    twenty = make("capped", 1000, 20, 0.05)  # sums to a hair above 1 in floating point
    assert sum(len(twenty.cohort(slot)) for slot in range(1, 21)) == 1000
    assert "KEY" not in repr(twenty)
    assert str(KEY) not in repr(twenty)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PoissonSampler(b"short", 5, {1: 0.5}), "32"),
        (lambda: PoissonSampler(KEY, 0, {1: 0.5}), "at least 1"),
        (lambda: PoissonSampler(KEY, 5, {1: 1.5}), r"\(0, 1\]"),
        (lambda: PoissonSampler(KEY, 5, {1: 0.5}).cohort(3), "not in the schedule"),
        (lambda: make("capped", 5, 3, 0.5), "raise the participation cap"),
    ],
)
def test_refusals_say_value_and_cure(build, words):
    with pytest.raises(PrivacyError, match=words):
        build()


def test_a_poisson_cohort_may_be_empty():
    """A rule that somebody always comes would be another mechanism than the one that is accounted for."""
    sampler = PoissonSampler(bytes(range(32)), 20, dict.fromkeys(range(1, 401), 0.02))
    sizes = [len(sampler.cohort(slot)) for slot in range(1, 401)]
    # Each is empty with probability 0.98^20 = 0.668: 267 of 400 on average, with a standard deviation of 9.4.
    assert 200 < sizes.count(0) < 334
