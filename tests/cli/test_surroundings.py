"""Terminals of other encodings, closed outputs, and files that are none: a command does its work, or says in one sentence why not."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drencoder.data.places import read_data
from drencoder.errors import ArtifactError, DataError, RecipeError
from drencoder.privacy.ledger_file import LedgerFile
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.run_folder import RunFolder

PLAN = [sys.executable, "-m", "drencoder", "plan"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_output_may_lack_letters(encoding: str) -> None:
    done = subprocess.run(
        [*PLAN, "--set", "name=é漢"], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"epsilon" in done.stdout
    assert b"\\u6f22" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed: str, tmp_path: Path) -> None:
    for arguments, code in (("", 0), ("absent.toml", 2)):
        command = f'"$@" {arguments} {closed}'
        done = subprocess.run(["sh", "-c", command, "sh", *PLAN], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert b"unforeseen" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_another_editor(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 'mine'\r\nseed = 3\r\n")
    assert load_recipe(path).seed == 3


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_text_that_can_be_read_once_only_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a pipe or a device, which cannot be read twice"):
        read_data(str(path) if kind == "pipe" else "/dev/zero", knob="data.source")


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_share_that_sets_everybody_aside_is_one_sentence(tmp_path: Path, unit: str) -> None:
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"instruction": "a", "response": f"{n}", "who": f"p{n}"}) + "\n" for n in range(4))
    )
    sets = ["data.source=notes.jsonl", "data.client_field=who", "data.held_out_share=0.9999", f"privacy.unit={unit}"]
    sites = ["federation.units_per_site=4", "privacy.trust=local"] if unit == "record" else []
    command = [*PLAN, *(word for one in (*sets, *sites) for word in ("--set", one))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"sets all 4 {unit if unit == 'record' else 'owner'}s of notes.jsonl aside" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for out in ("file/run", "file/deep/run"):
        with pytest.raises(ArtifactError, match=r"run cannot be made \(.*file is no folder\): give another --out"):
            RunFolder.check_free(tmp_path / out)
    RunFolder.check_free(tmp_path / "new" / "run")
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path
    )  # the administrator may write everywhere
    with pytest.raises(ArtifactError, match=r"run cannot be made \(no permission to write in .*\): give another --out"):
        RunFolder.check_free(tmp_path / "new" / "run")


@pytest.mark.parametrize("command", [["run"], ["compare"]])
def test_a_command_that_makes_a_folder_says_so_before_it_loads_torch(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [*PLAN[:-1], *command, "--out", "file/run"]
    code = f"import sys, runpy\nsys.argv = {['drencoder', *words[3:]]!r}\n" + (
        "try: runpy.run_module('drencoder', run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("drencoder: file/run cannot be made (")
    assert len(done.stderr.splitlines()) == 1


def test_a_ledger_on_a_disk_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    plan = make_plan(
        trust="central", epsilon=8, delta=1e-3, population=100, sampling_rate=0.1, rounds=2, stage1_rate=0.0
    )
    monkeypatch.setattr(os, "open", refuse)
    for opened in (
        lambda: LedgerFile.open(tmp_path / "ledger.jsonl", read_only=False),
        lambda: SiteLedger.open(tmp_path / "s", "", plan),
    ):
        with pytest.raises(ArtifactError, match=r"Read-only file system\. Get permission .* copy the folder to where"):
            opened()


def test_nobody_has_a_hundred_thousand_threads() -> None:
    """The model was said not to load, since torch found no memory for them."""
    with pytest.raises(RecipeError, match=r"speed\.threads = 100000 is out of range: it must be at most 1024"):
        load_recipe(None, ["speed.threads=100000"])
