"""How time and memory grow with clients, adapter values, rounds and population. Each number is from a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = Callable[[], dict[str, Any]]

_FOLDER = Path(__file__).parents[1]
# What a run needs beside the knob that grows: one short record a client, no evaluation between the rounds.
_SMALL = [
    "data.examples_per_client=1", "data.max_tokens=24", "privacy.delta=1e-9", "privacy.trust=central", "evaluation.every=0",
    "evaluation.examples=4", "federation.rounds=2",
    "evaluation.benchmarks=[]",
]  # fmt: skip


def run_alone(what: str, *arguments: str) -> dict[str, Any]:
    """One measurement of `in_process` in a fresh process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "speed_parts.in_process", what, *arguments], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def growth(tables: Iterable[str], *, smoke: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The named tables, one after the other; `smoke`: the smallest row of those that differ in kind."""
    for name in tables:
        rows = TABLES[name]()
        yield name, [make() for make in rows[: 1 if smoke else None]]


def _clients() -> list[Row]:
    return [
        partial(_with, {"clients": count}, "rounds", *_SMALL, f"federation.population={10 * count}", "federation.sampling_rate=0.1")
        for count in (10, 100, 1_000, 10_000)
    ]  # fmt: skip


def _values() -> list[Row]:
    return [
        partial(
            _with, {}, "rounds", *_SMALL, "federation.population=160", "federation.sampling_rate=0.1", f"adapter.rank={rank}",
            f"adapter.targets=['{targets}']",
        )
        for targets, rank in (("auto", 8), ("auto", 64), ("all-linear", 96), ("all-linear", 248), ("all-linear", 852))
    ]  # fmt: skip


def _population() -> list[Row]:
    return [
        partial(
            _with, {"population": count}, "plan", f"federation.population={count}", f"federation.sampling_rate={100 / count}",
            "privacy.delta=1e-9", "privacy.trust=central",
        )
        for count in (1_000, 10_000, 100_000, 1_000_000)
    ]  # fmt: skip


def _crowd() -> list[Row]:
    return [
        partial(
            _with, {"population": count}, "rounds", *_SMALL, f"federation.population={count}",
            f"federation.sampling_rate={1000 / count}",
        )
        for count in (10_000, 100_000, 1_000_000)
    ]  # fmt: skip


def _rounds() -> list[Row]:
    return [
        partial(
            _with, {"rounds": count, "trust": trust}, "plan", f"federation.rounds={count}", f"privacy.trust={trust}",
            "federation.population=100000", "federation.sampling_rate=0.00001", "privacy.delta=1e-6", "prior.source=none",
        )
        for trust in ("local", "central")
        for count in (10, 100, 1_000, 10_000)
    ]  # fmt: skip


def _encoders() -> list[Row]:
    return [partial(_with, {}, "encoders", str(size)) for size in (32_768, 1_048_576, 8_388_608)]


def _with(facts: dict[str, Any], what: str, *arguments: str) -> dict[str, Any]:
    return facts | run_alone(what, *arguments)


TABLES: dict[str, Callable[[], list[Row]]] = {
    "population": _population,
    "encoders": _encoders,
    "rounds": _rounds,
    "crowd": _crowd,
    "values": _values,
    "clients": _clients,
}
