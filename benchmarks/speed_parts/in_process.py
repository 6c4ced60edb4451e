"""One measurement in this process: `python -m speed_parts.in_process WHAT ARGUMENTS`, one line of JSON.

`rounds KEY=VALUE ...`  a run of the quickstart with these knobs: seconds of its median round, and peak memory
`plan KEY=VALUE ...`    its plan, and drawing one cohort
`encoders SIZE`         encoding and decoding one update of SIZE values, beside copying it once
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_parts.machine import peak_mib

_TENSOR = (8, 4096)


class _Watch:
    """Notes when each round was done."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.peaks: list[float] = []
        self.values: int | None = None

    def planned(self, overview: Any) -> None:
        self.values = overview.adapter_size

    def say(self, text: str) -> None: ...

    def round_done(self, row: Mapping[str, Any]) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))
        self.peaks.append(peak_mib())

    def finished(self, certificate: Mapping[str, Any]) -> None: ...


def rounds(overrides: Sequence[str]) -> dict[str, Any]:
    import torch

    from drencoder import load_recipe, run

    torch.set_num_threads(1)
    watch, begun = _Watch(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run(load_recipe("quickstart", list(overrides)), Path(folder) / "run", watch)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(watch.marks, watch.marks[1:], strict=False)]
    return {
        "adapter_values": watch.values,
        "round_wall_s": statistics.median(step[0] for step in steps),
        "round_cpu_s": statistics.median(step[1] for step in steps),
        "run_wall_s": time.perf_counter() - begun,
        "rounds_peak_mib": watch.peaks[-1],
        "peak_mib": peak_mib(),
    }


def plan(overrides: Sequence[str]) -> dict[str, Any]:
    from drencoder.privacy.sampling import KEY_BYTES
    from drencoder.recipe.recipe import load_recipe
    from drencoder.runs.plan_overview import survey

    recipe = load_recipe("quickstart", list(overrides))
    begun, cpu = time.perf_counter(), time.process_time()
    made = survey(recipe).privacy
    planned, planned_cpu = time.perf_counter(), time.process_time()
    cohort = made.sampler(bytes(KEY_BYTES)).cohort(1)
    return {
        "plan_wall_s": planned - begun,
        "plan_cpu_s": planned_cpu - cpu,
        "cohort_ms": 1000 * (time.perf_counter() - planned),
        "cohort": len(cohort),
        "peak_mib": peak_mib(),
    }


def encoders(size: int, repeats: int = 7) -> dict[str, Any]:
    import torch

    from drencoder.encoders.random_sketch import RandomSketch
    from drencoder.models.adapter_layout import Segment
    from drencoder.privacy.noise_source import SecureNoise
    from drencoder.published.architectures import fresh_network
    from drencoder.published.autoencoder import Autoencoder
    from drencoder.secure_aggregation.quantise import Quantiser

    torch.set_num_threads(1)
    step = _TENSOR[0] * _TENSOR[1]
    segments = tuple(Segment(f"tensor{start // step}", start, _TENSOR) for start in range(0, size, step))
    generator = torch.Generator().manual_seed(0)
    update_1D, target_1D = torch.randn(1, size, generator=generator), torch.zeros(1, size)
    sketch = RandomSketch.build(segments, size // 64)
    network = fresh_network("autoencoder", generator)
    learned = Autoencoder(segments, network, torch.ones(len(segments)))
    code_1K, learned_1K = sketch.encode(update_1D, 0), learned.encode(update_1D, 0)

    def noise_of(values: int) -> Any:
        return Quantiser.fine(values=values, clip_l2=1.0, noise_multiplier=1.0).noise(SecureNoise().words())

    operations: dict[str, Callable[[], Any]] = {
        "copy": lambda: target_1D.copy_(update_1D),
        "random encode": lambda: sketch.encode(update_1D, 1),
        "random decode": lambda: sketch.decode(code_1K, 1),
        "noise of a code": lambda: noise_of(size // 64),
        "noise of an update": lambda: noise_of(size),
        "autoencoder encode": lambda: learned.encode(update_1D, 1),
        "autoencoder decode": lambda: learned.decode(learned_1K, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for turn in range(repeats + 1):
        for name, operation in operations.items():
            begun = time.process_time()
            operation()
            if turn:  # the first is the warm-up
                seconds[name].append(time.process_time() - begun)
    return {"values": size, "ms": {name: 1000 * statistics.median(times) for name, times in seconds.items()}}


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    row = encoders(int(arguments[0])) if what == "encoders" else {"rounds": rounds, "plan": plan}[what](arguments)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
