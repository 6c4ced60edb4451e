"""File formats: JSONL, JSON, CSV, TSV, Parquet, Arrow, any of them in gzip, and a folder of such files. The one door to pyarrow.

A row comes with the place where it stands, for messages. No message quotes what a file holds.
"""

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from drencoder.errors import DataError
from drencoder.reading import NotJsonError, cut, parse_json, read_bytes, reason

Row = tuple[str, Any]
"""Where a row stands ("notes.csv, line 3"), and what it is: a mapping, unless the file is ill-shaped."""

FileState = tuple[tuple[str, int, int, int], ...]
"""Name, inode, time of the last change (ns) and size of a file, or of every file in a folder."""

_SPLITS = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")
_SAME_SPLIT = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}
_GIVE = "give a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or hub:ORG/NAME"
_TOLD_MARK = re.compile(r"sep=(.)(?=\r?\n)")
_ABOUT = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Files that the datasets library keeps beside data: they tell of records and hold none."""


def read_rows(path: Path, split: str, *, knob: str) -> Iterator[Row]:
    """The rows of a file, or of the files of a folder; `knob` is named in messages.

    Of a folder whose files or folders are named after splits (train.csv, test/1.csv), only those of `split` are read; else all are
    `train`.

    Raises:
      DataError: there is no such file, its format is not known, or it is broken; the message names file and line.
    """
    try:
        if path.is_dir():
            for part in _files_of(path, split, knob):
                yield from _read_file(part, knob)
            return
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise _unreadable(path, knob, error) from None
    yield from _read_file(path, knob)


def usual_split(name: str) -> str:
    """One name for all that name one split: `val`, `dev`, `valid` and `eval` are `validation`."""
    return _SAME_SPLIT.get(name.lower(), name.lower())


def state_of(path: Path) -> FileState | None:
    """What tells whether a file, or a folder of files, is still the one that was read; None where there is none."""
    try:
        parts = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
        stats = [(str(part), part.stat()) for part in parts]
    except (OSError, ValueError):  # ValueError: NUL in a name
        return None
    return tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _files_of(folder: Path, split: str, knob: str) -> list[Path]:
    files = {
        path: path.relative_to(folder).parts
        for path in sorted(folder.rglob("*"))
        if _format_of(path) in _READERS and path.name not in _ABOUT and path.is_file()
    }
    # Copies of editors and what programs leave, such as .ipynb_checkpoints and __MACOSX, are no data.
    files = {path: parts for path, parts in files.items() if not any(part.startswith((".", "__")) for part in parts)}
    if not files:
        raise DataError(f"{knob} = '{cut(folder)}' is a folder without data files: {_GIVE}.")
    named = {path: name for path, parts in files.items() if (name := _split_of(parts))}
    if not named and usual_split(split) == "train":
        return list(files)
    chosen = [path for path, name in named.items() if usual_split(name) == usual_split(split)]
    if not chosen:
        there = ", ".join(sorted(set(named.values())))
        cure = (
            f"name one of {there} as 'FOLDER:SPLIT', or give a file" if there else "leave the split out, or give a file"
        )
        raise DataError(f"{knob} = '{cut(folder)}' has no files of split {split!r}: {cure}.")
    return chosen


def _split_of(parts: tuple[str, ...]) -> str:
    """The split that a file is named after, or the nearest of its folders whose whole name is one; "" if there is none."""
    if match := _SPLITS.search(Path(parts[-1]).stem.lower()):
        return match[1]
    return next((part.lower() for part in reversed(parts[:-1]) if _SPLITS.fullmatch(part.lower())), "")


def _format_of(path: Path) -> str:
    """A file's ending in small letters, without `.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _read_file(path: Path, knob: str) -> Iterator[Row]:
    try:
        if path.exists() and not path.is_file():
            raise DataError(
                f"{knob} = '{cut(path)}' is a pipe or a device, which cannot be read twice: write a file of it."
            )
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, knob, error) from None
    if data.startswith(b"\x1f\x8b"):  # whatever its name
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{path} is not a whole gzip file: pack it again.") from None
    reader = _READERS.get(_format_of(path))
    if reader is None:
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise DataError(f"{knob} = '{cut(path)}' {_strange(path, data)}.")
        reader = _read_jsonl
    return reader(path, data)


def _strange(path: Path, data: bytes) -> str:
    """What a file is that no reader knows, and what to do."""
    if _format_of(path) in (".xls", ".xlsx", ".xlsm", ".xlsb", ".ods"):
        return "is a workbook of a spreadsheet program: save its sheet there as CSV in UTF-8, and give that file"
    if data.startswith((b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        return "is packed, and not with gzip: unpack it, and give the file or folder that was in it"
    return f"is of no known format: {_GIVE}"


def _unreadable(path: Path, knob: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{knob} = '{cut(path)}' does not exist: give 'embedded', or {_GIVE.removeprefix('give ')}.")
    why = reason(error) if isinstance(error, OSError) else "no file can have that name"
    return DataError(f"{knob} = '{cut(path)}' cannot be read ({why}): check its name and permissions.")


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: convert the file to UTF-8.") from None


def _read_jsonl(path: Path, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(_text(path, data).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _read_json(path: Path, data: bytes) -> Iterator[Row]:
    """A list of records, an object that holds it under "data", or one record a line."""
    text = _text(path, data)
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _is_object(lines[0]):
        yield from _read_jsonl(path, data)
        return
    whole = _parse(text, f"{path}")
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    if isinstance(whole, dict) and whole and all(_SPLITS.fullmatch(str(name).lower()) for name in whole):
        raise DataError(
            f"{path}: an object of splits ({', '.join(whole)}) instead of a list of records: write a file for each."
        )
    if isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list):
        raise DataError(f'{path}: {kind_of(whole)} instead of a list of records: write [...] or {{"data": [...]}}.')
    for number, item in enumerate(whole, start=1):
        yield f"{path}, record {number}", item


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        line = error.line if isinstance(error, NotJsonError) else 1
        raise DataError(f"{where}{f', line {line}' if line > 1 else ''}: {error}: mend or remove it.") from None


def kind_of(value: Any) -> str:
    """What a value is, in words, without the value."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        Decimal: "a number",
        bytes: "bytes",
    }
    return kinds.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _read_table(delimiter: str) -> Callable[[Path, bytes], Iterator[Row]]:
    def read(path: Path, data: bytes) -> Iterator[Row]:
        text = _text(path, data)
        told = _TOLD_MARK.match(text)
        if told:  # a line that Excel reads; an empty one in its place keeps the numbers of the others
            text = text[told.end() :]
        mark = delimiter if delimiter != "," else told[1] if told else _mark_of(re.split("[\r\n]", text, maxsplit=1)[0])
        before = csv.field_size_limit(sys.maxsize)  # of the process; a text may have more than 128 kB
        try:
            return iter(list(_table_rows(path, csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))))
        finally:
            csv.field_size_limit(before)

    return read


def _mark_of(header: str) -> str:
    """What stands between the names of a header: a comma, if there is any, or what other programs write in its place."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in ",;\t|" if mark in bare), ",")


def _table_rows(path: Path, rows: Any) -> Iterator[Row]:
    names: list[str] = []
    line = 1
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV ({error}): mend its quotes.") from None
        if row is None:
            return
        if not any(row):
            continue
        if not names:
            names = [name.strip() for name in row]
            if len(set(names) - {""}) < len([name for name in names if name]):
                raise DataError(f"{path}, line {line}: two columns have the same name: rename one.")
            continue
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: {len(row)} values for {len(names)} columns: mend or remove it.")
        yield f"{path}, line {line}", {name: value for name, value in zip(names, row, strict=True) if name}


def _read_parquet(path: Path, data: bytes) -> Iterator[Row]:
    return _columns(path, "Parquet", lambda arrow: arrow.parquet.ParquetFile(arrow.BufferReader(data)).iter_batches())


def _read_arrow(path: Path, data: bytes) -> Iterator[Row]:
    """A stream of Arrow, as `save_to_disk` of the datasets library writes it, or a file of Arrow (Feather)."""

    def batches(arrow: Any) -> Iterable[Any]:
        if not data.startswith(b"ARROW1"):
            return arrow.ipc.open_stream(data)
        file = arrow.ipc.open_file(data)
        return map(file.get_batch, range(file.num_record_batches))

    return _columns(path, "Arrow", batches)


def _columns(path: Path, kind: str, open_batches: Callable[[Any], Iterable[Any]]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the pyarrow library: pip install 'drencoder[data]'.") from None
    number = 0
    try:
        for batch in open_batches(pyarrow):
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the same name: rename one.")
            # A time is no text, and some that a file can hold are none that Python has.
            times = [field.name for field in batch.schema if pyarrow.types.is_temporal(field.type)]
            for row in batch.drop_columns(times).to_pylist():
                number += 1
                yield f"{path}, record {number}", row
    except DataError:
        raise
    except Exception as error:  # pyarrow's own, and what its values cannot become
        raise DataError(f"{path} cannot be read as {kind} ({type(error).__name__}): write the file again.") from None


_READERS: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
