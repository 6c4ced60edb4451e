"""Stage-1 statistics, the Gaussian prior fitted to them, and the gradients drawn from it.

Legend: N clients, D adapter values, E epochs, S segments, V = 2 E S statistics.
"""

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from drencoder.encoders.gaussian_prior import GaussianPrior, SyntheticGradients, moment_statistics
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment

SEGMENTS = (Segment("a", 0, (8, 100)), Segment("b", 800, (25, 8)), Segment("c", 1000, (3, 1)))
SIZE = 1003


def drawn(count: int, seed: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        m + s * torch.randn(count, segment.size, generator=generator)
        for segment, m, s in zip(SEGMENTS, mean, std, strict=True)
    ]
    return torch.cat(parts, dim=1)


def test_statistics_are_the_two_moments() -> None:
    update_ND = drawn(3, 0, (1.0, 0.0, -1.0), (1.0, 2.0, 0.5))
    stats_NV = moment_statistics(update_ND, SEGMENTS)
    assert stats_NV.shape == (3, 6)
    part_ND = update_ND[:, 800:1000]
    assert torch.allclose(stats_NV[:, 1], part_ND.sum(1) / math.sqrt(200), rtol=1e-5)
    assert torch.allclose(stats_NV[:, 4], part_ND.norm(dim=1), rtol=1e-5)


@example(seed=0, mean=4.0, scale=2.3231111552485574e-25, hollow=1)
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**62), mean=st.floats(-100, 100), scale=st.floats(0, 1e6), hollow=st.sampled_from([0, 1, 2])
)
def test_statistics_are_bounded_by_the_update(seed: int, mean: float, scale: float, hollow: int) -> None:
    update_ND = scale * drawn(2, seed, (mean, 0.0, -mean), (1.0, 0.1, 0.0))
    update_ND[:, SEGMENTS[hollow].start : SEGMENTS[hollow].stop] = 0.0
    stats_NV = moment_statistics(update_ND, SEGMENTS)
    bound_N = math.sqrt(2.0) * update_ND.double().norm(dim=1)  # float32's squares vanish below 1e-23
    assert (stats_NV.double().norm(dim=1) <= bound_N * (1 + 1e-5)).all()
    joined = moment_statistics(torch.cat((update_ND, 0.1 * update_ND), dim=1), SEGMENTS, 2)
    assert (joined.norm(dim=1) <= bound_N * math.hypot(1.0, 0.1) * (1 + 1e-5)).all()


def test_published_mean_and_variance_follow_from_the_statistics() -> None:
    update_ND = drawn(2, 0, (1.0, 0.0, -1.0), (1.0, 2.0, 0.5))
    stats_NV = moment_statistics(update_ND, SEGMENTS).double()
    for row, segment in enumerate(SEGMENTS):
        part_ND = update_ND[:, segment.start : segment.stop].double()
        mean_N = stats_NV[:, row] / math.sqrt(segment.size)
        assert torch.allclose(mean_N, part_ND.mean(1), rtol=1e-5)
        variance_N = stats_NV[:, 3 + row].square() / segment.size - mean_N.square()
        assert torch.allclose(variance_N, part_ND.var(1, unbiased=False), rtol=1e-4)


def test_each_epoch_has_statistics_of_its_own() -> None:
    first_ND, second_ND = (drawn(3, seed, (1.0, 0.0, -1.0), (1.0, 2.0, 0.5)) for seed in (0, 1))
    both_NV = moment_statistics(torch.cat((first_ND, second_ND), dim=1), SEGMENTS, 2)
    parts = moment_statistics(first_ND, SEGMENTS), moment_statistics(second_ND, SEGMENTS)
    assert torch.equal(both_NV, torch.cat(parts, dim=1))
    with pytest.raises(EncoderError, match="2 epochs need updates of 2 x 1003 values, got shape"):
        moment_statistics(first_ND, SEGMENTS, 2)


def test_a_prior_over_epochs_is_fitted_epoch_by_epoch() -> None:
    """The second epoch is drowned in noise, the third is strong; neither touches the first."""
    stats_EV = torch.tensor([[0.9, -3.0, 0, 20, 20, 20], [0.5, 0.1, -0.2, 0.9, -0.3, 0.1], [0, 0, 0, 60, 60, 60]])
    prior = GaussianPrior.from_statistics(stats_EV.flatten(), SEGMENTS, 1.0)
    assert prior.epochs == 3
    for epoch in range(3):
        alone = GaussianPrior.from_statistics(stats_EV[epoch], SEGMENTS, 1.0)
        assert torch.equal(prior.mean_ES[epoch], alone.mean_ES[0])
        assert torch.equal(prior.std_ES[epoch], alone.std_ES[0])
    assert prior.energy_S.tolist() == pytest.approx(
        [(399 + 800 / 1003 + 3599) / 3] * 2 + [(399 + 3 / 1003 + 3599) / 3], rel=1e-3
    )


def test_a_mixture_draws_each_epoch_equally_often() -> None:
    prior = GaussianPrior(SEGMENTS, torch.zeros(2, 3), torch.tensor([[0.1] * 3, [10.0] * 3]))
    values_ND = prior.sample(400, 5).values_ND
    rms_N = values_ND.square().mean(1).sqrt()
    loud = rms_N > 1
    assert torch.allclose(rms_N[loud], torch.tensor(10.0), rtol=6 / math.sqrt(2 * SIZE))
    assert torch.allclose(rms_N[~loud], torch.tensor(0.1), rtol=6 / math.sqrt(2 * SIZE))
    assert abs(int(loud.sum()) - 200) < 6 * math.sqrt(400) / 2
    assert prior.rms == pytest.approx(math.sqrt((100 + 0.01) / 2))


def test_the_bound_is_reached_by_a_constant_update() -> None:
    update_ND = torch.ones(1, SIZE)
    ratio = moment_statistics(update_ND, SEGMENTS).norm() / update_ND.norm()
    assert float(ratio) == pytest.approx(math.sqrt(2.0), rel=1e-5)


def test_statistics_of_odd_updates() -> None:
    assert moment_statistics(torch.zeros(0, SIZE), SEGMENTS).shape == (0, 6)
    assert not moment_statistics(torch.zeros(1, SIZE), SEGMENTS).any()
    half_ND = drawn(2, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).bfloat16()
    assert torch.equal(moment_statistics(half_ND, SEGMENTS), moment_statistics(half_ND.float(), SEGMENTS))
    update_ND = torch.ones(2, SIZE)
    update_ND[0, 5] = torch.nan
    stats_NV = moment_statistics(update_ND, SEGMENTS)
    assert not stats_NV[0].isfinite().all()
    assert stats_NV[1].isfinite().all()


def test_fit_recovers_the_moments_without_noise() -> None:
    mean, std = (0.02, -0.3, 0.0), (0.1, 1.0, 0.01)
    stats_V = moment_statistics(drawn(400, 1, mean, std), SEGMENTS).mean(0)
    prior = GaussianPrior.from_statistics(stats_V, SEGMENTS, 0.0)
    assert prior.mean_ES[0, :2].tolist() == pytest.approx(list(mean[:2]), rel=0.1)
    assert prior.std_ES[0, :2].tolist() == pytest.approx(list(std[:2]), rel=0.05)
    assert prior.energy_S[1].item() == pytest.approx(200 * (0.3**2 + 1.0), rel=0.05)
    # Inverse round trip: statistics of the prior's own draws give the prior back.
    again = moment_statistics(prior.sample(400, 0).values_ND, SEGMENTS).mean(0)
    refit = GaussianPrior.from_statistics(again, SEGMENTS, 0.0)
    assert refit.std_ES[0, :2].tolist() == pytest.approx(prior.std_ES[0, :2].tolist(), rel=0.05)


def test_known_noise_is_taken_out() -> None:
    """The noise is three times the smaller segment's norm; without de-biasing its energy would be ten times too big."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 0.01, 1.0)
    clean_V = moment_statistics(drawn(200, 1, mean, std), SEGMENTS).mean(0)
    noise_std = 3.0 * float(clean_V[4])
    truth = float(clean_V[4].square())
    generator = torch.Generator().manual_seed(2)
    energies, raw = [], []
    for _ in range(400):
        noisy_V = clean_V + noise_std * torch.randn(6, generator=generator)
        energies.append(float(GaussianPrior.from_statistics(noisy_V, SEGMENTS, noise_std).energy_S[1]))
        raw.append(float(noisy_V[4].clamp(min=0).square()))
    assert sum(energies) / 400 < 0.6 * sum(raw) / 400
    assert sum(energies) / 400 > truth / 2
    strong_V = clean_V.clone()
    strong_V[3] = math.hypot(float(clean_V[3]), noise_std)  # what noise adds on average to the square
    prior = GaussianPrior.from_statistics(strong_V, SEGMENTS, noise_std)
    assert prior.energy_S[0].item() == pytest.approx(float(clean_V[3].square()), rel=1e-3)


def test_a_mean_below_the_noise_becomes_zero_and_one_above_is_shrunk() -> None:
    stats_V = torch.tensor([0.9, -3.0, 0.0, 20.0, 20.0, 20.0])
    prior = GaussianPrior.from_statistics(stats_V, SEGMENTS, 1.0)
    assert prior.mean_ES[0, 0] == 0.0
    assert prior.mean_ES[0, 1].item() == pytest.approx(-3.0 * (1 - 1 / 9) / math.sqrt(200))


@settings(max_examples=150)
@given(
    stats=st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6),
    noise_std=st.floats(0, 1e3),
)
def test_any_release_gives_a_usable_prior(stats: list[float], noise_std: float) -> None:
    prior = GaussianPrior.from_statistics(torch.tensor(stats), SEGMENTS, noise_std)
    assert (prior.std_ES > 0).all()
    assert prior.mean_ES.isfinite().all()
    assert prior.energy_S.isfinite().all()
    assert prior.rms > 0
    assert prior.sample(2, 0).values_ND.isfinite().all()


def test_pure_noise_gives_the_isotropic_prior() -> None:
    prior = GaussianPrior.from_statistics(torch.tensor([0.5, 0.1, -0.2, 0.9, -0.3, 0.1]), SEGMENTS, 1.0)
    assert prior.std_ES[0].tolist() == pytest.approx([1 / math.sqrt(SIZE)] * 3)
    assert not prior.mean_ES.any()
    assert (GaussianPrior.from_statistics(torch.zeros(6), SEGMENTS, 0.0).std_ES > 0).all()


def test_segments_without_gradient_keep_a_floor() -> None:
    update_ND = drawn(50, 0, (0.0, 0.0, 0.0), (0.0, 1.0, 1.0))  # LoRA's A while B = 0
    prior = GaussianPrior.from_statistics(moment_statistics(update_ND, SEGMENTS).mean(0), SEGMENTS, 0.0)
    assert prior.std_ES[0, 0].item() == pytest.approx(1e-3 * prior.rms, rel=0.01)


@pytest.mark.parametrize(
    ("stats", "noise_std", "message"),
    [
        ([1.0] * 5, 0.0, "needs 6 finite statistics per epoch"),
        ([], 0.0, "needs 6 finite statistics per epoch"),
        ([1.0] * 11 + [math.nan], 0.0, "of which 11 are finite"),
        ([1.0] * 6, -1.0, "noise_std is -1.0"),
        ([1.0] * 6, math.nan, "noise_std is nan"),
    ],
)
def test_unusable_releases_are_refused(stats: list[float], noise_std: float, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        GaussianPrior.from_statistics(torch.tensor(stats), SEGMENTS, noise_std)


def test_priors_are_checked_at_birth() -> None:
    with pytest.raises(EncoderError, match="std_ES must be positive, but the smallest is 0"):
        GaussianPrior(SEGMENTS, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(EncoderError, match="mean_ES must be 3 finite numbers per epoch"):
        GaussianPrior(SEGMENTS, torch.zeros(2), torch.ones(3))
    with pytest.raises(EncoderError, match="of which 2 are finite"):
        GaussianPrior(SEGMENTS, torch.tensor([0.0, 0.0, math.inf]), torch.ones(3))


def test_isotropic_has_unit_energy() -> None:
    prior = GaussianPrior.isotropic(SEGMENTS)
    assert float(prior.energy_S.sum()) == pytest.approx(1.0)
    norm_N = prior.sample(200, 0).values_ND.norm(dim=1)
    assert float(norm_N.square().mean()) == pytest.approx(1.0, abs=0.02)


def test_samples_have_the_prior_moments() -> None:
    prior = GaussianPrior(SEGMENTS, torch.tensor([0.5, 0.0, -2.0]), torch.tensor([0.1, 2.0, 1.0]))
    values_ND = prior.sample(500, 3).values_ND
    assert values_ND.dtype == torch.float32
    for row, segment in enumerate(SEGMENTS):
        part = values_ND[:, segment.start : segment.stop].double()
        error = float(prior.std_ES[0, row]) / math.sqrt(part.numel())
        assert abs(float(part.mean()) - float(prior.mean_ES[0, row])) < 4 * error
        # Standard error of a standard deviation is std / sqrt(2 n); 5 % off would be seen.
        tolerance = 4 / math.sqrt(2 * part.numel())
        assert float(part.std()) == pytest.approx(float(prior.std_ES[0, row]), rel=tolerance)


def test_sampling_is_seeded_and_local() -> None:
    prior = GaussianPrior.isotropic(SEGMENTS)
    state = torch.random.get_rng_state()
    first, again, other = prior.sample(3, 1), prior.sample(3, 1), prior.sample(3, 2)
    assert torch.equal(first.values_ND, again.values_ND)
    assert not torch.equal(first.values_ND, other.values_ND)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(prior.sample(0, 1)) == 0


def test_rows_are_drawn_when_used_and_always_the_same() -> None:
    drawn_rows = GaussianPrior(SEGMENTS, torch.ones(2, 3), torch.tensor([[1.0] * 3, [5.0] * 3])).sample(6, 1)
    eager_ND = drawn_rows.values_ND
    assert torch.equal(drawn_rows.rows([4, 0, 4]), eager_ND[[4, 0, 4]])
    assert torch.equal(drawn_rows.rows(torch.tensor([5])), eager_ND[5:])
    assert drawn_rows.rows([]).shape == (0, SIZE)
    assert not torch.equal(eager_ND[0], eager_ND[1])
    for wrong in ([6], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of 6 synthetic gradients"):
            drawn_rows.rows(wrong)


def test_a_training_set_larger_than_any_memory_costs_nothing() -> None:
    huge = GaussianPrior.isotropic(SEGMENTS).sample(10**12, 1)  # four petabytes
    assert len(huge) == 10**12
    assert torch.equal(huge.rows([10**12 - 1]), huge.rows([10**12 - 1]))
    # The row number alone decides, not how many there are.
    assert torch.equal(huge.rows([2]), GaussianPrior.isotropic(SEGMENTS).sample(3, 1).rows([2]))


def test_synthetic_gradients_know_the_priors_energies() -> None:
    prior = GaussianPrior(SEGMENTS, torch.tensor([0.5, 0.0, -2.0]), torch.tensor([0.1, 2.0, 1.0]))
    assert torch.equal(prior.sample(1, 0).energy_S(SEGMENTS), prior.energy_S)
    with pytest.raises(EncoderError, match="do not fit an adapter of 800 values"):
        prior.sample(1, 0).energy_S(SEGMENTS[:1])


def test_only_priors_make_synthetic_gradients() -> None:
    with pytest.raises(TypeError, match="drawn by a prior"):
        SyntheticGradients(SEGMENTS, 1, torch.ones(3), lambda row: torch.zeros(SIZE))
    with pytest.raises(TypeError, match="drawn by a prior"):
        SyntheticGradients(SEGMENTS, 1, torch.ones(3), lambda row: torch.zeros(SIZE), token=object())
    with pytest.raises(AttributeError):
        GaussianPrior.isotropic(SEGMENTS).sample(1, 0).values_ND = torch.zeros(1, SIZE)  # type: ignore[misc]


def test_dict_round_trip_through_json() -> None:
    prior = GaussianPrior(SEGMENTS, torch.tensor([0.1, 0.2, 1 / 3]), torch.tensor([1e-9, 2.0, 1e9]))
    again = GaussianPrior.from_dict(json.loads(json.dumps(prior.to_dict())), SEGMENTS)
    assert torch.equal(again.mean_ES, prior.mean_ES)
    assert torch.equal(again.std_ES, prior.std_ES)
    with pytest.raises(EncoderError, match="belongs to another run"):
        GaussianPrior.from_dict(prior.to_dict(), SEGMENTS[:2])
    saved = prior.to_dict()
    for broken in (
        {},
        saved | {"kind": "other"},
        saved | {"std": [1.0]},
        saved | {"std": [[1.0] * 3, [1.0]]},
        saved | {"mean": "x"},
    ):
        with pytest.raises(EncoderError):
            GaussianPrior.from_dict(broken, SEGMENTS)


def test_several_epochs_survive_the_round_trip_and_old_files_load() -> None:
    prior = GaussianPrior(SEGMENTS, torch.tensor([[0.1, 0.2, 1 / 3], [1.0, 2.0, 3.0]]), torch.full((2, 3), 0.7))
    again = GaussianPrior.from_dict(json.loads(json.dumps(prior.to_dict())), SEGMENTS)
    assert torch.equal(again.mean_ES, prior.mean_ES)
    assert torch.equal(again.std_ES, prior.std_ES)
    old = {"kind": "gaussian", "segments": ["a", "b", "c"], "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    loaded = GaussianPrior.from_dict(old, SEGMENTS)
    assert loaded.mean_ES.tolist() == [[0.1, 0.2, 0.3]]
    assert loaded.std_ES.tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(EncoderError, match="mean_ES is of 2 epochs and std_ES of 1"):
        GaussianPrior(SEGMENTS, torch.zeros(2, 3), torch.ones(3))
