"""The places that text comes from, as `data.source`, `evaluation.data` and `prior.public` name them, and what is read there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import final

from drencoder.data.benchmarks.files import AUXILIARY, read_questions, same_split
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import record_of
from drencoder.data.formats import FileState, Row, read_rows, state_of, usual_split
from drencoder.data.hub import load_rows
from drencoder.data.schemas import Record, Records, to_records
from drencoder.errors import DataError

_CLIENTS_SPLITS = {"mmlu": AUXILIARY, "ceval": "dev"}  # what clients own: no question of a benchmark's score is in it


@final
@dataclass(frozen=True)
class Place:
    """`hub:ORG/NAME`, `mmlu:FOLDER`, `ceval:hub:ORG/NAME`, a file or a folder; each may end in `:SPLIT`.

    `kind` is "embedded", "hub", "mmlu", "ceval", or "" for a file or folder; `split` is empty where none is named.
    """

    kind: str
    name: str
    split: str

    @classmethod
    def parse(cls, where: str) -> "Place":
        kind, _, name = where.partition(":")
        if kind not in ("embedded", "hub", *TAXONOMIES):
            kind, name = "", where
        hub = "hub:" if name.startswith("hub:") else ""
        head, _, split = name.removeprefix(hub).partition(":")
        if not split or kind == "embedded" or Path(name).exists() or not (kind or Path(head).is_dir()):
            return cls(kind, name, "")
        return cls(kind, hub + head, split)

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a data set of the hub, be it of records or of a benchmark's questions."""
        return self.kind == "hub" or self.name.startswith("hub:")

    @property
    def clients_split(self) -> str:
        """The split that clients own: the one that is named, or the usual one."""
        return self.split or _CLIENTS_SPLITS.get(self.kind, "train")

    def shares_records(self, split: str) -> bool:
        """Whether `split` of this place may have a record that the clients own.

        The datasets library knows `train+test`, `all`, and slices such as `train[:10%]`: two slices of one split count as shared, since an
        owner may have records in both.
        """
        if self.kind in TAXONOMIES:
            return same_split(split, self.clients_split)
        asked, owned = (
            {usual_split(part.partition("[")[0].strip()) for part in text.split("+")}
            for text in (split, self.clients_split)
        )
        return bool(asked & owned) or "all" in asked | owned

    def is_same(self, other: "Place") -> bool:
        """Whether both are one place, whatever the split."""
        return (self.kind, place_of(self.name)) == (other.kind, place_of(other.name))


def place_of(where: str) -> str:
    """One spelling for one place: a folder's full path, or the hub's name in small letters."""
    prefix, name = ("hub:", where.removeprefix("hub:")) if where.startswith("hub:") else ("", where)
    path = Path(name)
    return str(path.resolve()) if path.exists() else prefix + name.strip("/").lower()


def read_data(
    where: str,
    *,
    knob: str,
    split: str = "",
    fields: Mapping[str, str] | None = None,
    owners: Mapping[str, str] | None = None,
) -> Records:
    """What a file, a folder of files, or one split of a hub data set or of a benchmark holds; `knob` is named in messages.

    `split` is for a place that names none; without it, it is the one that clients own. `fields` says which field is what where its
    name does not (`data.fields`), `owners` which fields name owners, and for which knob. The records are not to be changed: who reads the same file next gets the same ones.

    Raises:
      DataError: it is missing, unreadable, empty or ill-shaped.
    """
    if not where.strip():  # to a path it would be the folder that the command was called in
        raise DataError(f"{knob} is empty: give 'embedded', a file or folder of records, or hub:ORG/NAME.")
    place = Place.parse(where)
    split = place.split or split or place.clients_split
    stamp = state_of(Path(place.name)) if not place.kind else None
    if stamp is None:  # of a hub, a benchmark, or nothing at all
        return _read_data(place, split, knob, fields or {}, owners or {})
    named = tuple(tuple(sorted((given or {}).items())) for given in (fields, owners))
    return _read_again(place, split, knob, named, stamp)


@lru_cache(maxsize=1)
def _read_again(
    place: Place, split: str, knob: str, named: tuple[tuple[tuple[str, str], ...], ...], stamp: FileState
) -> Records:
    """The last file that was read: a command counts the owners of a file and then opens it, and a million records take their time."""
    return _read_data(place, split, knob, *map(dict, named))


def _read_data(place: Place, split: str, knob: str, fields: Mapping[str, str], owners: Mapping[str, str]) -> Records:
    kind, name = place.kind, place.name
    rows: Iterable[Row]
    if kind in TAXONOMIES:
        return Records(_read_benchmark(kind, name, split, knob), "questions with four options")
    if kind == "hub":
        rows = ((f"{name}, row {n}", row) for n, row in enumerate(load_rows(name, split, knob=knob), start=1))
    else:
        rows = read_rows(Path(name), split, knob=knob)
    return to_records(rows, fields, origin=name, strict=knob == "data.source", owners=owners)


def read_records(where: str, *, knob: str, split: str = "", fields: Mapping[str, str] | None = None) -> list[Record]:
    """The records of `read_data`, whatever their schema: that of the clients' data, or one that is recognised."""
    return read_data(where, knob=knob, split=split, fields=fields).records


def _read_benchmark(name: str, where: str, split: str, knob: str) -> list[Record]:
    """The questions of one split of MMLU or C-Eval as records; the category is the subject."""
    if where in ("", "embedded"):
        raise DataError(
            f"{knob} = '{name}:{where}' names no folder: write {name}:FOLDER or {name}:hub:ORG/NAME; the embedded "
            "world has clients of its own, data.source = 'embedded'."
        )
    by_subject = read_questions(TAXONOMIES[name], where, split, ())
    return [record_of(question) for questions in by_subject.values() for question in questions]
