"""Whole runs of the paper's methods: stage 1 as published, the auto-encoders, and FedCG."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import charged, recipe_of

from drencoder.errors import ArtifactError
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.verify import verify_run

AUTOENCODER = ["encoder.name=autoencoder", "encoder.gate=warn"]


FEDCG = [*AUTOENCODER, "prior.source=gradients", "data.examples_per_client=3", "prior.sampling_rate=0.5"]


def test_statistics_of_every_epoch_make_the_prior(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, "local.epochs=3", "local.upload=pseudo-gradient", "federation.rounds=1")
    result = experiment.run(recipe, tmp_path / "run")
    once = experiment.run(recipe.changed({"local.epochs": 1}), tmp_path / "once")
    three, one = (run.certificate["stage1"] for run in (result, once))
    assert three["statistics"] == 3 * one["statistics"]
    assert charged(result.folder) == [("charge", 0), ("charge", 1)]
    assert three["message_bytes"] - one["message_bytes"] == 2 * 2 * one["statistics"]  # integers of 16 bits


@pytest.mark.parametrize("name", ["autoencoder-published", "autoencoder-cnn1d", "autoencoder-unet"])
def test_every_autoencoder_runs_through_both_stages_and_resumes(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    overrides = [*AUTOENCODER, f"encoder.name={name}"]
    recipe = recipe_of(tiny_folder, *overrides, "privacy.noise=replay", "federation.rounds=2")
    whole = experiment.run(recipe, tmp_path / "whole")
    assert whole.certificate["encoder"]["name"] == name
    assert whole.certificate["encoder"]["trained_on"] == "synthetic"
    again = experiment.resume(whole.folder)  # everything is there: only the last evaluation is done again
    assert again.certificate["results"] == whole.certificate["results"]


@pytest.mark.parametrize("trust", ["local", "central", "non-private"])
def test_fedcg_is_marked_non_private_everywhere(tiny_folder: Path, tmp_path: Path, trust: str) -> None:
    overrides = [
        f"privacy.trust={trust}",
        "local.epochs=2",
        "local.upload=pseudo-gradient",
        "privacy.noise_in=update",
    ]
    result = experiment.run(recipe_of(tiny_folder, *FEDCG, *overrides), tmp_path / "run")
    certificate = result.certificate
    assert certificate["private"] is False
    assert "no privacy guarantee of any kind" in certificate["statement"]
    assert all(row["epsilon_pld"] == "inf" for row in certificate["observers"].values())
    assert certificate["encoder"]["trained_on"] == "real"
    assert certificate["encoder"]["public"] is False
    first = json.loads((result.folder / "ledger.jsonl").read_text().splitlines()[1])
    assert first["slot"] == 0
    assert first["event"]["kind"] == "non_private"
    # Each message holds the whole gradients of both epochs.
    stage1, size = certificate["stage1"], certificate["encoder"]["update_size"]
    assert stage1["message_bytes"] == 20 + 4 * size * 2
    assert stage1["bytes"] == stage1["message_bytes"] * stage1["gradients"] // 2
    assert certificate["bytes"]["stage1"] == stage1["bytes"] < certificate["bytes"]["uploaded"]
    assert not verify_run(result.folder).trouble
    for path in result.folder.rglob("*.safetensors"):
        rows = {name: tensor for name, tensor in load_file(path).items() if tensor.shape[-1:] == (size,)}
        assert all(name.startswith("state.") for name in rows)  # the shared adapter's; no gradient was stored


def test_fedcgs_stages_use_different_records(tiny_folder: Path) -> None:
    live = build(recipe_of(tiny_folder, *FEDCG, "data.examples_per_client=10", "data.max_tokens=400"))
    for client in range(5):
        first, rest = live.texts.client(client, 0), live.texts.client(client, 1)
        assert (len(first), len(rest)) == (3, 7)
        assert live.texts.client(client, 2) == rest
        everything = build(recipe_of(tiny_folder, "data.examples_per_client=10", "data.max_tokens=400"))
        assert everything.texts.client(client, 0) == first + rest


def test_real_gradients_lost_with_a_killed_run_are_not_asked_for_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    recipe = recipe_of(tiny_folder, *FEDCG)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "fit_encoder", die)
        with pytest.raises(Killed):
            experiment.run(recipe, tmp_path / "run")
    with pytest.raises(ArtifactError, match="real gradients were charged but lost"):
        experiment.resume(tmp_path / "run")
