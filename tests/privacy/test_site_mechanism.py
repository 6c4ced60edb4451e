"""What leaves a site: the clipped sum of its units, with all of the charged noise or a share of it, whatever the sum is of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from drencoder.encoders.wire import WireFormat, pack_rows
from drencoder.errors import PrivacyError
from drencoder.federated.query import Query, QuerySpec
from drencoder.federated.query_encoders import UpdatesEncoder
from drencoder.federated.round import Upload, message_wire, server_release
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import clip_rows, quantiser_for
from drencoder.privacy.noise_source import NoiseSource, ReplayNoise, SecureNoise
from drencoder.privacy.site_mechanism import release_site_sum

SIZE, CLIP, SIGMA, SITES = 4000, 1.5, 0.9, 4
HONEST = 3  # of four sites one may drop out
CHANCE = 1e-9
TRUSTS = ("local", "secure-aggregation")


def permit_of(folder: Path, trust: str, noise: str = "secure") -> Permit:
    plan = make_plan(
        trust=trust, population=SITES, sampling_rate=0.5, rounds=1, delta=1e-4, noise_multiplier=SIGMA, noise=noise,
        unit="record", site_units=20, dropout_share=0.25 if trust != "local" else 0.0, honest_share=1.0,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    key = bytes(32) if noise == "replay" else None
    with Ledger.create(folder / "ledger.jsonl", plan, run_id="r", key=key) as ledger:
        return ledger.charge(1)


def codes_of(count: int, scale: float = 0.01) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(0)) * scale


def sum_of(
    units: list[int], permit: Permit, *, site: int = 1, scale: float = 0.01, noise: NoiseSource | None = None
) -> np.ndarray:
    """What a site with these units sends, in units of the code."""
    codes = codes_of(8, scale)
    batches = [([unit], clip_rows(codes[unit][None], CLIP)) for unit in units]
    residue_V = release_site_sum(batches, SIZE, CLIP, site, permit, noise or SecureNoise())
    quantiser = quantiser_for(permit, SIZE, CLIP)
    assert residue_V.shape == (SIZE,)
    assert int(residue_V.max()) < 1 << quantiser.bits
    return quantiser.to_values(residue_V)


def is_noise(values: np.ndarray, std: float) -> bool:
    """Whether values of mean zero have this standard deviation: at 2/3 and 3/2 of it they have not."""
    low, high = chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], len(values))
    return bool(low <= float(np.sum((values / std) ** 2)) <= high)


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_sum_has_the_charged_noise_whatever_it_is_of(tmp_path: Path, count: int, trust: str) -> None:
    permit = permit_of(tmp_path, trust)
    quantiser = quantiser_for(permit, SIZE, CLIP)
    codes = clip_rows(codes_of(8), CLIP).values_NV[:count].double().sum(0).numpy()
    noise = sum_of(list(range(count)), permit) - codes
    charged = SIGMA * quantiser.bound_l2 * (1 if trust == "local" else HONEST**-0.5)
    # Rounding at random adds a sixth of a squared step a code, and smoothing 16 of them.
    std = (charged**2 + (16 + count / 6) * quantiser.step**2) ** 0.5
    assert is_noise(noise, std)
    assert not is_noise(noise, charged * 2 / 3)
    assert not is_noise(noise, charged * 3 / 2)


@pytest.mark.parametrize("trust", TRUSTS)
def test_a_site_sends_one_sum_a_slot(tmp_path: Path, trust: str) -> None:
    permit = permit_of(tmp_path, trust)
    sum_of([1], permit, site=2)
    with pytest.raises(PrivacyError, match="second time"):
        sum_of([1], permit, site=2)
    with pytest.raises(PrivacyError, match="not in the cohort"):
        sum_of([1], permit, site=SITES)
    with pytest.raises(PrivacyError, match="noise"):
        sum_of([1], permit, site=3, noise=ReplayNoise(0))


def test_two_sites_and_two_charges_have_noise_of_their_own(tmp_path: Path) -> None:
    permit = permit_of(tmp_path, "local")
    rows = [sum_of([], permit, site=site) for site in range(SITES)]
    rows += [sum_of([], permit_of(tmp_path / "again", "local"), site=0)]
    for index, first in enumerate(rows):
        for second in rows[:index]:
            assert is_noise((first - second) / 2**0.5, SIGMA * CLIP * 1.01)


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize(("scale", "least"), [(0.05, 0.9 * CLIP), (0.001, 0.0)])
def test_a_unit_moves_a_sum_by_its_rounded_code_and_no_more(
    tmp_path: Path, trust: str, scale: float, least: float
) -> None:
    sums = [
        sum_of(units, permit_of(tmp_path / name, trust, "replay"), scale=scale, noise=ReplayNoise(7))
        for name, units in (("with", [3, 4, 5]), ("without", [3, 5]))
    ]
    quantiser = quantiser_for(permit_of(tmp_path / "third", trust, "replay"), SIZE, CLIP)
    moved = np.linalg.norm(sums[0] - sums[1])
    assert least <= moved <= quantiser.bound_l2 * (1 + 1e-12)
    assert moved > 0


def test_sites_sums_that_wrapped_around_add_up_to_the_sum_before(tmp_path: Path) -> None:
    """The public sees the sum: it must be a function of the sum of codes and noises, whatever happened to a single message."""
    permit = permit_of(tmp_path, "local")
    query = Query(QuerySpec("update", 1, "code", CLIP, 0, 1, True, 3, WireFormat(3, 7)), UpdatesEncoder(3))
    wire, quantiser = message_wire(query, permit), quantiser_for(permit, 3, CLIP)
    half = 1 << (quantiser.bits - 1)
    sent_S3 = [
        [half - 1, 5, -half],
        [9, -6, -4],
        [half - 2, 0, 1],
        [-half, 2, 0],
    ]  # within one modulus only as they were sent
    uploads = [
        Upload((site,), pack_rows(torch.tensor([row]), wire, 1), 0)
        for site, row in zip(permit.cohort, sent_S3, strict=True)
    ]
    released = server_release(query, uploads, permit, SecureNoise()).release.value
    total_3 = (np.sum(sent_S3, axis=0) + half) % (2 * half) - half
    np.testing.assert_allclose(released.numpy(), total_3 * quantiser.step, rtol=1e-6)


def test_the_modulus_holds_more_units_than_everybody_expects(tmp_path: Path) -> None:
    permit = permit_of(tmp_path, "local")
    quantiser = quantiser_for(permit, SIZE, CLIP)
    assert (1 << (quantiser.bits - 1)) * quantiser.step > 3 * 0.5 * SITES * 20 * CLIP
