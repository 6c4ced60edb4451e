"""A whole run on a tiny model: what it leaves behind, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_runs import charged, recipe_of
from transformers import AutoModelForCausalLM

from drencoder.errors import ArtifactError, DataError, ModelError
from drencoder.federated.in_process import InProcessEngine
from drencoder.models.client_training import CohortTrainer
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> experiment.RunResult:
    return experiment.run(recipe_of(tiny_folder), tmp_path_factory.mktemp("runs") / "one")


def test_run_folder_is_complete(finished: experiment.RunResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "recipe.resolved.toml", "ledger.jsonl", "metrics.jsonl", "checkpoints", "adapter", "certificate.json",
        "outcomes.json", "report.html",
    }  # fmt: skip
    assert charged(finished.folder) == [("charge", slot) for slot in range(5)]
    assert [row["round"] for row in finished.metrics] == [0, 1, 2, 3, 4]
    assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 for row in finished.metrics)
    assert [row["bytes_up"] for row in finished.metrics] == sorted(row["bytes_up"] for row in finished.metrics)


def test_adapter_loads_in_plain_peft(finished: experiment.RunResult, tiny_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    input_ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        before = base(input_ids=input_ids).logits
        after = PeftModel.from_pretrained(base, str(finished.adapter))(input_ids=input_ids).logits
    assert not torch.allclose(before, after, atol=1e-4)  # the adapter does something


def test_zero_update_is_the_base_model_and_the_run_is_not(finished: experiment.RunResult) -> None:
    results = finished.certificate["results"]
    assert results["zero update"] == results["base model"]
    assert results["this run"]["loss"] != results["base model"]["loss"]
    for row in results.values():
        assert row["loss"]["low"] < row["loss"]["value"] < row["loss"]["high"]


def test_certificate_agrees_with_two_accountants(finished: experiment.RunResult) -> None:
    assert verify_run(finished.folder).trouble == ""
    command = [sys.executable, str(ROOT / "tools" / "reaccount.py"), str(finished.folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert finished.certificate["private"]
    assert finished.certificate["observers"]["server"]["epsilon_pld"] == pytest.approx(8.0, abs=1e-3)


@pytest.mark.parametrize("damage", ["epsilon", "ledger", "tail"])
def test_a_changed_certificate_or_ledger_is_found(finished: experiment.RunResult, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished.folder), str(copy)], check=True)
    if damage == "epsilon":
        certificate = json.loads((copy / "certificate.json").read_text())
        certificate["observers"]["public"]["by_relation"]["add_remove"]["epsilon_pld"] *= 0.99
        (copy / "certificate.json").write_text(json.dumps(certificate))
        assert "public" in verify_run(copy).trouble
    elif damage == "ledger":
        text = (copy / "ledger.jsonl").read_text()
        (copy / "ledger.jsonl").write_text(
            text.replace('"contributors": 5', '"contributors": 9', 1).replace("1", "2", 1)
        )
        with pytest.raises(ArtifactError, match="line"):
            verify_run(copy)
    else:
        lines = (copy / "ledger.jsonl").read_text().splitlines(keepends=True)
        (copy / "ledger.jsonl").write_text("".join(lines[:-2]))
        assert "unfinished" in verify_run(copy).trouble
        with pytest.raises(ArtifactError, match="lacks charges"):
            experiment.resume(copy)


def test_charge_is_on_disk_before_any_client_is_asked(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = InProcessEngine.gather, []

    def spying(self: InProcessEngine, query: Any, *rest: Any) -> Iterator[Any]:
        seen.append((query.spec.slot, charged(tmp_path / "run")))
        yield from original(self, query, *rest)

    monkeypatch.setattr(InProcessEngine, "gather", spying)
    experiment.run(recipe_of(tiny_folder), tmp_path / "run")
    assert [slot for slot, _ in seen] == [0, 1, 2, 3, 4]
    for slot, on_disk in seen:
        assert on_disk[-1] == ("charge", slot)


def test_cohort_parallel_and_one_by_one_give_the_same_run(tiny_folder: Path, tmp_path: Path) -> None:
    losses = []
    for parallel in (1, 3):
        recipe = recipe_of(tiny_folder, "privacy.noise=replay", f"speed.parallel_clients={parallel}")
        losses.append([row["loss"] for row in experiment.run(recipe, tmp_path / str(parallel)).metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("encoder", ["identity", "autoencoder", "kronecker", "hybrid", "ffa", "top-k", "core", "power"])
def test_other_encoders_run_to_the_end(tiny_folder: Path, tmp_path: Path, encoder: str) -> None:
    overrides = [f"encoder.name={encoder}", "encoder.gate=warn", "federation.rounds=2"]
    overrides += ["prior.public=self"]
    result = experiment.run(recipe_of(tiny_folder, *overrides), tmp_path / "run")
    assert result.certificate["encoder"]["name"] == encoder
    assert verify_run(result.folder).trouble == ""


def test_own_file_with_its_own_clients(tiny_folder: Path, tmp_path: Path) -> None:
    records = [
        {"instruction": f"say {i}", "response": f"{i} it is", "category": "echo", "hospital": f"h{i % 5}"}
        for i in range(40)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    overrides = [f"data.source={path}", "data.client_field=hospital", "federation.population=5"]
    overrides += ["federation.sampling_rate=0.2", "privacy.participation_cap=2"]
    result = experiment.run(recipe_of(tiny_folder, *overrides), tmp_path / "run")
    assert result.certificate["data"] == str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no records"),
        ('{"instruction": "a"}', "line 1: no field replies"),
        ('{"instruction": "a", "response": "b"}\n{oops', "line 2: not valid JSON"),
        ('["a"]', "line 1: a list instead of a record"),
        ("".join(f'{{"instruction": "a", "response": "b{n}"}}\n' for n in range(9)), "would own none of the 6 records"),
        ('{"instruction": "a", "response": "b"}\n' * 9, "all 9 records .* are set aside for evaluation"),
        ('{"instruction": "a", "response": " "}\n' * 4000, "has no usable text"),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_nothing(tiny_folder: Path, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        experiment.run(recipe_of(tiny_folder, f"data.source={path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(finished: experiment.RunResult, tiny_folder: Path) -> None:
    before = sorted(finished.folder.rglob("*"))
    with pytest.raises(ArtifactError, match="already there"):
        experiment.run(recipe_of(tiny_folder), finished.folder)
    assert sorted(finished.folder.rglob("*")) == before


def test_resuming_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run folder"):
        experiment.resume(tmp_path)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not there"):
        experiment.run(load_recipe("quickstart", ["model.source=./nowhere"]), tmp_path / "run")


def test_ledger_is_one_writers(finished: experiment.RunResult) -> None:
    with Ledger.open(finished.ledger), pytest.raises(ArtifactError, match="in use"):
        experiment.resume(finished.folder)


def test_a_diverged_run_is_one_sentence_and_keeps_its_ledger(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_folder, "server.learning_rate=1e30", "adapter.alpha=1e30", "server.optimizer=fedavg", "evaluation.every=0"
    )
    with pytest.raises(ModelError, match=r"diverged: lower server\.learning_rate"):
        experiment.run(recipe, tmp_path / "run")
    assert len(charged(tmp_path / "run")) == 5


def test_under_central_trust_nobody_is_told_how_many_updates_were_broken(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The count depends on who is in a secret cohort. A client whose training raises does not end the run either."""
    original = CohortTrainer._train

    def failing(self: CohortTrainer, adapter_D: Any, clients: Any, *rest: Any) -> Any:
        if any(client % 2 for client in clients):
            raise ValueError("the patient in room 12")
        return original(self, adapter_D, clients, *rest)

    monkeypatch.setattr(CohortTrainer, "_train", failing)
    lines: list[str] = []
    silent = experiment._Silent()
    silent.say = lines.append  # type: ignore[method-assign]
    result = experiment.run(recipe_of(tiny_folder, "privacy.trust=central"), tmp_path / "run", silent)
    assert result.certificate["rounds"] == 4
    assert not [line for line in lines if "rejected" in line or "not finite" in line]
    assert "room 12" not in "".join(lines) + "".join(capsys.readouterr())
