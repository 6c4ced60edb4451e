"""drencoder against plain PEFT, pfl and Flower's simulation on the same round: processes that take turns.

The ways are started one after the other, warmed up by one round, and then asked in turn; between questions they sleep. Each
repeat's ratio is to plain PEFT's time of the same repeat, so that a busy moment of the machine hits all alike.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speed_parts.machine import describe_machine
from speed_parts.task import make_task
from speed_parts.ways import WAYS

_FOLDER = Path(__file__).parents[1]
_START_S, _ROUND_S = 300.0, 3600.0
_TOLERANCE = 1e-4  # relative, of the round's result
REFERENCE = "plain PEFT"


def installed_ways(pythons: dict[str, str]) -> tuple[list[str], list[str]]:
    """The ways that can be run, and a sentence for each that cannot. `pythons`: way -> interpreter of its own environment."""
    ways, missing = [], []
    for way in WAYS:
        module = "ray" if way.startswith("Flower") else "pfl" if way == "pfl" else "peft"
        found = subprocess.run(
            [
                pythons.get(way, sys.executable),
                "-c",
                f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)",
            ],
            capture_output=True,
            check=False,
        )
        if found.returncode == 0:
            ways.append(way)
        else:
            missing.append(f"{way} is left out, since {module} is not installed in {pythons.get(way, 'python')}.")
    return ways, missing


class _Worker:
    """A way in its own process."""

    def __init__(self, way: str, python: str, task: Path, folder: Path) -> None:
        name = _file_name(way)
        self.way, self._out, self._log = way, folder / f"{name}.jsonl", folder / f"{name}.log"
        self._out.touch()
        self._seen = 0
        command = [python, "-m", "speed_parts.worker", str(task), way, str(self._out)]
        if way.startswith(
            "Flower"
        ):  # Ray listens on all addresses without a password: a network of its own, if that can be had
            command = [*_own_network(), *command]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(_FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
            )
        self._answer(_START_S)

    def round(self, result: Path) -> dict[str, float]:
        """One round; its result goes into the file."""
        assert self._process.stdin is not None
        print(result, file=self._process.stdin, flush=True)
        return self._answer(_ROUND_S)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lines = self._out.read_text().splitlines(keepends=True)
            if len(lines) > self._seen and lines[self._seen].endswith("\n"):
                self._seen += 1
                answer: dict[str, Any] = json.loads(lines[self._seen - 1])
                return answer
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"{self.way} gave no answer:\n{self._log.read_text()[-3000:]}")


def _file_name(way: str) -> str:
    return "".join(letter for letter in way if letter.isalnum())


def _own_network() -> list[str]:
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    if unshare and ip and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0:
        return [unshare, "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return []


def compare(
    model: str,
    clients: int,
    records: int,
    repeats: int,
    ways: Sequence[str],
    pythons: dict[str, str],
    unlike: Sequence[str] = (),
) -> dict[str, Any]:
    """Times, memory and differences of all ways for one cohort. SystemExit if a way computes another update that is not in `unlike`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = make_task(model, clients, records)
        task.save(folder / "task.pt")
        workers, rows = {}, {way: [] for way in ways}
        try:
            for way in ways:
                workers[way] = _Worker(way, pythons.get(way, sys.executable), folder / "task.pt", folder)
                workers[way].round(folder / f"{_file_name(way)}.pt")  # the warm-up
            for _ in range(repeats):
                for way in ways:
                    rows[way].append(workers[way].round(folder / f"{_file_name(way)}.pt"))
            results = {way: torch.load(folder / f"{_file_name(way)}.pt", weights_only=True) for way in ways}
        finally:
            for worker in workers.values():
                worker.stop()
    facts = {
        "model": model if model == "embedded" else Path(model).name,
        "clients": clients, "records": records, "tokens": task.tokens, "adapter_values": task.values, "repeats": repeats,
    }  # fmt: skip
    summaries = [_summary(way, rows, results) for way in ways]
    for summary in summaries:
        if summary["difference"] > _TOLERANCE and summary["way"] not in unlike:
            raise SystemExit(f"{summary['way']} computes another update: {summary['difference']:.1e} apart.")
    return facts | {"machine": describe_machine(), "ways": summaries}


def _summary(way: str, rows: dict[str, list[dict[str, float]]], results: dict[str, torch.Tensor]) -> dict[str, Any]:
    reference = rows[REFERENCE]
    apart = (results[way] - results[REFERENCE]).norm() / results[REFERENCE].norm()
    ratio = {
        key: statistics.median(a[f"{key}_s"] / b[f"{key}_s"] for a, b in zip(reference, rows[way], strict=True))
        for key in ("wall", "cpu")
    }
    return {
        "way": way,
        "wall_s": statistics.median(row["wall_s"] for row in rows[way]),
        "cpu_s": statistics.median(row["cpu_s"] for row in rows[way]),
        "speed_wall": ratio["wall"],
        "speed_cpu": ratio["cpu"],
        "peak_mib": max(row["peak_mib"] for row in rows[way]),
        "difference": float(apart),
    }
