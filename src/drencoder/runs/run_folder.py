"""This module says what lies where in a run folder, and writes it so that a kill leaves nothing half-done.

::

    recipe.resolved.toml   the whole recipe, defaults filled in
    ledger.jsonl           every charge, on disk before its release (privacy.ledger)
    metrics.jsonl          one line per evaluation and round
    checkpoints/           state.safetensors + state.json of the last finished round
    adapter/               a PEFT adapter folder with the tokenizer and a model card
    certificate.json       what was promised, to whom, and what was spent
    outcomes.json          every held-out text's loss and every question's outcome, for paired comparisons
    report.html            one page for people
    samples.json           what base and adapted model answer to a few public prompts (runs.samples)
    twin/                  a run without noise, NOT private, which nobody may see but who holds all text (runs.twin)
    signatures.jsonl       who stands for the ledger's last line, if anybody signed it (runs.signatures)

No torch here: the report and the plan read run folders without it.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from drencoder.errors import ArtifactError
from drencoder.reading import parse_json

_RUST_ERROR = re.compile(r"\(os error (\d{1,4})\)")


@final
class _Inside:
    """The path of a file or folder inside a run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Names and safe writing of everything in a run folder."""

    path: Path

    recipe = _Inside("recipe.resolved.toml")
    ledger = _Inside("ledger.jsonl")
    metrics = _Inside("metrics.jsonl")
    checkpoints = _Inside("checkpoints")
    adapter = _Inside("adapter")
    model_card = _Inside("adapter/README.md")
    certificate = _Inside("certificate.json")
    outcomes = _Inside("outcomes.json")
    report = _Inside("report.html")
    samples = _Inside("samples.json")
    signatures = _Inside("signatures.jsonl")
    twin = _Inside("twin")
    _starting = _Inside(".recipe.starting.toml")  # the recipe of a run whose ledger is not there yet

    @staticmethod
    def check_free(path: Path) -> None:
        """Raises ArtifactError if there is something at `path` already, or nothing can be made there.

        What a start that was killed left counts as nothing.
        """
        try:
            taken = path.exists() and not (path.is_dir() and all(map(_is_of_a_start, path.iterdir())))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}): give another --out.") from None
        if taken:
            raise ArtifactError(f"{path} is already there: continue it with --resume {path}, or give another --out.")
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not os.access(above, os.W_OK | os.X_OK):  # else a run would find out after loading its model
            why = f"no permission to write in {above}" if above.is_dir() else f"{above} is no folder"
            raise ArtifactError(f"{path} cannot be made ({why}): give another --out.")

    @classmethod
    def create(cls, path: Path, recipe: str) -> "RunFolder":
        """Makes a run folder that holds a recipe and waits for its ledger; `begin` is called when that is on disk.

        Killed before, it is free for another start; killed between the two, `open` finishes what `begin` does. So a folder
        with a recipe and no ledger is never the work of a kill.

        Raises:
          ArtifactError: the folder exists and is not empty, or cannot be made.
        """
        try:
            cls.check_free(path)
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"the run folder {path} cannot be made ({error.strerror}): give another --out."
            ) from None
        folder = cls(path)
        folder.write(folder._starting, recipe.encode())
        return folder

    def begin(self) -> None:
        """The ledger is there: from now on this is a run."""
        with storing(self.recipe):
            os.replace(self._starting, self.recipe)
            _sync_folder(self.path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens the folder of an earlier run.

        Raises:
          ArtifactError: it is not there or has no recipe.
        """
        folder = cls(path)
        if not folder.recipe.is_file():
            if folder._starting.is_file() and folder.ledger.is_file():
                folder.begin()
                return folder
            if folder._starting.is_file():
                raise ArtifactError(f"{path} was killed before its ledger began: start it again with --out {path}.")
            raise ArtifactError(
                f"{path} is not a run folder (no {folder.recipe.name}): give the folder of a started run."
            )
        return folder

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one row to the metrics."""
        with storing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows; a last one that a kill tore is dropped.

        Raises:
          ArtifactError: another row is damaged.
        """
        try:
            data = self.metrics.read_bytes() if self.metrics.exists() else b""
        except OSError as error:
            raise ArtifactError(f"{self.metrics} cannot be read ({error.strerror}): restore it from a copy.") from None
        *lines, _torn = data.split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if not _is_row(row):
                raise ArtifactError(
                    f"{self.metrics}, line {number}, is damaged: restore the file from a copy of the run."
                )
            rows.append(row)
        return rows

    def keep_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Rewrites the metrics. A resumed run drops the rows of rounds that it runs again."""
        self.write(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write(self, path: Path, data: bytes) -> None:
        """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the folder."""
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def read_json(self, path: Path) -> dict[str, Any]:
        """A file of the run that holds one JSON object.

        Raises:
          ArtifactError: it is missing, or no JSON object.
        """
        try:
            value = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(
                f"{self.path} has no {path.name} yet: finish it with drencoder run --resume {self.path}."
            ) from None
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}): restore it from a copy.") from None
        except ValueError as error:
            raise ArtifactError(f"{path} cannot be read ({error}): restore it from a copy.") from None
        if not isinstance(value, dict):
            raise ArtifactError(f"{path} is no JSON object: restore it from a copy.")
        return value

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Writes `value` as a whole JSON file or nothing. Raises ValueError for a number that is not finite."""
        self.write(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())

    @contextlib.contextmanager
    def replacing(self, folder: Path) -> Iterator[Path]:
        """Yields a temporary folder that takes `folder`'s place when the block ends without an error."""
        with storing(folder):
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            _sync_folder(folder.parent)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence: raises ArtifactError for an OSError of the block.

    Libraries written in Rust (safetensors, tokenizers) raise errors of their own, which end with the system's number.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
    except Exception as error:
        number = _RUST_ERROR.search(str(error))
        if number is None:
            raise
        why = os.strerror(int(number[1]))
    else:
        return
    raise ArtifactError(
        f"{path} cannot be written ({why}): make room or permission and start again; a run goes on with --resume."
    )


def _is_of_a_start(path: Path) -> bool:
    """Whether a start that was killed before its ledger began may have left this."""
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name in (".recipe.starting.toml", "..recipe.starting.toml.tmp", ".ledger.jsonl.starting")


def _is_row(row: Any) -> bool:
    """Whether a line of the metrics has what every row has, each of its kind."""
    if not isinstance(row, dict) or type(row.get("round")) is not int or type(row.get("bytes_up")) is not int:
        return False
    numbers = [row[name] for name in ("loss", "accuracy") if row.get(name) is not None]
    return isinstance(row.get("epsilon"), dict) and all(
        (type(n) is float and math.isfinite(n)) or (type(n) is int and abs(n) < 1 << 53) for n in numbers
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
