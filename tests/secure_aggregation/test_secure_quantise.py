"""Codes as integers: no code grows past the stated bound, no sum wraps around, and the mean is right."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from drencoder.errors import PrivacyError
from drencoder.secure_aggregation.discrete import SMOOTHING_STD
from drencoder.secure_aggregation.quantise import Quantiser


def system_words(count):
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def seeded_words(seed):
    generator = np.random.Philox(seed)
    return lambda count: np.atleast_1d(generator.random_raw(count))


def rounding_up(count):
    """The worst uniform numbers: every fraction goes up."""
    return np.zeros(count, dtype=np.uint64)


def rows(count, size, clip, seed=0, length=1 - 1e-6):
    values = np.random.default_rng(seed).standard_normal((count, size))
    return (values * (length * clip / np.linalg.norm(values, axis=1))[:, None]).astype(np.float32)


def made(values=256, clip=0.7, share=0.2, clients=20):
    return Quantiser.shared(values=values, clip_l2=clip, share_multiplier=share, most_clients=clients)


@settings(max_examples=60, deadline=None)
@given(
    values=st.integers(1, 400),
    clip=st.floats(1e-6, 1e6),
    share=st.floats(0.01, 5),
    clients=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
    worst=st.booleans(),
)
def test_no_rounded_code_is_longer_than_the_bound(values, clip, share, clients, seed, worst):
    quantiser = made(values, clip, share, clients)
    code = rows(1, values, clip, seed)[0]
    rounded = quantiser.round_code(code, rounding_up if worst else system_words)
    assert sum(int(v) ** 2 for v in rounded) <= quantiser.bound_steps**2
    assert np.abs(rounded * quantiser.step - code).max() <= quantiser.step * (1 + 1e-6)
    assert quantiser.growth <= 0.25
    assert quantiser.bound_l2 == pytest.approx(clip * (1 + quantiser.growth))


def test_a_code_that_cannot_be_rounded_up_is_rounded_towards_zero():
    # 21 steps for 400 values: a code of 1.04 steps each has the clip's length, and all of them rounded up are twice as long.
    tight = Quantiser(400, 1.0, 21.0, 0.2, 20, 24)
    code = np.full(400, 1.04 / 21, dtype=np.float32)
    assert np.linalg.norm(code) < 1.0
    assert np.linalg.norm(np.ceil(code * 21)) > tight.bound_steps
    rounded = tight.round_code(code, rounding_up)
    assert np.array_equal(rounded, np.ones(400))
    # With honest randomness hardly any value goes up, and the first rounding is kept.
    assert 400 < tight.round_code(code, seeded_words(0)).sum() < 460


def test_rounding_is_unbiased():
    """A false alarm once in 5e9 runs: 64 values, 7 of their largest possible standard errors. Rounding to the nearest fails."""
    quantiser = made(values=64, share=0.05)
    code = rows(1, 64, 0.7)[0]
    exact, limit = code.astype(float) / quantiser.step, 7 * 0.5 / math.sqrt(4000)
    mean = np.mean([quantiser.round_code(code, system_words) for _ in range(4000)], axis=0)
    assert np.abs(mean - exact).max() < limit
    for wrong in (np.round(exact), np.floor(exact), quantiser.round_code(code, rounding_up)):
        assert np.abs(wrong - exact).max() > 4 * limit


def test_codes_that_are_too_long_or_not_finite_are_refused():
    quantiser = made()
    code = rows(1, 256, 0.7)[0]
    for wrong in (code * 1.01, np.full(256, np.nan, dtype=np.float32), np.full(256, np.inf, dtype=np.float32)):
        with pytest.raises(PrivacyError, match="longer than its clip"):
            quantiser.round_code(wrong, system_words)
    with pytest.raises(PrivacyError, match="shape"):
        quantiser.round_code(code[:-1], system_words)


@pytest.mark.parametrize(
    ("values", "clients", "share"), [(1, 1, 1.0), (2048, 300, 0.05), (64, 3, 4.0), (512, 20_000, 0.01)]
)
def test_the_modular_sum_of_the_largest_codes_does_not_wrap(values, clients, share):
    # All clients put their whole clip on one value, in the same direction: the worst sum there is.
    quantiser = made(values, 1.0, share, clients)
    code = np.zeros(values, dtype=np.float32)
    code[0] = 1.0
    one = quantiser.round_code(code, rounding_up)
    for sign in (1, -1):
        total = quantiser.to_residues(sign * one * clients)
        assert quantiser.to_values(total)[0] == pytest.approx(sign * clients, rel=0.02)
    tail = 7 * quantiser.std_steps * math.sqrt(clients)  # 7 standard deviations of the whole noise fit on top of it
    assert one[0] * clients + tail < 2 ** (quantiser.bits - 1)


def test_the_bits_are_the_fewest_that_hold_the_sum():
    small, middle, large = made(64, clients=2), made(2048, clients=200), made(131_072, clients=5000)
    assert (small.bits, middle.bits, large.bits) == (16, 24, 32)
    for quantiser in (small, middle, large):
        assert quantiser._reach < 2 ** (quantiser.bits - 1)
    assert middle._reach > 2**15
    assert large._reach > 2**23


def test_steps_grow_before_the_modulus_overflows_and_then_the_plan_is_refused():
    usual, crowded = made(131_072, clients=100), made(131_072, share=0.001, clients=600_000)
    assert usual.growth == pytest.approx(0.01)
    assert 0.01 < crowded.growth <= 0.25
    assert crowded._reach < 2**31
    with pytest.raises(PrivacyError, match="do not fit"):
        made(8_388_608, share=0.001, clients=10_000_000)


def test_impossible_plans_are_refused():
    for change in ({"values": 0}, {"share": 0.0}, {"clip": -1.0}, {"clients": 0}, {"clip": math.nan}):
        with pytest.raises(PrivacyError, match="must be positive"):
            made(**change)


@pytest.mark.parametrize("scale", [1.0, 2 / 3, 3 / 2])
def test_the_sum_is_the_codes_plus_noise_of_the_stated_deviation(scale):
    clients, quantiser = 16, made(4096, share=0.25)
    codes = rows(clients, 4096, 0.7)
    total = np.zeros(4096, dtype=np.uint32)
    for code in codes:
        total += quantiser.round_and_noise(code, system_words)
    released = quantiser.to_values(total & np.uint32(2**quantiser.bits - 1))
    noise = released - codes.sum(axis=0, dtype=np.float64)
    promised = scale * quantiser.noise_std * math.sqrt(clients)
    p_value = stats.kstest(noise / promised, "norm").pvalue
    assert (p_value > 1e-10) if scale == 1.0 else (p_value < 1e-20)  # a false alarm once in 1e10 runs
    # The promise is the plan's multiplier times the bound after rounding, and a little more.
    assert quantiser.noise_std > 0.25 * quantiser.bound_l2
    assert quantiser.std_steps == pytest.approx(math.hypot(0.25 * quantiser.bound_steps, SMOOTHING_STD))


def test_the_distance_is_far_below_any_delta():
    for quantiser, shares in ((made(8_388_608, clients=1000), 1000), (made(64, share=0.01), 5)):
        assert quantiser.log_distance(shares) < -1100  # so it fits under an epsilon of 1000, too
        assert quantiser.log_distance(2 * shares) == pytest.approx(quantiser.log_distance(shares) + math.log(2))
        assert 0 < quantiser.log_ratio(shares) < 1e-50


# One code with all of its noise (local trust), and a sum that one machine makes (central trust)


@pytest.mark.parametrize(
    ("values", "noise", "bits"),
    [(1, 0.7, 16), (512, 0.7, 16), (512, 4.0, 24), (131_072, 0.7, 24), (8_388_608, 100.0, 32)],
)
def test_one_code_takes_the_fewest_bits_and_their_finest_step(values, noise, bits):
    quantiser = Quantiser.alone(values=values, clip_l2=0.3, noise_multiplier=noise, log_wrap_risk=-70.0)
    assert quantiser.bits == bits
    assert quantiser.growth <= 0.01
    assert 0.9 * 2 ** (bits - 1) < quantiser._reach < 2 ** (bits - 1)
    assert quantiser.noise_std == pytest.approx(noise * quantiser.bound_l2, rel=1e-3)
    if bits > 16:  # fewer would need steps that lengthen codes by more than 1 %
        narrow = Quantiser(values, 0.3, 2.0 ** (bits - 9), noise, 1, bits - 8, -70.0)._finest()
        assert narrow.growth > 0.01
    # The risk is that of a value beyond the modulus: sub-Gaussian tails of all values, both signs.
    left = (2 ** (bits - 1) - quantiser.clip_steps - 2) / quantiser.std_steps
    assert math.log(2 * values) - left**2 / 2 <= -70.0


def test_a_code_that_no_bits_hold_is_refused():
    with pytest.raises(PrivacyError, match="do not fit into 32 bits"):
        Quantiser.alone(values=8_388_608, clip_l2=1.0, noise_multiplier=1e5, log_wrap_risk=-70.0)


@settings(max_examples=60, deadline=None)
@given(values=st.integers(1, 400), clip=st.floats(1e-6, 1e6), seed=st.integers(0, 2**32 - 1), half=st.booleans())
def test_no_code_is_longer_than_the_bound_when_rounded_to_the_nearest(values, clip, seed, half):
    quantiser = Quantiser.fine(values=values, clip_l2=clip, noise_multiplier=1.0)
    assert quantiser == Quantiser.fine(values=values, clip_l2=clip, noise_multiplier=1.0)
    assert quantiser.growth <= 2.0**-12
    assert replace(quantiser, noise_multiplier=9.0) == Quantiser.fine(values=values, clip_l2=clip, noise_multiplier=9.0)
    coarse = replace(quantiser, clip_steps=math.sqrt(values) * 3)  # where rounding matters
    for one in (quantiser, coarse):
        code = rows(1, values, clip, seed)[0]
        if half:  # all fractions a half: the worst there is
            code = (np.floor(code / one.step) + 0.5) * one.step
            code = (code * min(1.0, clip / np.linalg.norm(code))).astype(np.float32)
        rounded = np.rint(code.astype(np.float64) * one.nearest_scale)
        assert sum(int(v) ** 2 for v in rounded) <= one.bound_steps**2


def test_residues_and_values_are_inverse():
    quantiser = made(6, clients=3)
    steps = np.array([0, 1, -1, 2 ** (quantiser.bits - 1) - 1, -(2 ** (quantiser.bits - 1)), 77])
    np.testing.assert_allclose(quantiser.to_values(quantiser.to_residues(steps)), steps * quantiser.step)
    with pytest.raises(PrivacyError, match="modular sum"):
        quantiser.to_values(np.full(6, 2**quantiser.bits, dtype=np.uint32))
    with pytest.raises(PrivacyError, match="modular sum"):
        quantiser.to_values(np.zeros(5, dtype=np.uint32))
