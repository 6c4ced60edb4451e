"""Flower's own processes as children of ours: quiet, offline, and gone when we are. No torch, no flwr."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from drencoder.errors import EngineError

_PR_SET_PDEATHSIG = 1
_PARENT = "DRENCODER_PARENT"

# No telemetry, no look for updates, no installation at run time; a log that does not grow with every message.
QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_LOG_LEVEL": "WARNING", "RAY_USAGE_STATS_ENABLED": "0",
    "UV_OFFLINE": "1",
}  # fmt: skip


def make_environment(home: Path) -> dict[str, str]:
    """Returns our environment variables, with Flower's telemetry, update check and run-time installation off, and its files under `home`."""
    own = {"FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1", _PARENT: str(os.getpid())}
    bin_folder = str(Path(sys.executable).parent)  # Flower looks its own programs up on PATH
    return {**os.environ, **QUIET_ENVIRONMENT, **own, "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def die_with_parent(sign: signal.Signals) -> None:
    """Asks Linux for `sign` when the process that started this one ends, however it ends. Call it first in a child."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it; elsewhere a killed parent leaves the child
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sign))
    if os.environ.get(_PARENT) not in (None, str(os.getppid())):
        raise SystemExit(0)  # it ended before we could ask


def find_free_port() -> int:
    """Returns a loopback port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ChildProcess:
    """One child process, its output in a log file, in a process group of its own so that Ctrl-C reaches only us."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, home: Path, log: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        try:
            home.mkdir(parents=True, exist_ok=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            self._start = log.stat().st_size if log.exists() else 0
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, env={**make_environment(home), **(extra or {})}, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"{module} cannot be started ({error}): make room or permission at {log.parent}."
            ) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """Returns the exit code of the process, or None while it runs."""
        return self._process.poll()

    def read_log_end(self) -> str:
        """Returns the last 4,000 bytes that this process wrote."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(self._start, self.log.stat().st_size - 4000))
            return file.read().decode(errors="replace")
        return ""

    def stop(self, sign: signal.Signals = signal.SIGTERM, timeout: float = 10.0) -> None:
        """Ends the process, by force after `timeout` seconds."""
        if self._process.poll() is None:
            self._process.send_signal(sign)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
