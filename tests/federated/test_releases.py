"""What leaves is the clipped sum plus the charged noise, in every value; and all that follows is a function of what left.

The expected values are computed here from the formulas of docs/guarantee.md, with numpy and the replayed noise alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from drencoder.encoders.identity import IdentityEncoder
from drencoder.federated.adaptive_clip import NORM_BIT_WEIGHT, AdaptiveClip
from drencoder.federated.query import Query, update_query
from drencoder.federated.round import CohortRelease, client_message, released_update, server_release
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import NoiseSource, quantiser_for
from drencoder.privacy.noise_source import ReplayNoise, SecureNoise
from drencoder.recipe.recipe import load_recipe
from drencoder.secure_aggregation.discrete import discrete_gaussian
from encoder_toys import SEGMENTS, SIZE

SIGMA, CLIP, POPULATION, RATE, SLOTS = 0.7, 1.3, 40, 0.3, 60
CHANCE = 1e-15  # of a right mechanism to fail one comparison; there are 6,944 in a test

Permits = Callable[[str, str], Iterator[Permit]]


@pytest.fixture
def permits(tmp_path: Path) -> Permits:
    """A function of trust and noise that charges one slot after the other."""

    def charged(trust: str, noise: str) -> Iterator[Permit]:
        plan = make_plan(
            trust=trust, population=POPULATION, sampling_rate=RATE, rounds=SLOTS, delta=1e-3, noise_multiplier=SIGMA,
            participation_cap=SLOTS, noise=noise,
        )  # fmt: skip
        key = bytes(range(32)) if noise == "replay" else None
        with Ledger.create(tmp_path / "ledger.jsonl", plan, key=key) as ledger:
            for slot in plan.slots:
                yield ledger.charge(slot)

    return charged


def query_of(adaptive: bool, slot: int) -> Query:
    recipe = load_recipe("quickstart", [f"privacy.clip_l2={CLIP}"])
    clip = AdaptiveClip(CLIP) if adaptive else None
    query = update_query(IdentityEncoder(SEGMENTS), recipe, slot, clip)
    return replace(query, spec=replace(query.spec, wire=replace(query.spec.wire, dtype="float32")))


def updates_of(clients: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Short and long ones, and the second of every ten not finite; the last value of an adaptive code is far from 0."""
    rows = np.stack([np.random.default_rng(client).normal(size=SIZE) for client in clients] or [np.zeros(SIZE)])
    rows *= (
        np.array([0.05 + client % 4 for client in clients] or [1.0])[:, None] / np.linalg.norm(rows, axis=1)[:, None]
    )
    rows[[client % 10 == 1 for client in clients] or [False], 0] = np.nan
    return rows[: len(clients)].astype(np.float32)


def bounded(update_ND: np.ndarray[Any, Any], adaptive: bool) -> np.ndarray[Any, Any]:
    """Rows as they may be summed: clipped, not finite ones zero, with the norm bit where there is one."""
    rows = []
    for update_D in update_ND.astype(np.float64):
        norm = float(np.linalg.norm(update_D))
        if not math.isfinite(norm):
            rows.append(np.zeros(SIZE + adaptive))
            continue
        row = update_D * min(1.0, CLIP / norm)
        rows.append(np.append(row, NORM_BIT_WEIGHT * CLIP * (1 if norm <= CLIP else -1)) if adaptive else row)
    return np.stack(rows) if rows else np.zeros((0, SIZE + adaptive))


def release(query: Query, permit: Permit, noise: NoiseSource) -> CohortRelease:
    upload = client_message(query, torch.from_numpy(updates_of(permit.cohort)), permit.cohort, permit, noise)
    return server_release(query, [upload], permit, noise)


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_release_is_the_bounded_sum_plus_the_noise_of_its_stream(
    permits: Permits, trust: str, adaptive: bool
) -> None:
    noise, sizes, values = ReplayNoise(5), set(), SIZE + adaptive
    for charge in islice(permits(trust, "replay"), 6):
        query = query_of(adaptive, charge.slot)
        std = SIGMA * CLIP * (math.sqrt(1 + NORM_BIT_WEIGHT**2) if adaptive else 1.0)
        rows = bounded(updates_of(charge.cohort), adaptive)
        # C' = C (1 + sqrt(V) / 2L): what a rounded code is at most, and a smoothing of four steps that is lost in it.
        quantiser = quantiser_for(charge, values, query.spec.clip_l2)
        steps = quantiser.clip_steps
        assert steps >= 50 * math.sqrt(values)
        scale = std / SIGMA / steps  # one step
        noise_std = math.hypot(std * (1 + math.sqrt(values) / 2 / steps), 4 * scale)
        assert quantiser.noise_std == pytest.approx(noise_std, rel=1e-9)
        sampler = discrete_gaussian(noise_std / scale)
        streams = [(charge.slot,)] if trust == "central" else [(charge.slot, client) for client in charge.cohort]
        expected = rows.sum(0)
        for words in (noise.words(*stream) for stream in streams):
            expected += scale * sampler.sample(values, words)
        result = release(query, charge, noise)
        atol = scale * len(charge.cohort) + 2e-6  # each row is rounded to a neighbouring step
        np.testing.assert_allclose(result.release.value.numpy(), expected, rtol=1e-5, atol=atol)
        # Divided by q N, whoever came; central: nobody is told how many did.
        mean_D = released_update(query, result.release, charge, RATE * POPULATION).numpy()
        np.testing.assert_allclose(mean_D, result.release.value.numpy()[:SIZE] / (RATE * POPULATION), rtol=1e-6)
        assert result.release.contributors == (None if trust == "central" else len(charge.cohort))
        sizes.add(len(charge.cohort))
    assert len(sizes) > 1  # else a division by the realised cohort would not show


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("trust", ["central", "local"])
def test_with_secure_noise_every_value_of_a_release_has_the_charged_noise(
    permits: Permits, trust: str, adaptive: bool
) -> None:
    errors = []
    for charge in permits(trust, "secure"):
        std = SIGMA * CLIP * (math.sqrt(1 + NORM_BIT_WEIGHT**2) if adaptive else 1.0)
        std *= 1 if trust == "central" else math.sqrt(len(charge.cohort))
        exact = bounded(updates_of(charge.cohort), adaptive).sum(0)
        if std:
            value = release(query_of(adaptive, charge.slot), charge, SecureNoise()).release.value.numpy()
            errors.append((value - exact) / std)
    energy = np.square(np.stack(errors)).sum(
        0
    )  # of each value over all slots: chi-squared if the noise is what it says
    low, high = chi2.ppf(CHANCE, len(errors)), chi2.isf(CHANCE, len(errors))
    assert ((low < energy) & (energy < high)).all()
    wrong = np.square(np.stack(errors) * 0.5)
    assert (wrong.sum() < chi2.ppf(CHANCE, wrong.size)).all()  # half of the noise would not pass
    streams = np.corrcoef(np.stack(errors))  # no slot's noise is another's
    assert np.abs(streams - np.eye(len(streams))).max() < 0.9
