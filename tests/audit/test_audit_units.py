"""Canaries that are units of sites: what each observer is left with once what it knows is taken off."""

from pathlib import Path

import pytest
import torch
from test_faults import SMALL

from conftest import tiny_overrides
from drencoder.audit.observers import Release, audit_releases
from drencoder.audit.trials import Trial, Trials, noise_left, received_messages, trial_values
from drencoder.encoders.planning import load_checked_recipe
from drencoder.federated.query import update_query
from drencoder.privacy.plan import Trust
from drencoder.runs.build import build

pytestmark = pytest.mark.usefixtures("known_noise")

SITES = [
    "privacy.unit=record", "federation.population=6", "federation.nodes=6", "federation.units_per_site=20", "privacy.clip_l2=1",
]  # fmt: skip


def trials_of(trust: Trust, folder: Path) -> list[Trial]:
    components = build(
        load_checked_recipe("quickstart", [*tiny_overrides(folder), *SMALL, *SITES, f"privacy.trust={trust}"])
    )
    encoder = components.encoder(None)
    release = Release((1,), lambda slot: update_query(encoder, components.recipe, slot), "a round")
    trials = Trials(components, components.lora.initial_D)
    return audit_releases(trials, release, components.plan, canaries=300, seed=0)[1]


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
def test_another_site_is_left_with_the_noise_of_all_others(trust: Trust, tiny_folder: Path) -> None:
    trials = trials_of(trust, tiny_folder)
    rest = torch.cat([noise_left(trial, "sum of others") for trial in trials])
    assert rest.numel() >= 500
    assert 0.9 < float(rest.std()) < 1.1  # of the noises of five sites; that of six would be 1.095 times as large
    whole = torch.cat([noise_left(trial, "sum") for trial in trials])
    own = torch.cat([trial_values(trial, "sum") - trial_values(trial, "sum of others") for trial in trials]).double()
    assert abs(float(torch.corrcoef(torch.stack([own, rest.flatten()]))[0, 1])) < 0.15
    assert float(torch.corrcoef(torch.stack([own, whole.flatten()]))[0, 1]) > 0.25  # one of six


def test_only_units_that_were_drawn_are_canaries_and_each_is_in_the_message_of_its_site(tiny_folder: Path) -> None:
    for trial in trials_of("local", tiny_folder):
        planted = trial.planted
        assert 0 < len(planted.clients) < planted.offered
        assert planted.answering[-1] not in planted.site_of
        messages = received_messages(trial)
        assert set(messages) == set(range(6))
        own_NV, inside = trial.own_NV, torch.from_numpy(planted.coin_N)
        along = torch.stack([messages[site] @ own for site, own in zip(planted.site_of, own_NV, strict=True)])
        elsewhere = torch.stack([messages[planted.answering[-1]] @ own for own in own_NV])
        assert float(along[inside].mean()) > 0.6 > 0.4 > abs(float(elsewhere.mean()))
