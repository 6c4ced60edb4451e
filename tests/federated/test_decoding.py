"""What the server makes of a noised mean: gains where the model of it is right, and nothing lost where there is no noise.

Legend: K code values, D adapter values.
"""

import math

import pytest
import torch
from torch import Tensor

from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.errors import EncoderError, RecipeError
from drencoder.federated.decoding import filter_of, precondition, shrink_groups, shrink_singular_values
from drencoder.models.adapter_layout import Segment
from drencoder.recipe.recipe import Recipe
from encoder_toys import SEGMENTS, SIZE


def rows(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


HEAD = KroneckerEncoder.build(PublicUpdates(rows(6, SIZE, 0), "noise").prior(SEGMENTS, 8), 60)


def test_preconditioning_is_the_formula_and_the_best_half_step_of_a_quadratic() -> None:
    mean_K, share_K = rows(1, 5, 1)[0], torch.tensor([0.5, 0.3, 0.1, 0.0, 1e-9], dtype=torch.float64)
    done_K = precondition(mean_K, share_K, 2.0, 0.4)
    for k in range(5):
        snr = 0.5 * 4.0 * float(share_K[k]) / 0.16
        assert float(done_K[k]) == pytest.approx(float(mean_K[k]) / math.sqrt(1 + snr), rel=1e-6)
    assert done_K.dtype == torch.float32
    # Much noise: as it came. The clip and the noise may be in any unit.
    assert torch.allclose(precondition(mean_K, share_K, 1.0, 1e6), mean_K)
    assert torch.allclose(precondition(mean_K, share_K, 20.0, 4.0), done_K)


def test_preconditioning_without_noise_is_finite_and_bounded() -> None:
    share_K = torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)
    done_K = precondition(torch.ones(3), share_K, 1.0, 0.0)
    assert bool(done_K.isfinite().all())
    assert float(done_K[2]) == 1.0
    assert float(done_K[0] / done_K[1]) == pytest.approx(1 / 3, rel=1e-3)


def test_group_shrinkage_brings_a_noised_signal_nearer() -> None:
    signal_K = torch.zeros(512)
    signal_K[:8] = 3.0
    groups = tuple(torch.arange(512).split([1, 2, 4, 8, 497]))
    generator = torch.Generator().manual_seed(2)
    before, after = 0.0, 0.0
    for _ in range(50):
        noised_K = signal_K + torch.randn(512, generator=generator)
        before += float((noised_K - signal_K).square().sum())
        after += float((shrink_groups(noised_K, groups, 1.0) - signal_K).square().sum())
    assert after < 0.15 * before
    # With half of the noise known it must do visibly worse: the noise is used.
    noised_K = signal_K + torch.randn(512, generator=generator)
    assert float(shrink_groups(noised_K, groups, 0.5).square().sum()) > 1.5 * float(
        shrink_groups(noised_K, groups, 1.0).square().sum()
    )


def test_group_shrinkage_leaves_alone_what_it_should() -> None:
    mean_K = rows(1, 6, 3)[0]
    groups = (torch.tensor([0, 2]), torch.tensor([4]))
    assert torch.equal(shrink_groups(mean_K, groups, 0.0), mean_K)
    assert torch.equal(shrink_groups(mean_K, groups, 1e-3)[[1, 3, 5]], mean_K[[1, 3, 5]])
    assert torch.equal(shrink_groups(torch.zeros(6), groups, 1.0), torch.zeros(6))
    assert torch.equal(shrink_groups(mean_K, groups, 1e3)[[0, 2, 4]], torch.zeros(3))


def test_singular_values_of_noise_vanish_and_a_strong_direction_stays() -> None:
    segments = (Segment("a", 0, (64, 32)), Segment("b", 2048, (8, 128)))
    left, right = rows(1, 64, 4)[0], rows(1, 32, 5)[0]
    signal_D = torch.cat([torch.outer(left, right).flatten(), torch.zeros(1024)])
    noised_D = signal_D + rows(1, 3072, 6)[0]
    kept_D = shrink_singular_values(noised_D, segments, 1.0)
    assert int(torch.linalg.matrix_rank(kept_D[:2048].view(64, 32), atol=1e-3)) == 1
    assert float(kept_D[2048:].abs().max()) < 1e-6
    assert float((kept_D - signal_D).square().sum()) < 0.1 * float((noised_D - signal_D).square().sum())
    assert torch.equal(shrink_singular_values(noised_D, segments, 0.0), noised_D)
    # The optimal shrinker of a value far above the noise takes little: y^2 - 1 - b in the limit.
    strong_D = torch.zeros(3072)
    strong_D[0] = 1e4
    unit2 = 64.0
    expected = math.sqrt((1e8 / unit2 - 0.5 - 1) ** 2 - 4 * 0.5) / (1e4 / 8.0) * 8.0
    assert float(shrink_singular_values(strong_D, segments, 1.0)[0]) == pytest.approx(expected, rel=1e-5)


def test_which_encoder_can_be_filtered_how() -> None:
    identity, sketch = IdentityEncoder(SEGMENTS), RandomSketch.build(SEGMENTS, 10)
    assert filter_of("plain", sketch, 1.0) is None
    for name in ("precondition", "wiener"):
        assert filter_of(name, HEAD, 1.0) is not None
        for other in (identity, sketch):
            with pytest.raises(EncoderError, match=r"the code and the \w+ encoder has none"):
                filter_of(name, other, 1.0)
    assert filter_of("singular", identity, 1.0) is not None
    with pytest.raises(EncoderError, match="sends none"):
        filter_of("singular", HEAD, 1.0)


def test_recipes_say_at_once_what_cannot_be() -> None:
    hybrid = {"encoder.name": "hybrid", "prior.public": "self"}
    assert Recipe().changed(hybrid | {"server.decoding": "precondition"}).server.decoding == "precondition"
    for changes in (
        {"server.decoding": "wiener", "encoder.name": "random"},
        hybrid | {"server.decoding": "precondition", "privacy.noise_in": "update"},
        hybrid | {"server.decoding": "singular"},
        {"server.decoding": "singular", "encoder.name": "identity", "privacy.noise_in": "update"},
    ):
        with pytest.raises(RecipeError, match=r"server\.decoding"):
            Recipe().changed(changes)
