"""A deployment on the loopback, started with the documented commands as real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from drencoder.recipe.recipe import Recipe, load_recipe


def small_recipe(*overrides: str) -> Recipe:
    """A run of seconds on the embedded model."""
    return load_recipe(
        "quickstart",
        [
            "adapter.rank=2", "data.examples_per_client=2", "data.max_tokens=24", "federation.population=30",
            "federation.sampling_rate=0.3", "federation.rounds=2", "encoder.ratio=8",
            "evaluation.examples=4", "privacy.delta=1e-3",
            "privacy.participation_cap=3", "speed.parallel_clients=4", *overrides,
        ],
    )  # fmt: skip


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(path: Path, words: str, seconds: float = 600.0) -> str:
    """The text of a log once it has these words."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = path.read_text() if path.exists() else ""
        if words in text:
            return text
        time.sleep(0.1)
    raise AssertionError(f"{words!r} not in {path}: {path.read_text() if path.exists() else 'no such file'}")


class Deployment:
    """Commands in `folder`, each with a log; all ended at the end."""

    def __init__(self, folder: Path, recipe: Recipe, nodes: int = 3) -> None:
        self.folder, self.port, self.nodes = folder, find_free_port(), nodes
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(recipe.to_toml())
        assert self.start("certs", "certs", "certs", "--nodes", str(nodes)).wait(300) == 0

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "drencoder", *arguments], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )  # fmt: skip
        return self.processes[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def server(self, *arguments: str) -> "subprocess.Popen[bytes]":
        first = [] if "--resume" in arguments else ["recipe.toml", "--out", "run"]
        return self.start(
            "server", "server", *first, "--certs", "certs", "--port", str(self.port), "--wait", "500", *arguments
        )

    def node(self, number: int, *arguments: str, key: str = "") -> "subprocess.Popen[bytes]":
        return self.start(
            f"node{number}", "client", "--server", f"127.0.0.1:{self.port}", "--key", key or f"certs/node{number}/key",
            "--recipe", "recipe.toml", "--poll", "0.1", *arguments,
        )  # fmt: skip

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def deployed(folder: Path, recipe: Recipe, nodes: int = 3) -> Iterator[Deployment]:
    """All nodes and the server, running."""
    made = Deployment(folder, recipe, nodes)
    try:
        yield made
    finally:
        made.stop()
