"""Nothing leaves without clip, noise and a charge; the noise is what was charged."""

import dataclasses
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from drencoder.errors import ArtifactError, PrivacyError
from drencoder.privacy import mechanism
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import (
    BoundedCodes,
    BoundedSum,
    Release,
    Releases,
    clip_rows,
    received_codes,
    release_codes,
    release_sum,
    release_unnoised,
    sum_releases,
)
from drencoder.privacy.noise_source import ReplayNoise, SecureNoise

SIGMA, CLIP = 1.7, 0.3
KEY = bytes(range(32))


@pytest.fixture
def ledger_fn(tmp_path):
    opened = []

    def build(trust, **change):
        plan = make_plan(
            **{
                "trust": trust,
                "population": 200,
                "sampling_rate": 0.2,
                "rounds": 3,
                "delta": 1e-4,
                "noise_multiplier": SIGMA,
                **change,
            }
        )
        key = KEY if plan.noise == "replay" else None
        opened.append(Ledger.create(tmp_path / f"{len(opened)}.jsonl", plan, key=key))
        return opened[-1]

    yield build
    for ledger in opened:
        ledger.close()


def norms(codes):
    return torch.linalg.vector_norm(codes.values_NV, dim=1, dtype=torch.float64)


def bounded(rows, clip=CLIP):
    return BoundedSum.zero(rows.shape[1], clip).add(clip_rows(rows, clip))


# Clip


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 400),
    scale=st.floats(1e-30, 1e30),
    clip=st.floats(1e-8, 1e8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_no_row_is_longer_than_the_clip(seed, size, scale, clip, dtype):
    values = (torch.randn(5, size, generator=torch.Generator().manual_seed(seed)).double() * scale).to(dtype)
    codes = clip_rows(values, clip)
    assert codes.values_NV.dtype == torch.float32
    assert math.fsum(v * v for v in codes.values_NV[0].tolist()) <= clip**2 * (1 + 1e-15)
    assert norms(codes).max() <= clip
    inside = torch.linalg.vector_norm(values.double(), dim=1) < clip * (1 - 1e-6)
    inside &= torch.isfinite(values.float()).all(1)
    assert torch.equal(codes.values_NV[inside], values[inside].float())


def test_rounding_up_to_float32_does_not_pass_the_clip():
    # Scaled in float32 alone, about half of such rows come out longer than the clip by an ulp.
    values = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    plain = values * (0.1 / torch.linalg.vector_norm(values, dim=1))[:, None]
    assert (torch.linalg.vector_norm(plain.double(), dim=1) > 0.1).float().mean() > 0.05
    codes = clip_rows(100 * values, 0.1)
    assert norms(codes).max() <= 0.1
    assert norms(codes).min() > 0.1 * (1 - 2e-6)


def test_clip_keeps_directions_and_leaves_short_rows():
    values = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    codes = clip_rows(values, 0.5)
    torch.testing.assert_close(codes.values_NV[0], torch.tensor([0.3, 0.4]), rtol=2e-6, atol=0)
    assert torch.equal(codes.values_NV[1:], values[1:])
    assert codes.nonfinite == 0


def test_rows_that_are_not_finite_become_zero_and_are_counted():
    values = torch.ones(5, 3)
    values[0, 1], values[1, 2], values[3] = math.nan, math.inf, -math.inf
    codes = clip_rows(values, 10.0)
    assert codes.nonfinite == 3
    assert codes.values_NV.sum(1).tolist() == [0, 0, 3, 0, 3]
    assert clip_rows(torch.full((1, 2), 1e200, dtype=torch.float64), 1.0).nonfinite == 1
    huge = clip_rows(torch.full((1, 2), 3e38), 1.0)
    assert huge.nonfinite == 0
    assert norms(huge).item() == pytest.approx(1.0, rel=2e-6)


def test_clip_works_on_nobody_and_in_chunks(monkeypatch):
    empty = clip_rows(torch.empty(0, 7), 1.0)
    assert empty.values_NV.shape == (0, 7)
    assert bounded(torch.empty(0, 7)).steps_V.tolist() == [0.0] * 7
    values = torch.randn(37, 11)
    whole = clip_rows(values, 1.0)
    monkeypatch.setattr(mechanism, "_CHUNK_VALUES", 50)
    assert torch.equal(clip_rows(values, 1.0).values_NV, whole.values_NV)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_impossible_clips_are_refused(clip):
    with pytest.raises(PrivacyError, match="clip norm"):
        clip_rows(torch.ones(1, 2), clip)
    with pytest.raises(PrivacyError, match="clip norm"):
        BoundedSum.zero(2, clip)


def test_codes_must_be_rows_of_floats():
    for wrong in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(PrivacyError, match=r"\(N, V\) floats"):
            clip_rows(wrong, 1.0)


# Types carry trust


def test_outside_code_makes_none_of_the_types(ledger_fn):
    values, total = torch.ones(1, 2), BoundedSum.zero(2, 1.0)
    for build in (
        lambda: BoundedCodes(values, 1.0, 0),
        lambda: BoundedSum(values[0], total.quantiser, 1),
        lambda: Release(values[0], 0.0, 1, 1.0),
        lambda: Releases(values, (0,), 0.0, 1, 1.0),
        lambda: dataclasses.replace(clip_rows(values, 1.0), values_NV=100 * values),
    ):
        with pytest.raises(TypeError, match=r"only privacy\.mechanism"):
            build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip_rows(values, 1.0).clip_l2 = 0.1


def test_sums_are_bounded_counted_and_never_saved():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)) * 10
    total = BoundedSum.zero(4, CLIP).add(clip_rows(rows[:4], CLIP)).add(clip_rows(rows[4:], CLIP))
    exact = clip_rows(rows, CLIP).values_NV.double().sum(0)
    assert (total.sum_V - exact).abs().max() <= 9 * total.quantiser.step  # each row is rounded to the nearest integers
    assert total.contributors == 9
    assert total.steps_V.dtype == torch.int64
    # No row is longer than the bound after rounding, and the sum is exact: in any order, and less one row by just that row.
    bound = total.quantiser.bound_l2
    assert CLIP < bound < CLIP * 1.001
    assert total.sensitivity("add_remove") == bound
    assert total.sensitivity("replace_one") == 2 * bound
    assert torch.equal(bounded(rows.flip(0)).steps_V, total.steps_V)
    moved_V = total.steps_V - bounded(rows[1:]).steps_V
    assert torch.equal(moved_V, bounded(rows[:1]).steps_V)
    assert int((moved_V**2).sum()) <= total.quantiser.bound_steps**2
    assert "9" not in repr(total)
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(total)
    with pytest.raises(PrivacyError, match="clip norm differs"):
        total.add(clip_rows(rows, 2 * CLIP))
    with pytest.raises(PrivacyError, match="size differs"):
        total.add(clip_rows(rows[:, :2], CLIP))


# Noise


@pytest.mark.parametrize("source", [SecureNoise(), ReplayNoise(3)], ids=["secure", "replay"])
def test_noise_has_the_law_of_its_quantiser_and_wrong_scales_do_not(source):
    # A false alarm once in 1e9 runs of the test; the wrong scales are off by more than 10 of its thresholds.
    quantiser = BoundedSum.zero(200_000, CLIP).quantiser
    draws = quantiser.noise(source.words(1, 2)) / quantiser.std_steps
    assert stats.kstest(draws, "norm").pvalue > 1e-9
    for wrong in (2 / 3, 3 / 2, 1.05):
        assert stats.kstest(wrong * draws, "norm").pvalue < 1e-9
    correlation = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(correlation) < 6.5 / math.sqrt(len(draws))


def test_streams():
    replay = ReplayNoise(3)
    assert np.array_equal(replay.words(1, 2)(50), ReplayNoise(3).words(1, 2)(50))
    for other in (replay.words(1, 3), replay.words(2, 2), ReplayNoise(4).words(1, 2)):
        assert not np.array_equal(replay.words(1, 2)(50), other(50))
    one = replay.words(1, 2)
    assert not np.array_equal(one(50), one(50))  # a stream goes on
    secure = SecureNoise()
    assert not np.array_equal(secure.words(1, 2)(50), secure.words(1, 2)(50))
    assert secure.words()(0).shape == (0,) == replay.words()(0).shape


def test_secure_words_are_the_operating_systems(monkeypatch):
    for word in (b"\x00", b"\xff"):
        monkeypatch.setattr(os, "urandom", lambda n, w=word: w * n)
        assert set(SecureNoise().words(1)(3).tolist()) == {int.from_bytes(8 * word, "little")}


def assert_std(values, expected):
    """Accepts the expected scale and rejects 0, 2/3 and 3/2 of it: chi-square bounds at 7.5 errors, a false alarm in 1e13."""
    n = values.numel()
    assert n >= 2000
    ratio = values.double().square().mean().sqrt().item() / expected
    limit = 7.5 / math.sqrt(2 * n)
    assert abs(ratio - 1) < limit
    assert all(abs(ratio * wrong - 1) > limit for wrong in (0, 2 / 3, 3 / 2))


@pytest.mark.parametrize("noise", ["secure", "replay"])
def test_central_release_has_the_charged_noise_and_no_bias(ledger_fn, noise):
    ledger = ledger_fn("central", noise=noise)
    rows = torch.randn(30, 20_000, generator=torch.Generator().manual_seed(2))
    total = bounded(rows)
    source = SecureNoise() if noise == "secure" else ReplayNoise(1)
    release = release_sum(total, ledger.charge(1), source)
    assert SIGMA * CLIP < release.noise_std < SIGMA * CLIP * 1.001
    assert release.value.dtype == torch.float32
    assert release.contributors is None  # the realised size of a secret cohort
    assert_std(release.value - total.sum_V, release.noise_std)


def test_local_releases_have_the_charged_noise_each(ledger_fn):
    ledger = ledger_fn("local", participation_cap=3)
    permit = ledger.charge(1)
    clients = sorted(permit.cohort)
    codes = clip_rows(torch.randn(len(clients), 3000, generator=torch.Generator().manual_seed(2)), CLIP)
    parts = release_codes(codes, clients, permit, SecureNoise())
    assert parts.values_NV.dtype == torch.int64  # what leaves is whole numbers of a public step
    noise_NV = (parts.values_NV * parts.step - codes.values_NV).double()
    for row in noise_NV:
        assert_std(row, SIGMA * CLIP)
    assert (torch.corrcoef(noise_NV) - torch.eye(len(clients))).abs().max() < 8 / math.sqrt(
        3000
    )  # 780 pairs or so, each 1e-15
    total = sum_releases([parts])
    assert total.noise_std == pytest.approx(SIGMA * CLIP * math.sqrt(len(clients)), rel=0.01)
    assert torch.equal(
        total.value, (parts.values_NV.sum(0).double() * parts.step).float()
    )  # exact: a function of the sum alone
    assert total.contributors == len(clients)
    assert_std(total.value - codes.values_NV.double().sum(0), total.noise_std)


def test_local_replay_does_not_depend_on_chunks(ledger_fn):
    rows = torch.randn(200, 40, generator=torch.Generator().manual_seed(2))
    made = []
    for step in (7, 200):
        ledger = ledger_fn("local", participation_cap=3, noise="replay")
        permit = ledger.charge(1)
        clients = sorted(permit.cohort)
        parts = []
        for start in range(0, len(clients), step):
            chunk = clients[start : start + step]
            parts.append(release_codes(clip_rows(rows[chunk], CLIP), chunk, permit, ReplayNoise(5)))
        made.append((torch.cat([p.values_NV for p in parts]), sum_releases(iter(parts))))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1].value, made[1][1].value)
    assert made[0][1].noise_std == made[1][1].noise_std


def test_a_permit_is_good_for_one_sum(ledger_fn):
    ledger = ledger_fn("central")
    permit = ledger.charge(1)
    total = bounded(torch.ones(2, 3))
    release_sum(total, permit, SecureNoise())
    with pytest.raises(PrivacyError, match="charge again"):
        release_sum(total, permit, SecureNoise())
    with pytest.raises(PrivacyError, match="server releases the sum"):
        release_codes(clip_rows(torch.ones(1, 3), CLIP), [0], ledger.charge(2), SecureNoise())


def test_a_local_permit_is_good_for_each_client_once(ledger_fn):
    ledger = ledger_fn("local", participation_cap=3)
    permit = ledger.charge(1)
    inside = sorted(permit.cohort)
    outside = next(client for client in range(200) if client not in permit.cohort)
    one, two = clip_rows(torch.ones(1, 3), CLIP), clip_rows(torch.ones(2, 3), CLIP)
    with pytest.raises(PrivacyError, match=f"Client {outside} is not in the cohort"):
        release_codes(one, [outside], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="second time"):
        release_codes(two, [inside[0], inside[0]], permit, SecureNoise())
    first = release_codes(two, inside[:2], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="second time"):
        release_codes(one, [inside[1]], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="number of clients"):
        release_codes(one, inside[3:5], permit, SecureNoise())
    with pytest.raises(PrivacyError, match="no sum to release"):
        release_sum(bounded(torch.ones(2, 3)), permit, SecureNoise())
    with pytest.raises(PrivacyError, match="twice"):
        sum_releases([first, first])
    other = ledger.charge(2)
    later = release_codes(one, [min(other.cohort)], other, SecureNoise())
    with pytest.raises(PrivacyError, match="slot differs"):
        sum_releases([first, later])
    with pytest.raises(PrivacyError, match="no releases"):
        sum_releases([])


def test_received_codes_must_come_from_the_cohort(ledger_fn):
    permit = ledger_fn("local", participation_cap=3).charge(1)
    inside = sorted(permit.cohort)
    outside = next(client for client in range(200) if client not in permit.cohort)
    rows, facts = torch.ones(2, 3), {"clip_l2": CLIP, "noise_std": SIGMA * CLIP}
    arrived = received_codes(rows, inside[:2], permit, **facts)
    assert sum_releases([arrived]).contributors == 2
    assert sum_releases([arrived]).noise_std == pytest.approx(SIGMA * CLIP * math.sqrt(2))
    unknown = received_codes(rows, inside[2:4], permit, clip_l2=CLIP, noise_std=math.nan)
    assert math.isnan(
        sum_releases([unknown, received_codes(rows[:0], [], permit, clip_l2=CLIP, noise_std=math.nan)]).noise_std
    )
    with pytest.raises(PrivacyError, match="noise differs"):
        sum_releases([arrived, unknown])
    with pytest.raises(PrivacyError, match="twice"):
        sum_releases([arrived, arrived])
    with pytest.raises(PrivacyError, match=f"Client {outside} is not in the cohort"):
        received_codes(rows, [inside[0], outside], permit, **facts)
    with pytest.raises(PrivacyError, match="not a release"):
        received_codes(rows, [0, 1], ledger_fn("central").charge(1), **facts)


def test_replayable_noise_is_refused_in_a_private_run(ledger_fn):
    permit = ledger_fn("central").charge(1)
    with pytest.raises(PrivacyError, match="secure noise and the source is replay"):
        release_sum(bounded(torch.ones(2, 3)), permit, ReplayNoise(0))
    release_sum(bounded(torch.ones(2, 3)), permit, SecureNoise())  # the refusal used nothing up


def test_a_release_without_noise_needs_the_named_event(ledger_fn):
    ledger = ledger_fn("central", noise_multiplier=None, non_private=["round"])
    permit, rows = ledger.charge(1), torch.tensor([[0.1, 1e-12, -0.2], [0.0, 1e-12, 0.1]])
    with pytest.raises(PrivacyError, match="no noise"):
        release_sum(bounded(rows), permit, SecureNoise())
    release = release_unnoised([clip_rows(rows[:0], CLIP), clip_rows(rows, CLIP)], permit)
    assert release.noise_std == 0
    torch.testing.assert_close(release.value, rows.sum(0), rtol=1e-6, atol=0)  # floats as they are, on no lattice
    with pytest.raises(PrivacyError, match="charge again"):
        release_unnoised([clip_rows(rows, CLIP)], permit)
    with pytest.raises(PrivacyError, match="charged for noise"):
        release_unnoised([clip_rows(rows, CLIP)], ledger_fn("central").charge(1))
    with pytest.raises(PrivacyError, match="nothing to sum"):
        release_unnoised([], ledger.charge(2))
    assert ledger.spent()["public"] == math.inf


def test_nothing_leaves_when_the_ledger_cannot_be_written(ledger_fn, monkeypatch):
    ledger = ledger_fn("central")
    drawn = []
    monkeypatch.setattr(SecureNoise, "words", lambda self, *indices: drawn.append(indices))

    def fails(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ArtifactError):
        release_sum(bounded(torch.ones(2, 3)), ledger.charge(1), SecureNoise())
    assert drawn == []


def test_the_realised_cohort_size_is_not_to_be_had(ledger_fn):
    # Rule 1: a mean is the released sum over the plan's fixed denominator. Under central trust a release
    # does not even know how many took part, so no caller can divide by it.
    ledger = ledger_fn("central")
    assert ledger.plan.denominator(1) == 40.0
    # 37 took part: the cohort itself comes from secure randomness and might be of the expected size by chance.
    release = release_sum(bounded(torch.ones(37, 3)), ledger.charge(1), SecureNoise())
    assert release.contributors is None
    assert "37" not in repr(release)
    # Every client weighs one: twice the clients are exactly twice the sum.
    torch.testing.assert_close(bounded(torch.ones(8, 3)).steps_V, 2 * bounded(torch.ones(4, 3)).steps_V)
