"""Whole runs of `privacy.trust = "secure-aggregation"`: two accountants, drop-outs, a kill."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.federated.in_process import InProcessEngine
from drencoder.federated.query import Query
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import Components, EngineMaker, build
from drencoder.runs.plan_overview import survey
from drencoder.runs.verify import verify_run
from drencoder.secure_aggregation.messages import ProtocolStep

ROOT = Path(__file__).parents[2]


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "quickstart",
        [
            *tiny_overrides(folder), "privacy.trust=secure-aggregation", "federation.population=300", "prior.source=moments",
            "federation.sampling_rate=0.15", "privacy.dropout_share=0.34", "federation.nodes=3", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> experiment.RunResult:
    return experiment.run(recipe_of(tiny_folder), tmp_path_factory.mktemp("secure") / "one")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_whole_run_agrees_with_two_accountants(finished: experiment.RunResult) -> None:
    assert verify_run(finished.folder).trouble == ""
    command = [sys.executable, str(ROOT / "tools" / "reaccount.py"), str(finished.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    certificate = finished.certificate
    assert certificate["private"]
    assert certificate["plan"]["trust"] == "secure-aggregation"
    seen = {name: float(row["epsilon_pld"]) for name, row in certificate["observers"].items()}
    # More came than the fewest that were planned for.
    assert seen["server"] == seen["public"] < seen["clients"] < 8.0
    assert certificate["statement"].startswith("Against the other clients: (")
    assert "75%" in certificate["statement"]
    assert certificate["results"]["this run"]["loss"] != certificate["results"]["base model"]["loss"]
    assert "secure-aggregation" in (finished.folder / "report.html").read_text()


def test_counted_bytes_are_the_planned_ones(finished: experiment.RunResult, tiny_folder: Path) -> None:
    overview = survey(recipe_of(tiny_folder))
    assert finished.certificate["bytes"]["uploaded"] == overview.total_bytes
    assert finished.certificate["bytes"]["counted"] == "counted"
    # Plain LoRA is counted for the same senders: three nodes in four rounds.
    assert finished.certificate["bytes"]["plain_lora"] == overview.plain_lora_bytes == 12 * 4 * overview.adapter_size
    assert finished.certificate["bytes"]["bits_per_value"] in (16, 24)


def test_the_ledger_knows_how_many_contributed(finished: experiment.RunResult) -> None:
    found = [(r["kind"], r["slot"]) for r in lines_of(finished.folder) if r["kind"] in ("charge", "contributors")]
    assert found == [(kind, slot) for slot in range(5) for kind in ("charge", "contributors")]


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes nodes of the local engine vanish."""

    def lose(lost: Any) -> None:
        def built(recipe: Recipe, engine: EngineMaker | None = None) -> Components:
            live = build(recipe, engine)
            return dataclasses.replace(live, engine=dataclasses.replace(live.engine, lost=lost))

        monkeypatch.setattr(experiment, "build", built)

    return lose


def test_a_run_survives_drop_outs(tiny_folder: Path, tmp_path: Path, losing: Any) -> None:
    losing(lambda slot, stage, node: slot in (2, 3) and stage >= ProtocolStep.MASK and node == slot - 2)
    result = experiment.run(recipe_of(tiny_folder, "seed=1"), tmp_path / "run")
    assert [row["round"] for row in result.metrics] == [0, 1, 2, 3, 4]
    records = lines_of(tmp_path / "run")
    counts = {r["slot"]: r["contributors"] for r in records if r["kind"] == "contributors"}
    with Ledger.open(tmp_path / "run" / "ledger.jsonl", read_only=True) as ledger:
        for slot in (2, 3):
            cohort = ledger.sampler().cohort(slot)
            assert counts[slot] == sum(client % 3 != slot - 2 for client in cohort) < len(cohort)
    assert verify_run(tmp_path / "run").trouble == ""


def test_a_void_round_keeps_its_charge_and_changes_nothing(tiny_folder: Path, tmp_path: Path, losing: Any) -> None:
    losing(lambda slot, stage, node: slot in (0, 3) and stage == ProtocolStep.UNMASK and node < 2)
    heard: list[str] = []

    class Ear:
        def planned(self, overview: Any) -> None: ...
        def say(self, text: str) -> None:
            heard.append(text)

        def round_done(self, row: Any) -> None: ...
        def finished(self, certificate: Any) -> None: ...

    result = experiment.run(recipe_of(tiny_folder), tmp_path / "run", Ear())
    assert sum("void" in text for text in heard) == 2
    records = lines_of(tmp_path / "run")
    assert [r["slot"] for r in records if r["kind"] == "charge"] == [0, 1, 2, 3, 4]
    assert [r["slot"] for r in records if r["kind"] == "contributors"] == [1, 2, 4]
    assert sum(r["kind"] == "abandoned" for r in records) == 2
    assert result.certificate["stage1"]["lost"] is True
    rows = {row["round"]: row for row in result.metrics}
    assert rows[3]["loss"] == rows[2]["loss"]
    assert rows[3]["bytes_up"] == rows[2]["bytes_up"]
    assert verify_run(tmp_path / "run").trouble == ""
    command = [sys.executable, str(ROOT / "tools" / "reaccount.py"), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


class _KilledError(BaseException):
    pass


def test_a_killed_run_goes_on_and_skips_what_may_have_been_released(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = InProcessEngine.gather

    def dying(self: InProcessEngine, query: Query, *rest: Any) -> Any:
        if query.spec.slot == 2:
            raise _KilledError
        return original(self, query, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessEngine, "gather", dying)
        with pytest.raises(_KilledError):
            experiment.run(recipe_of(tiny_folder), tmp_path / "run")
    result = experiment.resume(tmp_path / "run")
    records = lines_of(tmp_path / "run")
    assert [r["slot"] for r in records if r["kind"] == "charge"] == [0, 1, 2, 3, 4]
    assert [r["slot"] for r in records if r["kind"] == "contributors"] == [0, 1, 3, 4]
    assert [row["round"] for row in result.metrics] == [0, 1, 2, 3, 4]
    assert verify_run(tmp_path / "run").trouble == ""


def test_replayed_runs_are_the_same_whatever_the_nodes(tiny_folder: Path, tmp_path: Path) -> None:
    losses = []
    for nodes in (3, 4):
        recipe = recipe_of(
            tiny_folder, "privacy.noise=replay", f"federation.nodes={nodes}", "privacy.dropout_share=0.25"
        )
        result = experiment.run(recipe, tmp_path / str(nodes))
        assert not result.certificate["private"]
        losses.append(result.certificate["results"]["this run"]["loss"]["value"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_following_clip_works_on_sums(tiny_folder: Path, tmp_path: Path) -> None:
    result = experiment.run(recipe_of(tiny_folder, "privacy.clip=adaptive", "federation.rounds=2"), tmp_path / "run")
    assert verify_run(tmp_path / "run").trouble == ""
    assert result.certificate["rounds"] == 2
