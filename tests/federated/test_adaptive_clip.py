"""A clip that follows: its joint vector is bounded as it says, its estimate is right, and it finds the quantile.

Legend: N clients, K code values.
"""

import math

import pytest
import torch
from torch import Tensor

from drencoder.encoders.identity import IdentityEncoder
from drencoder.federated.adaptive_clip import WITNESS, ClipFollower
from drencoder.federated.query import update_query
from drencoder.privacy.mechanism import clip_rows
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import survey
from encoder_toys import SEGMENTS, SIZE


def codes(count: int, seed: int, size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length_N1 = torch.rand(count, 1, generator=generator) * 4
    return torch.nn.functional.normalize(torch.randn(count, size, generator=generator), dim=1) * length_N1


def test_no_joint_vector_is_longer_than_the_bound() -> None:
    follower = ClipFollower(1.5, 0.5, 0.3)
    code_NK = torch.cat([codes(200, 0), torch.zeros(1, 20), torch.full((1, 20), 1e6)])
    joint_NV = follower.join(code_NK)
    norm_N = joint_NV.double().norm(dim=1)
    assert joint_NV.shape == (202, 21)
    assert float(norm_N.max()) <= follower.bound * (1 + 1e-6)
    assert float(norm_N.max()) == pytest.approx(follower.bound, rel=1e-6)  # and no looser than need be
    short_N = code_NK.norm(dim=1) <= 1.5
    assert torch.equal(joint_NV[:, -1] > 0, short_N)
    assert torch.allclose(joint_NV[:, -1].abs(), torch.full((202,), WITNESS * 1.5))
    assert torch.allclose(joint_NV[short_N, :-1], code_NK[short_N])
    # The mechanism's clip, which the noise rests on, has nothing left to do.
    assert torch.allclose(clip_rows(joint_NV, follower.bound).values_NV, joint_NV, rtol=1e-5)


def test_broken_codes_stay_broken_so_that_the_clip_counts_them() -> None:
    code_NK = codes(3, 1)
    code_NK[1, 4] = torch.nan
    code_NK[2, 0] = torch.inf
    clipped = clip_rows(ClipFollower(1.0, 0.5, 0.3).join(code_NK), 2.0)
    assert clipped.nonfinite == 2
    assert float(clipped.values_NV[1:].abs().sum()) == 0.0


def test_the_share_is_counted_and_clamped() -> None:
    follower = ClipFollower(1.0, 0.5, 0.3)
    joint_NV = follower.join(codes(400, 2))
    below = float((codes(400, 2).norm(dim=1) <= 1.0).float().mean())
    assert follower.share_below(joint_NV.sum(0), 400) == pytest.approx(below, abs=1e-5)
    # A cohort twice as large as expected: half of the surplus is taken for agreement, and the share stays a share.
    assert follower.share_below(2 * joint_NV.sum(0), 400) == pytest.approx(max(0.0, 2 * below - 0.5), abs=1e-5)
    assert follower.share_below(torch.full((21,), 1e9), 400) == 1.0
    assert follower.share_below(torch.full((21,), -1e9), 400) == 0.0


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_it_finds_the_quantile_from_either_side(quantile: float) -> None:
    code_NK = codes(500, 3)
    wanted = float(code_NK.norm(dim=1).quantile(quantile))
    for start in (0.01, 100.0):
        follower = ClipFollower(start, quantile, 0.3)
        for _ in range(120):
            follower = follower.after(follower.join(code_NK).sum(0), 500)
        assert follower.clip_l2 == pytest.approx(wanted, rel=0.05)


def test_noise_moves_the_clip_by_no_more_than_its_rate() -> None:
    follower = ClipFollower(2.0, 0.5, 0.3)
    for value in (-1e12, 0.0, 1e12):
        moved = follower.after(torch.full((5,), value), 10).clip_l2
        assert 2.0 * math.exp(-0.15) - 1e-9 <= moved <= 2.0 * math.exp(0.15) + 1e-9


def test_a_query_with_it_costs_one_value_and_no_more_privacy() -> None:
    recipe = load_recipe("quickstart", ["encoder.name=identity"])
    encoder, follower = IdentityEncoder(SEGMENTS), ClipFollower(0.7, 0.5, 0.3)
    plain, following = update_query(encoder, recipe, 1), update_query(encoder, recipe, 1, follower)
    assert following.wire.code_size == plain.wire.code_size + 1
    # The noise's scale is the bound of the joint vector: what is charged is a multiplier of it, and stays.
    assert following.clip_l2 == follower.bound == pytest.approx(0.7 * math.sqrt(1 + WITNESS**2))
    update_ND = torch.zeros(2, SIZE)
    assert torch.equal(following.decode(following.encode(update_ND)), update_ND)
    fixed, adaptive = survey(recipe), survey(recipe.changed({"privacy.clip": "adaptive"}))
    assert fixed.privacy == adaptive.privacy
    assert (fixed.message_bytes, adaptive.message_bytes) == (4 * 32_768 + 20, 4 * 32_769 + 20)


def test_a_filter_sees_the_code_and_not_the_extra_value() -> None:
    recipe = load_recipe("quickstart", ["encoder.name=identity", "server.decoding=singular"])
    follower = ClipFollower(0.7, 0.5, 0.3)
    query = update_query(IdentityEncoder(SEGMENTS), recipe, 1, follower)
    assert query.filter is not None
    mean_V = torch.randn(SIZE + 1, generator=torch.Generator().manual_seed(0))
    filtered_V = query.filter(mean_V, 100.0)  # noise far above everything: singular values vanish
    assert float(filtered_V[:-1].abs().max()) == 0.0
    assert filtered_V[-1] == mean_V[-1]
