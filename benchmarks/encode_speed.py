"""Encode and decode time and memory per encoder, against one memory pass (a copy in place) over the update.

    OMP_NUM_THREADS=1 python benchmarks/encode_speed.py --size 8388608 --threads 1 --json encode_speed.json
    OMP_NUM_THREADS=1 python benchmarks/encode_speed.py --size 8388608 --fit 2

With `--fit STEPS` it measures instead the training of each auto-encoder at batch 1: seconds, and the peak memory beside
that of one bare forward and backward pass of the network; the difference is what the training set and the loop cost.

Repeats are interleaved (every operation once, then again), so that a busy moment of the machine hits all alike;
printed are medians. Nothing is asserted. The auto-encoders' weights are untrained: their speed does not depend on them.

Legend: N = 1 client, D adapter values.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.models.adapter_layout import Segment
from drencoder.published.architectures import ARCHITECTURES, fresh_network
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions

DEFAULT_SIZES = (8_388_608, 131_072)  # LLaMA-7B with r = 8 on q, k, v, o; a small model
TENSOR = (8, 4096)
# The unit. A clone would also pay for fresh pages, or not, as the allocator pleases: 3 to 24 ms for 32 MiB.
UNIT = "memory pass: copy"


def segments_of(size: int) -> tuple[Segment, ...]:
    """LoRA-like tensors of 8 x 4096 values, the last one smaller if need be."""
    step = TENSOR[0] * TENSOR[1]
    full = [Segment(f"tensor{start // step}", start, TENSOR) for start in range(0, size - step + 1, step)]
    rest = size - len(full) * step
    return tuple(full) + ((Segment("rest", size - rest, (rest,)),) if rest else ())


def encoders_of(size: int) -> dict[str, Encoder]:
    segments = segments_of(size)
    encoders: dict[str, Encoder] = {
        "identity": IdentityEncoder(segments),
        "random": RandomSketch.build(segments, max(1, size // 64)),
    }
    for name in ARCHITECTURES:
        network = fresh_network(name, torch.Generator().manual_seed(0))
        encoders[f"autoencoder {name}"] = Autoencoder(segments, network, torch.ones(len(segments)), name)
    return encoders


def peak_mib(operation: Callable[[], Any]) -> float | None:
    """Growth of resident memory while `operation` runs, its result included; None where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        operation()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(size: int, repeats: int) -> list[dict[str, Any]]:
    """One row per operation: median seconds, ratio to a copy, peak memory."""
    generator = torch.Generator().manual_seed(0)
    update_ND = torch.randn(1, size, generator=generator)
    operations: dict[str, Callable[[], Any]] = {}
    target_ND = torch.zeros_like(update_ND)
    operations[UNIT] = lambda: target_ND.copy_(update_ND)
    operations["memory pass: clone"] = update_ND.clone
    operations["memory pass: sum"] = update_ND.sum
    for name, encoder in encoders_of(size).items():
        code_NK = encoder.encode(update_ND, 0)
        operations[f"{name}: encode"] = lambda e=encoder: e.encode(update_ND, 1)
        operations[f"{name}: decode"] = lambda e=encoder, c=code_NK: e.decode(c, 1)
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for operation in operations.values():
        operation()  # warm-up
    for _ in range(repeats):
        for name, operation in operations.items():
            start = time.perf_counter()
            operation()
            seconds[name].append(time.perf_counter() - start)
    unit = statistics.median(seconds[UNIT])
    return [
        {
            "size": size,
            "operation": name,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "copies": statistics.median(times) / unit,
            "peak_mib": peak_mib(operations[name]),
        }
        for name, times in seconds.items()
    ]


def measure_fit(size: int, steps: int) -> list[dict[str, Any]]:
    """One row per architecture: `steps` training steps at batch 1 on a training set of 10^4 drawn gradients (eager, these
    would take 40,000 bytes per adapter value), one of validation, against one pass of the network alone."""
    segments = segments_of(size)
    prior = GaussianPrior.isotropic(segments)
    rows = []
    for name in ARCHITECTURES:
        network = fresh_network(name, torch.Generator().manual_seed(0))
        values = torch.zeros(1, *ARCHITECTURES[name].input_shape(size))
        bare = peak_mib(lambda n=network, v=values: n(v).square().mean().backward())
        del network, values
        options = AutoencoderOptions(steps=steps, batch=1, check_every=steps, architecture=name)
        start = time.perf_counter()
        whole = peak_mib(
            lambda o=options: Autoencoder.fit(segments, prior.sample(10_000, 1), prior.sample(1, 2), seed=0, options=o)
        )
        seconds = time.perf_counter() - start
        rows.append(
            {
                "size": size,
                "operation": f"fit {name}",
                "steps": steps,
                "seconds": seconds,
                "peak_mib": whole,
                "network_mib": bare,
            }
        )
    return rows


def print_fit(rows: list[dict[str, Any]]) -> None:
    print(f"{'training at batch 1':24}{'s':>10}{'peak MiB':>12}{'network MiB':>14}")
    for row in rows:
        peaks = ["?" if row[key] is None else f"{row[key]:.0f}" for key in ("peak_mib", "network_mib")]
        print(f"{row['operation']:24}{row['seconds']:10.1f}{peaks[0]:>12}{peaks[1]:>14}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="adapter values; may be given more than once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fit", type=int, default=0, metavar="STEPS", help="measure training instead")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for size in arguments.size or DEFAULT_SIZES:
        what = f"{arguments.fit} steps" if arguments.fit else f"median of {arguments.repeats}"
        print(f"\nupdate of {size:,} values, {arguments.threads} thread(s), {what}")
        if arguments.fit:
            rows += measure_fit(size, arguments.fit)
            print_fit(rows[-len(ARCHITECTURES) :])
            continue
        print(f"{'operation':24}{'ms':>12}{'x copy':>10}{'peak MiB':>10}")
        for row in measure(size, arguments.repeats):
            peak = "?" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
            print(f"{row['operation']:24}{row['median_s'] * 1e3:12.3f}{row['copies']:10.1f}{peak:>10}")
            rows.append(row)
    if arguments.json:
        machine = {"platform": platform.platform(), "processor": platform.processor(), "torch": torch.__version__}
        report = {"machine": machine, "threads": arguments.threads, "repeats": arguments.repeats, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
