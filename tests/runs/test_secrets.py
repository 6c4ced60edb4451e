"""Under central trust everything that anybody is told is a function of the releases, and of nothing else that the server knows."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_overrides
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import Query
from drencoder.federated.round import CohortRelease
from drencoder.privacy.ledger import Permit
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import asking
from drencoder.runs import run as experiment
from drencoder.runs.run_folder import RunFolder

RUN_FACTS = ("run_id", "finished", "ledger_head")  # of a start, not of its clients


class Told:
    """All that a run says to its listener."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def planned(self, overview: Any) -> None:
        self.lines.append(repr(overview))

    def say(self, text: str) -> None:
        self.lines.append(text)

    def round_done(self, row: Mapping[str, Any]) -> None:
        self.lines.append(without_clocks(row))

    def finished(self, certificate: Mapping[str, Any]) -> None:
        self.lines.append({key: value for key, value in certificate.items() if key not in RUN_FACTS})


def without_clocks(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key}


def central(tiny: Path, *overrides: str) -> Recipe:
    own = ["privacy.trust=central", "privacy.noise=replay", "privacy.clip=adaptive", "evaluation.examples=4"]
    return load_recipe("quickstart", [*tiny_overrides(tiny), *own, *overrides])


def left_behind(folder: Path) -> dict[str, Any]:
    run = RunFolder(folder)
    digest = {p.name: p.read_bytes() for p in run.adapter.rglob("*.safetensors")}
    ledger = [
        {key: value for key, value in record.items() if key not in ("prev", "run_id", "files")}
        for record in map(json.loads, run.ledger.read_text().splitlines())
    ]
    certificate = {k: v for k, v in run.read_json(run.certificate).items() if k not in RUN_FACTS}
    metrics = [without_clocks(row) for row in run.read_metrics()]
    checkpoint = {name: tensor.tolist() for name, tensor in load_file(run.checkpoints / "latest.safetensors").items()}
    return {"adapter": digest, "ledger": ledger, "certificate": certificate, "metrics": metrics, "state": checkpoint,
            "outcomes": run.outcomes.read_text()}  # fmt: skip


def test_counts_of_a_secret_cohort_change_nothing_that_is_told_or_left(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asking.server_release
    results = []
    for number, factor in enumerate((1, 7)):

        def released(*arguments: Any, factor: int = factor) -> CohortRelease:
            """The same release with other counts: as if another number of clients had come, failed or been rejected."""
            result = release(*arguments)
            return replace(result, bytes_up=factor * result.bytes_up + factor, rejected=factor, nonfinite=3 * factor)

        monkeypatch.setattr(asking, "server_release", released)
        told = Told()
        experiment.run(central(tiny_folder), tmp_path / str(number), told)
        results.append((told.lines, left_behind(tmp_path / str(number))))
    assert results[0] == results[1]


def test_adapter_and_clip_follow_from_the_releases_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, kept = asking.server_release, []

    def released(query: Query, answers: Any, permit: Permit, noise: Any) -> CohortRelease:
        kept.append((query, release(query, answers, permit, noise).release))
        return CohortRelease(kept[-1][1], 0, 0, 0)

    monkeypatch.setattr(asking, "server_release", released)
    recipe = central(tiny_folder, "server.optimizer=fedavg", "server.learning_rate=0.5", "server.final_share=1")
    folder = RunFolder(experiment.run(recipe, tmp_path / "run").folder)
    size = recipe.federation.sampling_rate * recipe.federation.population
    clip = AdaptiveClip(recipe.privacy.clip_l2)
    moved = []
    for query, value in kept:
        if query.spec.slot == 0:
            continue
        assert query.spec.adaptive_clip == pytest.approx(clip.clip_l2, rel=1e-12)
        clip = clip.after(value.value, size)
        moved.append(0.5 * query.decode(value.value[None] / size)[0])
    state = load_file(folder.checkpoints / "latest.safetensors")
    start_D = state["state.adapter"] - sum(moved)
    again = experiment.build(recipe)
    assert torch.allclose(start_D, again.lora.initial_D.cpu(), atol=1e-5)
    assert float(sum(moved).abs().max()) > 1e-3  # type: ignore[union-attr]
