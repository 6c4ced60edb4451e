"""A clip that follows: its joint vector is bounded as it says, its estimate is right, and it finds the quantile.

Legend: N clients, K code values.
"""

import math

import pytest
import torch
from torch import Tensor

from drencoder.encoders.identity import IdentityEncoder
from drencoder.federated.adaptive_clip import NORM_BIT_WEIGHT, AdaptiveClip, AdaptiveClipEncoder
from drencoder.federated.query import update_query
from drencoder.federated.query_encoders import UpdatesEncoder
from drencoder.privacy.mechanism import clip_rows
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import survey
from encoder_toys import SEGMENTS, SIZE


def with_norm_bit(clip_l2: float, code_NK: Tensor) -> Tensor:
    """What the wrapper makes of codes that an encoder of their size sends as they are."""
    return AdaptiveClipEncoder(UpdatesEncoder(code_NK.shape[1]), clip_l2).encode(code_NK, 0)


def codes(count: int, seed: int, size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length_N1 = torch.rand(count, 1, generator=generator) * 4
    return torch.nn.functional.normalize(torch.randn(count, size, generator=generator), dim=1) * length_N1


def test_no_joint_vector_is_longer_than_the_bound() -> None:
    clip = AdaptiveClip(1.5, 0.5, 0.3)
    code_NK = torch.cat([codes(200, 0), torch.zeros(1, 20), torch.full((1, 20), 1e6)])
    joint_NV = with_norm_bit(clip.clip_l2, code_NK)
    norm_N = joint_NV.double().norm(dim=1)
    assert joint_NV.shape == (202, 21)
    assert float(norm_N.max()) <= clip.bound * (1 + 1e-6)
    assert float(norm_N.max()) == pytest.approx(clip.bound, rel=1e-6)  # and no looser than need be
    short_N = code_NK.norm(dim=1) <= 1.5
    says_N = code_NK.norm(dim=1) > 0
    assert torch.equal(joint_NV[:, -1] > 0, short_N & says_N)
    assert torch.allclose(joint_NV[:, -1].abs(), NORM_BIT_WEIGHT * 1.5 * says_N)
    assert not joint_NV[200].any()  # a client that has nothing to say contributes zero, its vote included
    assert torch.allclose(joint_NV[short_N, :-1], code_NK[short_N])
    # The mechanism's clip, which the noise rests on, has nothing left to do.
    assert torch.allclose(clip_rows(joint_NV, clip.bound).values_NV, joint_NV, rtol=1e-5)


def test_broken_codes_stay_broken_so_that_the_clip_counts_them() -> None:
    code_NK = codes(3, 1)
    code_NK[1, 4] = torch.nan
    code_NK[2, 0] = torch.inf
    clipped = clip_rows(with_norm_bit(1.0, code_NK), 2.0)
    assert clipped.nonfinite == 2
    assert float(clipped.values_NV[1:].abs().sum()) == 0.0


def test_the_share_is_counted_and_clamped() -> None:
    clip = AdaptiveClip(1.0, 0.5, 0.3)
    joint_NV = with_norm_bit(clip.clip_l2, codes(400, 2))
    below = float((codes(400, 2).norm(dim=1) <= 1.0).float().mean())
    assert clip.share_below(joint_NV.sum(0), 400) == pytest.approx(below, abs=1e-5)
    # A cohort twice as large as expected: half of the surplus is taken for agreement, and the share stays a share.
    assert clip.share_below(2 * joint_NV.sum(0), 400) == pytest.approx(max(0.0, 2 * below - 0.5), abs=1e-5)
    assert clip.share_below(torch.full((21,), 1e9), 400) == 1.0
    assert clip.share_below(torch.full((21,), -1e9), 400) == 0.0


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_it_finds_the_quantile_from_either_side(quantile: float) -> None:
    code_NK = codes(500, 3)
    wanted = float(code_NK.norm(dim=1).quantile(quantile))
    for start in (0.01, 100.0):
        clip = AdaptiveClip(start, quantile, 0.3)
        for _ in range(120):
            clip = clip.after(with_norm_bit(clip.clip_l2, code_NK).sum(0), 500)
        assert clip.clip_l2 == pytest.approx(wanted, rel=0.05)


def test_noise_moves_the_clip_by_no_more_than_its_rate() -> None:
    clip = AdaptiveClip(2.0, 0.5, 0.3)
    for value in (-1e12, 0.0, 1e12):
        moved = clip.after(torch.full((5,), value), 10).clip_l2
        assert 2.0 * math.exp(-0.15) - 1e-9 <= moved <= 2.0 * math.exp(0.15) + 1e-9


def test_a_query_with_it_costs_one_value_and_no_more_privacy() -> None:
    recipe = load_recipe("quickstart", ["encoder.name=identity"])
    encoder, clip = IdentityEncoder(SEGMENTS), AdaptiveClip(0.7, 0.5, 0.3)
    plain, adaptive_query = update_query(encoder, recipe, 1), update_query(encoder, recipe, 1, clip)
    assert adaptive_query.spec.wire.code_size == plain.spec.wire.code_size + 1
    # The noise's scale is the bound of the joint vector: what is charged is a multiplier of it, and stays.
    assert adaptive_query.spec.clip_l2 == clip.bound == pytest.approx(0.7 * math.sqrt(1 + NORM_BIT_WEIGHT**2))
    update_ND = torch.zeros(2, SIZE)
    assert torch.equal(adaptive_query.decode(adaptive_query.encode(update_ND)), update_ND)
    fixed, adaptive = survey(recipe), survey(recipe.changed({"privacy.clip": "adaptive"}))
    assert fixed.privacy == adaptive.privacy
    assert (fixed.message_bytes, adaptive.message_bytes) == (3 * 32_768 + 20, 3 * 32_769 + 20)
