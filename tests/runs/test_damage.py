"""Starts that were killed, and run folders that were damaged: one sentence each, and no charge is ever forgotten."""

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.errors import ArtifactError, DrencoderError
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.report import remake_report
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.verify import verify_run
from mutations import mutated, number_of_mutations
from tampering import Forgery, reaccount, verdict


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), "evaluation.examples=4"])
    return experiment.run(recipe, tmp_path_factory.mktemp("runs") / "run").folder


# --- starts that were killed, and damage --------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(12))
def test_a_start_that_is_killed_leaves_a_folder_that_out_or_resume_takes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed before each of the first operations on the disk, one after the other."""
    recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), "federation.rounds=1", "evaluation.examples=4"])
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal done
            done += 1
            if done > moment:
                raise Killed
            return original(*arguments, **more)

        return call

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "rename", "replace", "mkdir", "ftruncate"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(Killed):
            experiment.run(recipe, path)
    begun = (path / "ledger.jsonl").exists()
    result = experiment.resume(path) if begun else experiment.run(recipe, path)
    assert verdict(result.folder) == ""


@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_a_ledger_that_is_gone_is_never_called_unspent(run: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    if damage == "missing":
        (path / "ledger.jsonl").unlink()
    else:
        (path / "ledger.jsonl").write_bytes(b"" if damage == "empty" else (path / "ledger.jsonl").read_bytes()[:50])
    with pytest.raises(ArtifactError, match="restore it from a copy") as found:
        experiment.resume(path)
    assert "anew" not in str(found.value)
    with pytest.raises(ArtifactError, match="already there"):
        RunFolder.check_free(path)


def test_an_unfinished_run_is_said_to_be_unfinished(run: Path, tmp_path: Path) -> None:
    forged = Forgery(run, tmp_path / "run")
    forged.remove("closed")
    assert "the run is unfinished" in verdict(forged.mend())
    assert reaccount(forged.path) == 1
    with pytest.raises(ArtifactError, match="unfinished"):
        remake_report(forged.path)


def test_a_ledger_of_the_first_version_names_it(run: Path, tmp_path: Path) -> None:
    forged = Forgery(run, tmp_path / "run")
    for key in ("recipe", "drencoder"):
        del forged.records[0][key]
    forged.records[0]["format"] = 1
    with pytest.raises(ArtifactError, match=r"format 1, written by drencoder 0\.1; this version reads format 2"):
        verify_run(forged.mend())


def test_damage_of_any_file_is_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded mutations: none may end in a traceback, and none may pass for the run."""

    class TrainedError(Exception):
        """The folder was taken: enough is known."""

    def stop(*_: Any) -> None:
        raise TrainedError

    monkeypatch.setattr(experiment, "_drive", stop)
    monkeypatch.setattr(experiment, "_prepare", prepared(run))
    chance = random.Random(15)
    source, path = run, tmp_path / "run"
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file())
    shutil.copytree(source, path)
    for number in range(number_of_mutations(200)):
        name = names[number % len(names)]
        whole = (source / name).read_bytes()
        data = mutated(whole, chance)
        if data == whole:
            continue
        (path / name).write_bytes(data)
        assert verdict(path) != "", (number, name)
        assert reaccount(path) == 1, (number, name)
        for command in (remake_report, experiment.resume):
            with contextlib.suppress(DrencoderError, TrainedError):
                command(path)
            for left in source.rglob("*"):  # what the command itself wrote
                if left.is_file() and left.name != Path(name).name:
                    (path / left.relative_to(source)).write_bytes(left.read_bytes())
            (path / name).write_bytes(data)
        (path / name).write_bytes(whole)


def prepared(run: Path) -> Callable[..., Any]:
    """`_prepare` for a recipe that is checked already, made once."""
    from drencoder.runs.build import build

    live = build(load_recipe(run / "recipe.resolved.toml"))
    return lambda *_: live
