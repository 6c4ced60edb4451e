"""Codes in fewer bits: bytes, distortion and packing time of every wire type; with --runs, what they cost in loss.

    OMP_NUM_THREADS=1 python benchmarks/code_bits.py [--runs] [--seeds 0 1 2] [--json docs/results/code-bits.json]

The first table packs Gaussian codes (what a random sketch makes of an update), cut to the clip norm and then noised with
the stated noise multiplier, as under local trust; "un-noised" is what travels under central trust.

    distortion  |decoded - code|^2 / |code|^2 (pooled over messages)
    length      |decoded| / |code|: above 1, a server that clips again cuts the message by as much
    kept        <clip(decoded), code> / |code|^2: the share of the client's contribution that is left after that clip
                (un-noised codes only: under local trust nothing is clipped after the noise)

With `--runs`, one run per wire type and seed of `paper/embedded-crowd` (2,000 clients, central trust, epsilon 8, 20 rounds,
random sketch 1/64). The noise is replayed, so that all types of a seed have the same clients, cohorts, sketches and
noise, and differ in the rounding alone; losses are compared in pairs. Such runs are tests and have no guarantee.

Timings are medians of interleaved repeats. Nothing is asserted. Legend: N messages, K code values.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drencoder import load_recipe, run
from drencoder.encoders.wire import WireDtype, WireFormat, pack_rows, unpack_rows
from drencoder.privacy.mechanism import clip_rows

TYPES: tuple[WireDtype, ...] = ("float32", "rotated4", "rotated2", "rotated1")  # what encoder.wire_dtype may name
SIZES = (512, 131_072)  # the embedded model's code at 1/64; LLaMA-7B's (r = 8 on q, k, v, o)
VALUES = 1 << 20  # of a row of the table, in as many messages as that takes
NOISE_MULTIPLIERS = (0.0, 0.5, 1.0, 4.0)
CLIP_L2 = 1.0
RUN = [
    "encoder.name=random",
    "privacy.epsilon=8",
    "privacy.trust=central",
    "privacy.noise=replay",
    "federation.population=2000",
    "federation.rounds=20",
    "server.learning_rate=13.9",  # tuned for float32 on another seed (docs/results/paper-method.md); not again per type
    "evaluation.every=0",
]


def codes(size: int, noise_multiplier: float) -> Tensor:
    """code_NK: clipped Gaussian directions, plus the noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, VALUES // size), size)
    code_NK = clip_rows(torch.randn(shape, generator=generator), CLIP_L2).values_NV
    return code_NK + noise_multiplier * CLIP_L2 * torch.randn(shape, generator=generator)


def distortion(size: int, dtype: WireDtype, noise_multiplier: float) -> dict[str, Any]:
    """One row of the first table."""
    code_NK, wire_format = codes(size, noise_multiplier), WireFormat(size, 0, dtype)
    messages = pack_rows(code_NK, wire_format, 0)
    got_NK = unpack_rows(messages, wire_format, 0).code_NK
    code_NK, got_NK = code_NK.double(), got_NK.double()
    energy = float(code_NK.square().sum())
    row: dict[str, Any] = {
        "size": size,
        "wire_dtype": dtype,
        "noise_multiplier": noise_multiplier,
        "message_bytes": len(messages[0]),
        "distortion": float((got_NK - code_NK).square().sum()) / energy,
        "length": float((got_NK.norm(dim=1) / code_NK.norm(dim=1)).mean()),
        "kept": None,
    }
    if not noise_multiplier:
        row["kept"] = float((clip_rows(got_NK, CLIP_L2).values_NV * code_NK).sum()) / energy
    return row


def timings(size: int, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds to pack and to unpack one code of `size` values, per wire type."""
    code_NK = codes(size, 1.0)[:1]
    operations: dict[tuple[WireDtype, str], Callable[[], Any]] = {}
    for dtype in TYPES:
        wire_format = WireFormat(size, 0, dtype)
        messages = pack_rows(code_NK, wire_format, 0)
        operations[dtype, "pack"] = lambda w=wire_format: pack_rows(code_NK, w, 0)
        operations[dtype, "unpack"] = lambda w=wire_format, m=messages: unpack_rows(m, w, 0)
    seconds: dict[tuple[WireDtype, str], list[float]] = {key: [] for key in operations}
    for _ in range(repeats):
        for key, operation in operations.items():
            start = time.perf_counter()
            operation()
            seconds[key].append(time.perf_counter() - start)
    return [
        {"size": size, "wire_dtype": dtype}
        | {f"{what}_ms": 1e3 * statistics.median(seconds[dtype, what]) for what in ("pack", "unpack")}
        for dtype in TYPES
    ]


def loss_of(dtype: WireDtype, seed: int) -> dict[str, Any]:
    """One run."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("paper/embedded-crowd", [*RUN, f"seed={seed}", f"encoder.wire_dtype={dtype}"])
        certificate = run(recipe, Path(folder) / "run").certificate
    results, sent = certificate["results"], certificate["bytes"]
    return {
        "wire_dtype": dtype,
        "seed": seed,
        "loss": results["this run"]["loss"],
        "accuracy": {name: row["value"] for name, row in results["this run"]["accuracy"].items()},
        "zero_update_loss": results["zero update"]["loss"]["value"],
        "stage1_bytes": sent["stage1"],
        "stage2_bytes": sent["uploaded"] - sent["stage1"],
        "epsilon_public": certificate["observers"]["public"]["epsilon_pld"],
        "seconds": time.perf_counter() - start,
    }


def print_distortion(rows: list[dict[str, Any]]) -> None:
    print(f"{'values':>8} {'type':9}{'noise':>6}{'bytes':>9}{'distortion':>12}{'length':>9}{'kept':>8}")
    for row in rows:
        print(f"{row['size']:8} {row['wire_dtype']:9}{row['noise_multiplier']:6g}{row['message_bytes']:9}", end="")
        print(f"{row['distortion']:12.3g}{row['length']:9.4f}", end="")
        print(f"{'-' if row['kept'] is None else format(row['kept'], '.4f'):>8}")


def print_timings(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'values':>8} {'type':9}{'pack ms':>9}{'unpack ms':>11}")
    for row in rows:
        print(f"{row['size']:8} {row['wire_dtype']:9}{row['pack_ms']:9.2f}{row['unpack_ms']:11.2f}")


def print_runs(rows: list[dict[str, Any]]) -> None:
    """Mean over seeds, and the mean, smallest and largest difference from float32 of the same seed."""
    print(
        f"\n{'type':9}{'runs':>5}{'loss':>9}{'against float32':>17}{'smallest':>10}{'largest':>9}{'stage 2 bytes':>15}"
    )
    exact = {row["seed"]: row["loss"]["value"] for row in rows if row["wire_dtype"] == "float32"}
    for dtype in TYPES:
        of_type = [row for row in rows if row["wire_dtype"] == dtype and row["seed"] in exact]
        if not of_type:
            continue
        losses = [row["loss"]["value"] for row in of_type]
        apart = [row["loss"]["value"] - exact[row["seed"]] for row in of_type]
        print(f"{dtype:9}{len(of_type):5}{statistics.mean(losses):9.4f}{statistics.mean(apart):+17.4f}", end="")
        print(f"{min(apart):+10.4f}{max(apart):+9.4f}{statistics.mean(row['stage2_bytes'] for row in of_type):15,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", action="store_true", help="measure held-out loss too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.runs = 1, False
    torch.set_num_threads(1)
    machine = {"platform": platform.platform(), "processor": platform.processor(), "torch": torch.__version__}
    report: dict[str, Any] = {"machine": machine, "threads": 1, "repeats": args.repeats, "clip_l2": CLIP_L2}
    cells = [
        (size, dtype, noise)
        for size in SIZES[: 1 if args.smoke else None]
        for dtype in TYPES
        for noise in NOISE_MULTIPLIERS
    ]
    report["distortion"] = [distortion(*cell) for cell in cells]
    print_distortion(report["distortion"])
    report["timings"] = timings(SIZES[0 if args.smoke else -1], args.repeats)
    print_timings(report["timings"])
    if args.runs:
        report |= {"overrides": RUN, "runs": []}
    elif args.json and args.json.is_file():  # the runs of an earlier call stay
        known = json.loads(args.json.read_text())
        report |= {key: known[key] for key in ("overrides", "runs") if key in known}
    for seed in args.seeds if args.runs else ():
        for dtype in TYPES:
            report["runs"].append(loss_of(dtype, seed))
            _write(args.json, report)  # after every run, so that nothing is lost
    if args.runs:
        print_runs(report["runs"])
    _write(args.json, report)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
