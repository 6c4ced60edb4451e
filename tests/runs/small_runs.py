"""What the tests of whole runs share: a recipe of seconds, and what the ledger on disk has charged."""

import json
from pathlib import Path

from conftest import tiny_overrides
from drencoder.recipe.recipe import Recipe, load_recipe


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [*tiny_overrides(folder), *overrides])


def charged(run: Path) -> list[tuple[str, int]]:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    return [(r["kind"], r["slot"]) for r in map(json.loads, lines) if r["kind"] in ("charge", "repeat")]
