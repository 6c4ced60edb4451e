"""The folder of a utility study: one process at a time, one line per finished cell, safe against a kill at any moment. No torch.

Beside the results page lies an archive of every line, from which a folder can be made again on another machine.
"""

import fcntl
import json
import lzma
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from utility_grid import ARMS, Cell, Losses, Scale, Setting, Track, rate_and_clip

CELLS, STUDY, GEOMETRY = "cells.jsonl", "study.json", "geometry.json"
ARCHIVE, COMPACT = "utility-cells.jsonl.xz", "utility.json"  # among the results
Row = dict[str, Any]


def claim(folder: Path, scale: Scale) -> int:
    """Makes the folder this process's own and checks that its cells are of this scale; the descriptor holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"{folder} is being filled by another process: wait for it, or stop it.")
    path = folder / STUDY
    if not path.is_file():
        replace_text(path, json.dumps({"scale": asdict(scale), "machine": machine()}, indent=1) + "\n")
    elif (known := read_study(folder)["scale"]) != asdict(scale):
        sys.exit(f"{folder} holds cells of {known}, not of {asdict(scale)}: give another --out, or the same numbers.")
    shutil.rmtree(folder / "running", ignore_errors=True)  # what a killed process left
    mend(folder / CELLS)
    return lock


def replace_text(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
    }


def read_study(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STUDY).read_text("utf-8"))


def mend(path: Path) -> None:
    """Cuts off a last line that a kill left unfinished."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def archive(folder: Path, results: Path) -> None:
    """Keeps every line among the results; the same lines give the same bytes."""
    lines = sorted((folder / CELLS).read_bytes().splitlines(keepends=True))
    replace_bytes(results / ARCHIVE, lzma.compress(b"".join(lines), preset=9))


def restore(results: Path, folder: Path) -> None:
    """Makes a study's folder out of an archive; refuses a folder that has cells already."""
    if (folder / CELLS).exists():
        sys.exit(f"{folder} has cells already: leave --from out to go on with them, or give another --out.")
    if missing := [name for name in (ARCHIVE, COMPACT) if not (results / name).is_file()]:
        sys.exit(f"{results} has no {' and no '.join(missing)}: give the folder that --page wrote.")
    try:
        known = json.loads((results / COMPACT).read_text("utf-8"))
        lines = lzma.decompress((results / ARCHIVE).read_bytes())
    except (ValueError, lzma.LZMAError) as error:
        sys.exit(f"{results} cannot be read ({error}): restore the files that --page wrote.")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / STUDY, json.dumps({key: known[key] for key in ("scale", "machine")}, indent=1) + "\n")
    if known["geometry"]:
        replace_text(folder / GEOMETRY, json.dumps({"rows": known["geometry"]}) + "\n")
    replace_bytes(folder / CELLS, lines)


def read_cells(folder: Path) -> dict[Cell, Row]:
    """Every line that was finished; empty for a new study."""
    path = folder / CELLS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return {cell_of(row): row for row in map(json.loads, lines)}


def cell_of(row: Mapping[str, Any]) -> Cell:
    setting = Setting(**{declared.name: row["setting"][declared.name] for declared in fields(Setting)})
    return Cell(Track(row["arm"], setting), row["seed"], row["rate_step"], row["clip_step"])


def loss_of(row: Mapping[str, Any]) -> float:
    """A failed or diverged run is the worst of all."""
    return row["loss"]["value"] if "loss" in row and math.isfinite(row["loss"]["value"]) else math.inf


def other_rates(rows: Mapping[Cell, Row]) -> list[str]:
    """Keys of the cells that would have another rate or clip today, since the study's constants were changed."""
    changed = []
    for cell, row in rows.items():
        if cell.track.arm not in ARMS:
            continue
        k_star = math.inf if row["k_star"] is None else row["k_star"]
        now = rate_and_clip(cell, k_star)
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(now, (row["rate"], row["clip"]), strict=True)):
            changed.append(cell.key)
    return changed


def by_track(losses: Losses) -> dict[Track, dict[Cell, float]]:
    parts: dict[Track, dict[Cell, float]] = {}
    for cell, loss in losses.items():
        parts.setdefault(cell.track, {})[cell] = loss
    return parts
