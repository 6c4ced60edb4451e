"""The words "nothing is lost" are said after Ctrl-C only where it is true."""

from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.interrupted import resume_hint


def interrupted(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, step: str, time: int, *overrides: str) -> str:
    """A run that gets Ctrl-C in the given call of one of the runner's functions; what its user reads."""
    original, calls = getattr(experiment, step), 0

    def interrupting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == time:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, step, interrupting)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(load_recipe("quickstart", [*tiny_overrides(folder), *overrides]), run)
    return resume_hint("run", run)


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        ("central", "The charge of round 2 is lost: drencoder run --resume {run} goes on, and charges it again"),
        (
            "local",
            "Round 2 is lost: its charge stays, and drencoder run --resume {run} goes on with what comes after it.",
        ),
    ],
)
def test_a_round_that_was_charged_and_not_kept_is_lost(
    trust: str, words: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    said = interrupted(tiny_folder, run, monkeypatch, "server_step", 2, f"privacy.trust={trust}")
    assert words.format(run=run) in said
    assert "othing is lost" not in said


@pytest.mark.parametrize("trust", ["central", "local"])
def test_between_two_rounds_nothing_is_lost(
    trust: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    said = interrupted(tiny_folder, run, monkeypatch, "_evaluate_round", 2, f"privacy.trust={trust}")
    assert f"Nothing is lost: drencoder run --resume {run}" in said
    assert experiment.resume(run).certificate["rounds"] == 4


def test_replayed_noise_makes_the_same_round_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Nothing is lost" in interrupted(
        tiny_folder, tmp_path / "run", monkeypatch, "server_step", 2, "privacy.noise=replay"
    )


def test_stage_1_is_named_and_a_damaged_ledger_is_left_to_resuming(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    said = interrupted(tiny_folder, run, monkeypatch, "save_checkpoint", 1)
    assert "Stage 1 is lost: its charge stays" in said
    assert "nothing was asked or charged" in resume_hint("run", tmp_path / "nowhere")
    (run / "ledger.jsonl").write_text("{}\n")
    assert resume_hint("run", run) == f"\nInterrupted. Go on with: drencoder run --resume {run}"


def test_real_gradients_that_are_lost_are_not_to_be_resumed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedcg = ("encoder.name=autoencoder", "encoder.gate=warn", "prior.source=gradients")
    said = interrupted(tiny_folder, tmp_path / "run", monkeypatch, "fit_encoder", 1, *fedcg)
    assert "cannot go on: start a new one" in said
    assert "--resume" not in said
