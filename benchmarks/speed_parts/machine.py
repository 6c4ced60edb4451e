"""What the machine says about processes: CPU time, memory, and how busy it is. Linux only."""

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")


def _tree(pid: int) -> Iterator[int]:
    """The process and all that it started, as far as they live."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def tree_cpu_seconds(pid: int | None = None) -> float:
    """CPU seconds of the process (this one by default), of all that it started, and of those of them that ended."""
    own, total = pid or os.getpid(), 0
    for one in _tree(own):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[13:15] if one == os.getpid() else fields[11:15]))
    # Of this very process the clock is finer than the system's ticks of 10 ms.
    return total / _TICKS + (time.process_time() if own == os.getpid() else 0.0)


def peak_mib(pid: int | None = None) -> float:
    """The largest resident memory that each process of the tree ever had, added up; pages that they share count for each."""
    total = 0
    for one in _tree(pid or os.getpid()):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return total / 1024


def describe_machine() -> dict[str, Any]:
    """Facts for the JSON; `load` is the number of processes that wanted a core over the last minute."""
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
