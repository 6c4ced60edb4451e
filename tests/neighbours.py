"""What the tests of neighbouring data sets share: the words of their records, and a run that goes on from another's releases."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import tiny_overrides
from drencoder.privacy.mechanism import Release
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import asking
from drencoder.runs import run as experiment

Spy = TypeVar("Spy")

WORDS = [
    "the",
    "ward",
    "was",
    "calm",
    "and",
    "every",
    "patient",
    "slept",
    "well",
    "until",
    "the",
    "early",
    "morning",
    "round",
    "began",
]


def go_on_from(monkeypatch: pytest.MonkeyPatch, releases: dict[int, Release] | None) -> dict[int, Release]:
    """Lets a run go on from these releases, slot -> release, and from its own where there is none; returns all of them."""
    known, released = dict(releases or {}), asking.server_release

    def release_again(query: Any, *rest: Any) -> Any:
        result = released(query, *rest)
        return replace(result, release=known.setdefault(query.spec.slot, result.release))

    monkeypatch.setattr(asking, "server_release", release_again)
    return known


def run_watched(
    rows: Sequence[dict[str, str]],
    overrides: Sequence[str],
    folder: Path,
    tiny: Path,
    make_spy: Callable[[pytest.MonkeyPatch], Spy],
) -> Spy:
    """Runs on these records of a new folder, with replayed noise, while a spy watches; returns the spy."""
    folder.mkdir(parents=True)
    notes = folder / "notes.jsonl"
    notes.write_text("\n".join(map(json.dumps, rows)))
    common = ["privacy.noise=replay", "encoder.gate=warn", "adapter.start=peft"]
    recipe = load_recipe("quickstart", [*tiny_overrides(tiny), f"data.source={notes}", *common, *overrides])
    with pytest.MonkeyPatch.context() as patch:
        spy = make_spy(patch)
        experiment.run(recipe, folder / "run")
    return spy
