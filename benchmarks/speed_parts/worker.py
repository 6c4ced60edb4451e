"""One way in a process of its own: `python -m speed_parts.worker TASK WAY OUT`.

Lines come in: a file name, into which the round's result goes as a tensor. A line of JSON goes to the file OUT for each: wall
seconds, and CPU seconds and peak memory of this process and all that it started.
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import torch

from speed_parts.machine import peak_mib, tree_cpu_seconds
from speed_parts.record_ways import RECORD_WAYS
from speed_parts.task import Task
from speed_parts.ways import WAYS, Round


def main() -> None:
    path, way, out = sys.argv[1:4]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    def loop(run_round: Round) -> None:
        with Path(out).open("a") as answers:
            print(json.dumps({"ready": way}), file=answers, flush=True)
            for line in sys.stdin:
                wall, cpu = time.perf_counter(), tree_cpu_seconds()
                result_D = run_round()
                row = {"wall_s": time.perf_counter() - wall, "cpu_s": tree_cpu_seconds() - cpu, "peak_mib": peak_mib()}
                torch.save(result_D, line.strip())
                print(json.dumps(row), file=answers, flush=True)

    (WAYS | RECORD_WAYS)[way](Task.load(path), path, loop)


if __name__ == "__main__":
    main()
