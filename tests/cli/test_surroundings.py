"""Terminals of other encodings, closed outputs, and files that are none: a command does its work, or says in one sentence why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drencoder.data.places import read_data
from drencoder.errors import DataError
from drencoder.recipe.recipe import load_recipe

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
