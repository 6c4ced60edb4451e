"""Killing a run at any moment loses nothing: what it charged stays charged, and it goes on to the same end."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import charged, recipe_of

from conftest import tiny_overrides
from drencoder.models.client_training import CohortTrainer
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run
from processes import start_command


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
