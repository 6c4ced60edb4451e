"""The ledger's file: one JSON object a line, each with the SHA-256 of the line before it, and on disk before anything goes on.

A line must be written exactly as `encode` writes it: keys sorted, no other spaces, no NaN, no key twice. So there is one
spelling of a ledger, and its hash says all that it says.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError
from drencoder.reading import parse_json

FORMAT = 2
NEEDS_WRITING = "Get permission to read and write there, or copy the folder to where you have it."
_WRITTEN_BY = {1: "drencoder 0.1"}  # formats of which the header does not say it itself
_GENESIS = "0" * 64
_LONGEST = 1 << 20  # bytes of a line: real ones have a few thousand

_TEXT, _WHOLE = (str,), (int,)
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "header": {
        "format": _WHOLE, "run_id": _TEXT, "plan": (dict,), "delta": (float,), "sampler_key": (str, type(None)),
        "recipe": _TEXT, "drencoder": _TEXT,
    },
    "charge": {"stage": _TEXT, "slot": _WHOLE, "trust": _TEXT, "attempt": _WHOLE, "event": (dict,)},
    "repeat": {"stage": _TEXT, "slot": _WHOLE, "trust": _TEXT},
    "contributors": {"slot": _WHOLE, "contributors": _WHOLE},
    "unasked": {"slot": _WHOLE, "sites": (list,)},
    "release": {"slot": _WHOLE, "attempt": _WHOLE, "of": _TEXT, "sha256": _TEXT},
    "abandoned": {"slot": _WHOLE},
    "lost": {"slot": _WHOLE},
    "site": {"name": _TEXT, "clients": _TEXT, "data": _TEXT, "owners": _TEXT},
    "note": {"text": _TEXT},
    "closed": {"rounds": _WHOLE, "files": (dict,)},
}  # fmt: skip
"""Kind of line -> its fields, besides `seq`, `kind` and `prev`, which all have."""


def encode(record: dict[str, Any]) -> bytes:
    """The one spelling of a line, without its end."""
    return json.dumps(record, sort_keys=True, allow_nan=False).encode()


def parse(path: Path, data: bytes) -> tuple[list[dict[str, Any]], str, int]:
    """(records, SHA-256 of the last whole line, bytes of a last line that was never finished).

    Raises:
      ArtifactError: there is no whole first line, a line was changed, or another version wrote the file.
    """
    whole, end, torn = data.rpartition(b"\n")
    if not end:
        raise ArtifactError(
            f"{path} has no complete first line, so it was cut or damaged: restore it from a copy. What was charged before "
            "counts, and a run without its whole ledger has no guarantee."
        )
    records: list[dict[str, Any]] = []
    previous = _GENESIS
    for number, line in enumerate(whole.split(b"\n")):
        record = _record(line)
        if number == 0 and record is not None and record.get("format") != FORMAT:
            raise ArtifactError(_foreign(path, record))
        if record is None or record["prev"] != previous or record["seq"] != number or not _sound(record, number):
            raise ArtifactError(
                f"{path}, line {number + 1}, was changed or damaged (its chain of hashes is broken): restore the file "
                "from a copy. A run without its whole ledger has no guarantee."
            )
        records.append(record)
        previous = hashlib.sha256(line).hexdigest()
    return records, previous, len(torn)


def _record(line: bytes) -> dict[str, Any] | None:
    """The line's object, if it has the fields of every line and the one spelling."""
    if len(line) > _LONGEST:
        return None
    try:
        record = parse_json(line)
        if not isinstance(record, dict) or encode(record) != line or not {"seq", "kind", "prev"} <= set(record):
            return None
    except ValueError:
        return None
    return record


def _sound(record: dict[str, Any], number: int) -> bool:
    fields = _FIELDS.get(record["kind"]) if isinstance(record["kind"], str) else None
    if fields is None or (record["kind"] == "header") != (number == 0) or type(record["seq"]) is not int:
        return False
    return set(record) == {"seq", "kind", "prev", *fields} and all(type(record[k]) in t for k, t in fields.items())


def _foreign(path: Path, header: dict[str, Any]) -> str:
    """The sentence about a header that this version does not read; nothing of the file is echoed but short, plain values."""
    version = header["format"] if type(header.get("format")) is int and 0 < header["format"] < 1000 else 0
    writer = header.get("drencoder")
    writer = writer if isinstance(writer, str) and len(writer) < 40 and writer.isprintable() else None
    by = f"drencoder {writer}" if writer else _WRITTEN_BY.get(version, "another version")
    return f"{path} has format {version}, written by {by}; this version reads format {FORMAT}: use the version that wrote it."


class LedgerFile:
    """An open file of lines. One process writes it at a time (file lock); make it with `create` or `open`."""

    def __init__(self, path: Path, descriptor: int, data: bytes, *, writable: bool) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._writable = writable
        self.records, self.head_hash, self.torn = parse(path, data)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "LedgerFile":
        """Starts a file with this header; `path` has its whole first line from the first moment that it is there.

        Raises:
          ArtifactError: the file exists or cannot be written.
        """
        line = encode({"seq": 0, "kind": "header", **header, "prev": _GENESIS}) + b"\n"
        starting = path.with_name(f".{path.name}.starting")
        descriptor = None
        try:
            descriptor = os.open(starting, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _lock(path, descriptor)
            if path.exists():
                raise FileExistsError
            os.ftruncate(descriptor, 0)  # a start that was killed may have left some of it
            write_all(descriptor, line)
            os.fsync(descriptor)
            os.rename(starting, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # else the name itself could be lost
            finally:
                os.close(folder)
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
                starting.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise ArtifactError(f"{path} exists: resume that run, or name another run folder.") from None
            raise ArtifactError(f"Cannot start the ledger {path}: {error.strerror}. Nothing was released.") from None
        except BaseException:  # Ctrl-C, or another process starts it just now
            if descriptor is not None:
                os.close(descriptor)
            raise
        return cls(path, descriptor, line, writable=True)

    @classmethod
    def open(cls, path: Path, *, read_only: bool) -> "LedgerFile":
        """Opens and checks a file. A last line without its end stays as it is: see `torn` and `cut_torn`.

        Raises:
          ArtifactError: the file cannot be opened, is another process's, or was changed.
        """
        try:
            descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing (No such file): restore it from a copy. What was charged before counts, and a run "
                "without its whole ledger has no guarantee."
            ) from None
        except OSError as error:
            raise ArtifactError(f"Cannot open the ledger {path}: {error.strerror}. {NEEDS_WRITING}") from None
        try:
            if not read_only:
                _lock(path, descriptor)
            return cls(path, descriptor, path.read_bytes(), writable=not read_only)
        except OSError as error:
            os.close(descriptor)
            raise ArtifactError(f"Cannot open the ledger {path}: {error.strerror}. {NEEDS_WRITING}") from None
        except BaseException:
            os.close(descriptor)
            raise

    def cut_torn(self) -> int:
        """Cuts off a last line that was never finished, and says how many bytes it had."""
        torn, self.torn = self.torn, 0
        if torn and self._descriptor is not None:
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - torn)
        return torn

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line and fsyncs it.

        Raises:
          ArtifactError: it cannot be made durable; then nothing may be released.
        """
        if self._descriptor is None or not self._writable:
            raise ArtifactError(f"The ledger {self.path} is closed, read-only, or failed before: open it again.")
        record = {"seq": len(self.records), **record, "prev": self.head_hash}
        line = encode(record)
        try:
            write_all(self._descriptor, line + b"\n")
            os.fsync(self._descriptor)
        except OSError as error:
            self.close()  # what is on disk is unknown now; `open` finds out
            raise ArtifactError(
                f"Cannot write the ledger {self.path}: {error.strerror}. Nothing was released; "
                "free the disk and resume."
            ) from None
        self.records.append(record)
        self.head_hash = hashlib.sha256(line).hexdigest()

    def close(self) -> None:
        """Gives the lock back. Closing twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of it, however little the system takes at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ArtifactError(f"{path} is in use by another process: wait for it, or stop it.") from None
