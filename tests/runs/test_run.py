"""A whole run on a tiny model: what it leaves behind, and that killing it at any moment loses nothing."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import tiny_overrides
from drencoder.errors import ArtifactError, DataError, ModelError
from drencoder.federated.in_process import InProcessEngine
from drencoder.models.client_training import CohortTrainer
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.verify import verify_run
from processes import start_command

ROOT = Path(__file__).parents[2]


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [*tiny_overrides(folder), *overrides])


def charged(run: Path) -> list[tuple[str, int]]:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    return [(r["kind"], r["slot"]) for r in map(json.loads, lines) if r["kind"] in ("charge", "repeat")]


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


@pytest.mark.parametrize("moment", ["first gather", "gather", "step", "checkpoint", "row", "finish"])
@pytest.mark.parametrize("trust", ["local", "central"])
def test_replayed_run_killed_anywhere_ends_with_the_very_same_adapter(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, trust: str
) -> None:
    recipe = recipe_of(tiny_folder, "privacy.noise=replay", f"privacy.trust={trust}", "federation.rounds=3")
    whole = experiment.run(recipe, tmp_path / "whole")

    class Killed(BaseException):
        pass

    name = {
        "first gather": "update_query",
        "gather": "update_query",
        "row": "_evaluate_round",
        "step": "server_step",
        "checkpoint": "save_checkpoint",
        "finish": "make_certificate",
    }[moment]
    original, calls = getattr(experiment, name), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if moment in ("finish", "first gather") else 2):
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, name, failing)
        with pytest.raises(Killed):
            experiment.run(recipe, tmp_path / "killed")
    resumed = experiment.resume(tmp_path / "killed")

    expected = load_file(whole.adapter / "adapter_model.safetensors")
    got = load_file(resumed.adapter / "adapter_model.safetensors")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert len(charged(resumed.folder)) >= len(charged(whole.folder))
    assert resumed.metrics == whole.metrics
    assert not resumed.certificate["private"]
    assert "test only" in resumed.certificate["statement"]


# All that a round hands to the next: bases of public text at the adapter as it is, the momentum, a clip that moved.
CARRIED = ["encoder.name=hybrid", "prior.public=self", "privacy.clip=adaptive", "server.optimizer=fedavgm"]


def test_what_rounds_hand_on_survives_a_kill(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_folder, *CARRIED, "privacy.noise=replay", "encoder.gate=warn")
    whole = experiment.run(recipe, tmp_path / "whole")
    original = experiment.server_step
    for dies_in in (2, 3, 4):
        rounds = 0

        def failing(*arguments: Any) -> Any:
            nonlocal rounds
            rounds += 1
            if rounds == dies_in:  # noqa: B023  # called in this turn of the loop only
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "server_step", failing)
            with pytest.raises(KeyboardInterrupt):
                experiment.run(recipe, tmp_path / f"killed-{dies_in}")
        resumed = experiment.resume(tmp_path / f"killed-{dies_in}")
        expected = load_file(whole.adapter / "adapter_model.safetensors")
        got = load_file(resumed.adapter / "adapter_model.safetensors")
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    bytes_down = whole.certificate["bytes"]["downloaded"]
    assert bytes_down > 4 * whole.certificate["encoder"]["update_size"]  # bases on top of the adapter
    assert "written by the base model" in whole.certificate["encoder"]["provenance"]


@pytest.mark.parametrize(("trust", "budget_rounds"), [("local", 4), ("central", 3)])
def test_secure_run_killed_in_a_round_never_has_a_shorter_ledger(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str, budget_rounds: int
) -> None:
    """Local: the lost round is skipped. Central: it is charged again, so the budget ends one round earlier."""
    recipe = recipe_of(tiny_folder, f"privacy.trust={trust}")
    original, calls = experiment.server_step, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "server_step", failing)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(recipe, tmp_path / "run")
    lost = charged(tmp_path / "run")
    assert lost[-1] == ("charge", 2)
    resumed = experiment.resume(tmp_path / "run")
    after = charged(tmp_path / "run")
    assert after[: len(lost)] == lost
    assert len(after) == 5
    assert resumed.certificate["rounds"] == budget_rounds
    assert after.count(("charge", 2)) == (1 if trust == "local" else 2)
    assert float(resumed.certificate["observers"]["public"]["epsilon_pld"]) <= 8.0 + 1e-6
    assert verify_run(tmp_path / "run").trouble == ""


def test_kill_minus_nine_at_random_moments(tiny_folder: Path, tmp_path: Path) -> None:
    """Real processes, real SIGKILL; the last start runs to its end. The ledger never gets shorter."""
    run, chance = tmp_path / "run", random.Random(5)
    overrides = [f"--set={text}" for text in [*tiny_overrides(tiny_folder), "federation.rounds=6"]]
    start, again = ["run", "quickstart", *overrides, "--out", str(run)], ["run", "--resume", str(run)]
    longest: list[tuple[str, int]] = []
    for attempt in range(4):
        begun = (run / "ledger.jsonl").exists()
        process = start_command(*(again if begun else start))
        deadline = time.monotonic() + 300
        target = chance.randint(1, 2) + len(longest)
        while process.is_alive() and time.monotonic() < deadline:
            if (run / "ledger.jsonl").exists() and len(charged_if_whole(run, longest)) >= target:
                break
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        now = charged_if_whole(run, longest)
        assert now[: len(longest)] == longest, f"attempt {attempt} lost charges"
        longest = now
    assert longest
    if not (run / "certificate.json").exists():
        final = start_command(*again)
        final.join()
        assert final.exitcode == 0
    assert charged(run)[: len(longest)] == longest
    assert [slot for _, slot in charged(run)] == list(range(7))
    assert verify_run(run).trouble == ""


def charged_if_whole(run: Path, otherwise: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The charges on disk, also when the last line is being written."""
    try:
        text = (run / "ledger.jsonl").read_text()
    except FileNotFoundError:
        return otherwise
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [(row["kind"], row["slot"]) for row in rows if row["kind"] in ("charge", "repeat")]


def test_lost_stage_one_goes_on_with_an_uninformed_prior(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CohortTrainer, "_train", failing)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(recipe_of(tiny_folder), tmp_path / "run")
    resumed = experiment.resume(tmp_path / "run")
    assert resumed.certificate["stage1"]["lost"]
    assert [slot for _, slot in charged(tmp_path / "run")] == [0, 1, 2, 3, 4]


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


# --- stage 1 as published, and FedCG's ------------------------------------------------------------------------


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
