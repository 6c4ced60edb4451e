"""The cells of a study, and the store that a study which was killed goes on from. No torch.

A *track* is one method at one epsilon in one setting. A *cell* is one run of a track: a seed, a step of the learning rate and a step
of the clip. A *row* is what is kept of a finished cell, ready for JSON. Steps are exponents: `tuning.TuningPlan` turns them into
rates.
"""

import fcntl
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError
from drencoder.reading import cut, parse_json, read_bytes, shown
from drencoder.runs.run_folder import RunFolder, storing

CELLS, STUDY = "cells.jsonl", "study.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Track:
    """One method at one epsilon; `epsilon` is None without a budget. `setting` names everything else that is varied."""

    method: str
    epsilon: float | None = None
    setting: str = ""

    @property
    def key(self) -> str:
        """The part of a cell's key that all cells of this track share."""
        budget = "no-noise" if self.epsilon is None else f"eps{self.epsilon:g}"
        return "/".join(part for part in (self.setting, budget, self.method) if part)

    def __str__(self) -> str:
        where = f"{self.setting}, " if self.setting else ""
        return where + (self.method if self.epsilon is None else f"{self.method} at epsilon {self.epsilon:g}")


@dataclass(frozen=True)
class Cell:
    """One run of a track."""

    track: Track
    seed: int
    rate_step: float
    clip_step: int = 0

    @property
    def key(self) -> str:
        """Names the cell among all cells of its study; also the path of its run folder where that is kept."""
        return f"{self.track.key}/seed{self.seed}/rate{self.rate_step:+g}/clip{self.clip_step:+d}"


def loss_of(row: Mapping[str, Any]) -> float:
    """Held-out loss in nats per token; infinite for a run that failed or diverged, so that it is the worst of all."""
    loss = row.get("loss", math.inf)
    value = loss["value"] if isinstance(loss, Mapping) else loss  # rows of version 0.1 hold the loss with its interval
    return value if math.isfinite(value) else math.inf


def read_rows(folder: Path) -> dict[str, Row]:
    """Every finished row of a study by the key of its cell; empty for a new study.

    A last line that a kill left unfinished is not a row.

    Raises:
      ArtifactError: a line is not JSON, has no key, or a value of another kind than its name says.
    """
    path = folder / CELLS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not _is_row(row):
                raise ValueError
            rows[row["key"]] = row
        except ValueError:
            raise ArtifactError(
                f"line {number} of {path} is not a cell: remove that line, and the cell is run again."
            ) from None
    return rows


def _is_row(row: Any) -> bool:
    """Whether a line has a key, and under the names that all studies use the kinds of values that are computed with."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    loss, scores = row.get("loss", 0.0), row.get("accuracy", {})
    numbers = [loss.get("value") if isinstance(loss, dict) else loss]
    numbers += [row[name] for name in ("seed", "seconds", "bytes_up", "bytes_stage1") if name in row]
    tables = [row[name] for name in ("epsilon", "encoder") if name in row]
    if not isinstance(scores, dict) or not all(isinstance(table, dict) for table in tables):
        return False
    # Of version 0.1, an accuracy stands with its interval.
    numbers += [value.get("value") if isinstance(value, dict) else value for value in scores.values()]
    return all(type(number) in (int, float) for number in numbers)


class CellStore:
    """A study's folder, held by one process: `cells.jsonl` has one line per finished cell, on the disk when `add` returns."""

    def __init__(self, folder: Path, depends_on: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Opens the folder, or makes it.

        Args:
          depends_on: everything that decides what a cell computes, ready for JSON. A folder holds cells of one such set only.
          notes: further facts for the reader of a new study's `study.json`.

        Raises:
          ArtifactError: another process fills the folder, it holds another study or something else, or cannot be written.
        """
        self.folder = folder
        path = folder / STUDY
        needed = json.loads(json.dumps(depends_on))
        if path.is_file():
            _check_same_study(folder, needed)
        else:
            RunFolder.check_free(folder)
        self._lock = _lock(folder)
        try:
            if not path.is_file():
                RunFolder(folder).write_json(path, {"cells_depend_on": needed, "machine": _machine(), **(notes or {})})
            _cut_unfinished_line(folder / CELLS)
            self.rows = read_rows(folder)
            with storing(folder / CELLS):
                self._file = (folder / CELLS).open("a", encoding="utf-8")
        except BaseException:
            os.close(self._lock)
            raise

    def add(self, *rows: Row) -> None:
        """Keeps the rows of cells that are finished."""
        with storing(self.folder / CELLS):
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows |= {row["key"]: row for row in rows}

    def close(self) -> None:
        """Lets the next process have the folder."""
        self._file.close()
        os.close(self._lock)

    def __enter__(self) -> "CellStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(folder: Path) -> int:
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ArtifactError(f"{folder} is being filled by another process: wait for it, or stop it.") from None
    return lock


def _check_same_study(folder: Path, needed: Mapping[str, Any]) -> None:
    path = folder / STUDY
    try:
        known = parse_json(read_bytes(path))["cells_depend_on"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ArtifactError(f"{path} cannot be read as a study: give another --out, or remove the folder.") from None
    if other := _first_difference(known, needed):
        raise ArtifactError(f"{folder} holds a study of another recipe ({other}): give another --out, or remove it.")


def _first_difference(known: Any, needed: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty where they are the same."""
    if isinstance(known, dict) and isinstance(needed, dict):
        for key in [*known, *(key for key in needed if key not in known)]:
            inner = cut(f"{where}.{key}" if where else key)
            if words := _first_difference(known.get(key), needed.get(key), inner):
                return words
        return ""
    return "" if known == needed else f"{where} is {shown(known)} there and {shown(needed)} here"


def _cut_unfinished_line(path: Path) -> None:
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with storing(path), path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
    }
