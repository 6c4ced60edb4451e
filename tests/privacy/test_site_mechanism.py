"""What leaves a site: the clipped sum of its units, with all of the charged noise, whatever the sum is of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from drencoder.errors import PrivacyError
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.mechanism import BoundedSum, ReplayNoise, SecureNoise, clip_rows, quantiser_for
from drencoder.privacy.plan import make_plan
from drencoder.privacy.site_mechanism import release_site_share, release_site_sum

SIZE, CLIP, SIGMA, SITES = 4000, 1.5, 0.9, 4
CHANCE = 1e-9


def permit_of(folder: Path, trust: str = "local", noise: str = "secure") -> Permit:
    plan = make_plan(
        trust=trust, population=SITES, sampling_rate=0.5, rounds=1, delta=1e-4, noise_multiplier=SIGMA, noise=noise,
        unit="record", site_units=20, dropout_share=0.25 if trust != "local" else 0.0, honest_share=1.0,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    with Ledger.create(
        folder / "ledger.jsonl", plan, run_id="r", key=bytes(32) if noise == "replay" else None
    ) as ledger:
        return ledger.charge(1)


def codes_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.01


def is_noise(values: np.ndarray, std: float) -> bool:
    """Whether values of mean zero have this standard deviation: at 2/3 and 3/2 of it they have not."""
    low, high = chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], len(values))
    return bool(low <= float(np.sum((values / std) ** 2)) <= high)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_sum_has_the_charged_noise_whatever_it_is_of(tmp_path: Path, count: int) -> None:
    codes = clip_rows(codes_of(count), CLIP)
    total = BoundedSum.zero(SIZE, CLIP).add(codes)
    released = release_site_sum(total, 2, permit_of(tmp_path), SecureNoise())
    assert released.values_NV.shape == (1, SIZE)
    assert released.client_ids == (2,)
    noise = released.values_NV[0].double().numpy() - codes.values_NV.double().sum(0).numpy()
    assert is_noise(noise, SIGMA * CLIP)
    assert not is_noise(noise, SIGMA * CLIP * 2 / 3)
    assert not is_noise(noise, SIGMA * CLIP * 3 / 2)


def test_a_site_sends_one_sum_a_slot(tmp_path: Path) -> None:
    permit, total = permit_of(tmp_path), BoundedSum.zero(SIZE, CLIP)
    release_site_sum(total, 2, permit, SecureNoise())
    with pytest.raises(PrivacyError, match="second time"):
        release_site_sum(total, 2, permit, SecureNoise())
    with pytest.raises(PrivacyError, match="not in the cohort"):
        release_site_sum(total, SITES, permit, SecureNoise())
    with pytest.raises(PrivacyError, match="noise"):
        release_site_sum(total, 3, permit, ReplayNoise(0))


def test_two_sites_and_two_draws_have_noise_of_their_own(tmp_path: Path) -> None:
    permit, total = permit_of(tmp_path), BoundedSum.zero(SIZE, CLIP)
    rows = [release_site_sum(total, site, permit, SecureNoise()).values_NV[0].numpy() for site in range(SITES)]
    rows += [release_site_sum(total, 0, permit_of(tmp_path / "again"), SecureNoise()).values_NV[0].numpy()]
    for index, first in enumerate(rows):
        for second in rows[:index]:
            assert is_noise((first - second) / 2**0.5, SIGMA * CLIP)


def test_replayed_noise_is_the_sites_own_and_can_be_taken_off(tmp_path: Path) -> None:
    """So that neighbours can be compared: what stands before the noise is the exact sum."""
    codes = clip_rows(codes_of(3), CLIP)
    empty, full = (
        release_site_sum(total, 1, permit_of(tmp_path / name, noise="replay"), ReplayNoise(7)).values_NV[0].double()
        for name, total in (
            ("empty", BoundedSum.zero(SIZE, CLIP)),
            ("full", BoundedSum.zero(SIZE, CLIP).add(codes)),
        )
    )
    assert torch.allclose(full - empty, codes.values_NV.double().sum(0), atol=1e-5)


# --- secure aggregation ----------------------------------------------------------------------------


def share_of(count: int, permit: Permit, site: int = 1) -> np.ndarray:
    codes = clip_rows(codes_of(count), CLIP)
    batches = [([unit], clip_rows(codes.values_NV[unit][None], CLIP)) for unit in range(count)]
    return release_site_share(batches, SIZE, CLIP, site, permit, SecureNoise())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_share_has_one_share_of_noise_whatever_it_is_of(tmp_path: Path, count: int) -> None:
    permit = permit_of(tmp_path, "secure-aggregation")
    quantiser = quantiser_for(permit, SIZE, CLIP)
    share_V = share_of(count, permit)
    assert share_V.shape == (SIZE,)
    assert int(share_V.max()) < 1 << quantiser.bits
    noise = quantiser.to_values(share_V) - clip_rows(codes_of(count), CLIP).values_NV.double().sum(0).numpy()
    std = quantiser.std_steps * quantiser.step
    assert is_noise(
        noise, (std**2 + count * quantiser.step**2 / 6) ** 0.5
    )  # rounding at random adds at most step^2 / 4 a code
    assert not is_noise(noise, std * 2 / 3)
    with pytest.raises(PrivacyError, match="second time"):
        share_of(count, permit)


def test_a_unit_moves_a_share_by_its_rounded_code_and_no_more(tmp_path: Path) -> None:
    shares = []
    for name, units in (("with", [3, 4, 5]), ("without", [3, 5])):
        permit = permit_of(tmp_path / name, "secure-aggregation", noise="replay")
        codes = 5 * codes_of(6)  # long enough to be clipped
        batches = [([unit], clip_rows(codes[unit][None], CLIP)) for unit in units]
        shares.append(release_site_share(batches, SIZE, CLIP, 1, permit, ReplayNoise(7)))
    quantiser = quantiser_for(permit, SIZE, CLIP)
    moved = quantiser.to_values((shares[0] - shares[1]) & np.uint32((1 << quantiser.bits) - 1))
    assert 0.9 * CLIP <= np.linalg.norm(moved) <= quantiser.bound_l2 * (1 + 1e-12)
