"""The subjects of the embedded world: which facts, in which words, and which subjects are kept for the clients.

The tables are `world.json` beside the embedded model, and are read when they are first asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

Table = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Subject:
    """One subject: its name, language (``"en"`` | ``"zh"``), question stems with one ``{}``, and its facts.

    ``kept``: questions of this subject are never asked for a letter in the general part; clients and benchmarks have
    them. ``table`` is empty for an invented subject, whose facts each ``World`` deals from ``invented``.
    """

    name: str
    language: str
    kept: bool
    stems: tuple[str, ...]
    table: Table = ()
    invented: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorldTables:
    """All that the world is made of; texts by language where a mapping has "en" and "zh".

    Attributes:
      version: of the facts; the embedded model's provenance names the one that it learned.
      towns: of the invented subjects, whose answers ``World(seed)`` deals.
      letter_requests: only after one of these does the general part expect a letter; without one it expects words.
      answer_and_letter_requests: after one of these it expects the words and then the letter.
      match_requests: drill over a list of options: write each of the named ones with its partner.
      lookups: drills over a list of options without a question: option -> letter, and letter -> option.
      words_zh: Chinese words of the stems; written Chinese has no spaces to find them by.
    """

    version: str
    subjects: tuple[Subject, ...]
    towns: tuple[str, ...]
    letter_requests: Mapping[str, Sequence[str]]
    answer_and_letter_requests: Mapping[str, Sequence[str]]
    match_requests: Mapping[str, str]
    lookups: Mapping[str, Sequence[Sequence[str]]]
    words_zh: tuple[str, ...]


@cache
def world_tables() -> WorldTables:
    """The tables of `world.json`."""
    text = (resources.files("drencoder") / "embedded" / "world.json").read_text("utf-8")
    facts: dict[str, Any] = json.loads(text)
    return WorldTables(
        version=facts["version"],
        subjects=tuple(map(_subject, facts["subjects"])),
        towns=tuple(facts["towns"]),
        letter_requests=facts["letter_requests"],
        answer_and_letter_requests=facts["answer_and_letter_requests"],
        match_requests=facts["match_requests"],
        lookups=facts["lookups"],
        words_zh=tuple(facts["words_zh"]),
    )


def all_subjects() -> tuple[Subject, ...]:
    """All subjects, in the order in which a world deals and draws them."""
    return world_tables().subjects


def _subject(entry: Mapping[str, Any]) -> Subject:
    name, language, kept, stems = (entry[key] for key in ("name", "language", "kept", "stems"))
    return Subject(name, language, kept, tuple(stems), _table(entry), tuple(entry.get("invented", ())))


def _table(entry: Mapping[str, Any]) -> Table:
    """A subject's facts: as they stand, sums of two digits, or what comes after each member of a cycle."""
    if "sums" in entry:
        return tuple((f"{a}{entry['sums']}{b}", str(a + b)) for a in range(1, 10) for b in range(1, 10))
    pairs = list(entry.get("facts", {}).items())
    for cycle in entry.get("cycles", ()):
        pairs += zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    return tuple(pairs)
