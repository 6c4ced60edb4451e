"""MMLU and C-Eval as they are handed out: folders of CSV files, and data sets of the hub. Every complaint names its line.

CSV folders have `dev/`, `val/` and `test/` with one `<subject>_<split>.csv` each. MMLU's files have no header and the
columns question, A, B, C, D, answer; C-Eval's have a header (id, question, A, B, C, D, answer, perhaps explanation)
and no answers in `test/`. On the hub `cais/mmlu` has the columns question, subject, choices, answer and
`ceval/ceval-exam` those of its CSV files, each with one configuration per subject.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drencoder.data.benchmarks.taxonomy import Taxonomy
from drencoder.data.embedded_world.world import Question
from drencoder.data.hub import config_names, load_rows, split_names
from drencoder.data.prompts_template import LETTERS
from drencoder.errors import DataError
from drencoder.reading import cut, read_bytes, reason, shown

AUXILIARY = "auxiliary_train"
"""MMLU's training split: questions of other sets, of no subject. Text for clients, never a benchmark."""

_COLUMNS = ("question", *LETTERS, "answer")
_ANSWERS_ELSEWHERE = "C-Eval's test split is published without answers, use its split val"
# "val" is a folder's name, "validation" the hub's for MMLU.
_SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}


def same_split(one: str, other: str) -> bool:
    """Whether two names mean one split: "val" and "validation" do."""
    return other in _SPLIT_NAMES.get(one, (one,))


def read_questions(taxonomy: Taxonomy, where: str, split: str, subjects: Sequence[str]) -> dict[str, list[Question]]:
    """Subject -> its questions in the order of the file or table, subjects in alphabetical order.

    Args:
      where: a folder, or `hub:` and a data set's name (or a folder that the datasets library reads).
      subjects: only these; empty = all that are there.

    Raises:
      DataError: anything is missing, unreadable or impossible; the message names file and line, or configuration and
        row.
    """
    if subjects and split == AUXILIARY:
        raise DataError(f"{where}: split {AUXILIARY!r} has no subjects: ask for all of it, or for another split.")
    for subject in subjects:
        taxonomy.check_subject(subject, "--subjects")
    if where.startswith("hub:"):
        by_subject = _read_hub(taxonomy, where.removeprefix("hub:"), split, subjects)
    else:
        by_subject = _read_folder(taxonomy, Path(where), split, subjects)
    for subject in subjects or by_subject:
        if not by_subject.get(subject):
            raise DataError(f"{where}: split {split!r} has no question of {subject!r}: name other subjects or a split.")
    if not by_subject:
        raise DataError(f"{where}: split {split!r} has no question: give the benchmark's own files.")
    return {subject: by_subject[subject] for subject in sorted(by_subject)}


# --- folders ---------------------------------------------------------------------------------------


def _read_folder(taxonomy: Taxonomy, folder: Path, split: str, subjects: Sequence[str]) -> dict[str, list[Question]]:
    parts = _splits_of(taxonomy, folder)
    name = _choose_split(split, list(parts), str(folder))
    files: dict[str, Path] = {}
    for path in parts[name]:
        if name == AUXILIARY:  # files are named after the sets that they come from
            files[path.stem] = path
            continue
        subject, mark, rest = path.stem.rpartition("_")
        if not mark or rest not in _SPLIT_NAMES.get(name, (name,)):
            raise DataError(f"{path}: the file's name is not <subject>_{name}.csv: rename or remove it.")
        taxonomy.check_subject(subject, str(path))
        files[subject] = path
    chosen = subjects or sorted(files)
    return {subject: _read_csv(taxonomy, subject, files[subject]) for subject in chosen if subject in files}


def _splits_of(taxonomy: Taxonomy, folder: Path) -> dict[str, list[Path]]:
    """Split -> its CSV files; hidden files, as some archivers leave them, are passed over."""
    try:
        entries = sorted(folder.iterdir())
        inside = {entry.name: sorted(entry.glob("[!.]*.csv")) for entry in entries if entry.is_dir()}
    except FileNotFoundError:
        raise DataError(
            f"{taxonomy.name}: the folder '{cut(folder)}' does not exist: give 'embedded', a folder or hub:ORG/NAME."
        ) from None
    except NotADirectoryError:
        raise DataError(
            f"{taxonomy.name}: '{cut(folder)}' is a file: give the folder with dev/, val/ and test/."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{taxonomy.name}: '{cut(folder)}' cannot be read ({reason(error)}): check its permissions."
        ) from None
    parts = {name: files for name, files in inside.items() if files}
    if not parts:
        raise DataError(
            f"{taxonomy.name}: '{folder}' has no folder with CSV files in it: give the one with dev/, val/ and test/."
        )
    return parts


def _choose_split(split: str, there: Sequence[str], where: str) -> str:
    for name in _SPLIT_NAMES.get(split, (split,)):
        if name in there:
            return name
    raise DataError(f"{where} has no split {shown(split)}: choose one of {cut(', '.join(sorted(there)))}.")


def _read_csv(taxonomy: Taxonomy, subject: str, path: Path) -> list[Question]:
    questions = []
    header: Sequence[str] | None = None if taxonomy.name == "ceval" else _COLUMNS
    for line, cells in _csv_rows(path):
        where = f"{path}, line {line}"
        if header is None:
            header = _check_header([cell.strip() for cell in cells], where)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{where}: {len(cells)} columns instead of {len(header)} ({', '.join(header)}): mend or remove the row."
            )
        row = dict(zip(header, cells, strict=True))
        questions.append(_question(taxonomy, subject, row, [row[letter] for letter in LETTERS], where))
    if not questions:
        raise DataError(f"{path} holds no question: fill it or remove it.")
    return questions


def _check_header(header: list[str], where: str) -> list[str]:
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        hint = f" ({_ANSWERS_ELSEWHERE})" if missing == ["answer"] else ""
        raise DataError(f"{where}: the header line lacks the column {', '.join(map(repr, missing))}: add it{hint}.")
    if len(set(header)) < len(header):
        raise DataError(f"{where}: the header line has a column twice: keep one of them.")
    return header


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the line where the row starts, cells) of every row that is not empty."""
    reader = csv.reader(io.StringIO(_utf8(path), newline=""), strict=True)
    while True:
        start = reader.line_num + 1  # fields may hold line breaks, so rows and lines differ
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: not valid CSV ({error}): mend its quotation marks.") from None
        if cells:
            yield start, cells


def _utf8(path: Path) -> str:
    """The file's text, without a byte-order mark."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
        bad = text.find("\0")  # UTF-16 without a mark: every second byte of English is zero, and that is valid UTF-8
        if bad < 0:
            return text
        first, line = 0, text.count("\n", 0, bad) + 1
    except UnicodeDecodeError as error:
        first, line = data[error.start], data[: error.start].count(b"\n") + 1
    raise DataError(f"{path}, line {line}: byte 0x{first:02x} is not UTF-8 text: convert the file to UTF-8.")


# --- hub -------------------------------------------------------------------------------------------


def _read_hub(taxonomy: Taxonomy, source: str, split: str, subjects: Sequence[str]) -> dict[str, list[Question]]:
    knob = f"evaluation.{taxonomy.name}"
    configs = config_names(source, knob=knob)
    by_subject: dict[str, list[Question]] = {}
    for config in _choose_configs(taxonomy, source, configs, subjects):
        name = _choose_split(split, split_names(source, config, knob=knob), f"{source}, configuration {config}")
        rows = load_rows(source, name, knob=knob, config=config)
        for number, row in enumerate(rows, start=1):
            where = f"{source}, configuration {config}, split {name}, row {number}"
            subject = config if config in taxonomy.subjects else _cell(row, "subject", where)
            if name == AUXILIARY:
                subject = AUXILIARY
            else:
                taxonomy.check_subject(subject, where)
            if not subjects or subject in subjects:
                by_subject.setdefault(subject, []).append(_HUB_ROWS[taxonomy.name](taxonomy, subject, row, where))
    return by_subject


def _choose_configs(taxonomy: Taxonomy, source: str, configs: Sequence[str], subjects: Sequence[str]) -> Sequence[str]:
    """The asked-for subjects' own configurations, or one that holds all subjects, or every subject there is."""
    if subjects and set(subjects) <= set(configs):
        return subjects
    for whole in ("all", "default"):
        if whole in configs:
            return [whole]
    own = [config for config in configs if config != "auxiliary_train"]  # cais/mmlu: training text of no subject
    for config in own:
        taxonomy.check_subject(config, f"{source}, configuration {config}")
    return [config for config in own if not subjects or config in subjects]


def _mmlu_row(taxonomy: Taxonomy, subject: str, row: Mapping[str, Any], where: str) -> Question:
    choices = _cell(row, "choices", where)
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) != 4:
        raise DataError(
            f"{where}: choices is a {type(choices).__name__} instead of a list of four options: mend or remove the row."
        )
    return _question(taxonomy, subject, row, choices, where)


def _ceval_row(taxonomy: Taxonomy, subject: str, row: Mapping[str, Any], where: str) -> Question:
    return _question(taxonomy, subject, row, [_cell(row, letter, where) for letter in LETTERS], where)


_HUB_ROWS: Mapping[str, Callable[[Taxonomy, str, Mapping[str, Any], str], Question]] = {
    "mmlu": _mmlu_row,
    "ceval": _ceval_row,
}


# --- one question ----------------------------------------------------------------------------------


def _question(taxonomy: Taxonomy, subject: str, row: Mapping[str, Any], choices: Sequence[Any], where: str) -> Question:
    """Checks one row. Equal options are let through: the published sets have some, and a letter is still right."""
    text = _text(_cell(row, "question", where))
    if not text.strip():
        raise DataError(f"{where}: the question is empty: mend or remove the row.")
    a, b, c, d = map(_text, choices)
    answer = _answer(_cell(row, "answer", where), where)
    options = (a, b, c, d)
    if not options[answer].strip():
        raise DataError(f"{where}: the right option, {LETTERS[answer]}, is empty: mend or remove the row.")
    if len(set(options)) == 1:
        raise DataError(f"{where}: all four options are the same, so no letter is right: mend or remove the row.")
    return Question(subject, text, options, answer, taxonomy.language)


def _answer(value: Any, where: str) -> int:
    """0 to 3 from a letter, or from the hub's class number (-1: not labelled)."""
    text = _text(value).strip()
    if text in ("", "-1"):
        raise DataError(f"{where}: the question has no right answer: give a letter A to D ({_ANSWERS_ELSEWHERE}).")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4:
        return value
    if text not in LETTERS:
        said = repr(text) if len(text) < 3 or text in _COLUMNS else f"a text of {len(text)} characters"
        raise DataError(f"{where}: the answer is {said}: it must be one of the letters A to D.")
    return LETTERS.index(text)


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(f"{where}: there is no column {column!r}: add it.")
    return row[column]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
