"""Wall time and peak memory of the quickstart, as a user starts it.

    python benchmarks/quickstart.py [--repeats 1] [--set KEY=VALUE ...] [--json FILE]

Each repeat is a process of its own. Asserts nothing about time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def measure(overrides: list[str]) -> dict[str, float]:
    """Seconds and MiB of one `drencoder run`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "drencoder", "run", "--out", f"{folder}/run"]
        command += [f"--set={text}" for text in overrides]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the run failed with exit code {process.returncode}")
    return {"wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = [measure(args.set) for _ in range(args.repeats)]
    table = Table(
        "figure", "median", "smallest", "largest", title=f"quickstart, {args.repeats} run(s), {os.cpu_count()} cores"
    )
    for key in runs[0]:
        values = [run[key] for run in runs]
        table.add_row(key, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"cores": os.cpu_count(), "overrides": args.set, "runs": runs}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
