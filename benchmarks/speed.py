"""How fast drencoder is, beside plain PEFT, Apple's pfl and Flower's simulation, and how it grows. One JSON, one page.

    python benchmarks/speed.py [--part cpu growth quickstart] [--json docs/results/speed.json] [--page docs/results/speed.md]
    python benchmarks/speed.py --part cpu --model embedded --clients 1 8 64 512 --pfl-python pfl-env/bin/python
    python benchmarks/speed.py --part cpu --model path/to/SmolLM2-135M --clients 8 64 --records 4
    python benchmarks/speed.py --part published --shape llama-7b --dolly databricks-dolly-15k.jsonl --device cuda --dtype bfloat16
    python benchmarks/speed.py --page docs/results/speed.md --json docs/results/speed.json --part   (the page again)
    python benchmarks/speed.py --smoke

Each call adds its parts to the JSON and takes the place of older ones of the same kind. The GPU's part is `benchmarks/gpu.py`. pfl 0.6
needs an older dp-accounting than drencoder and therefore an environment of its own. One thread, processes that take turns, medians;
nothing is asserted but that all compute the same update.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed_parts.compare import compare, installed_ways
from speed_parts.growth import TABLES, growth, run_alone
from speed_parts.machine import describe_machine
from speed_parts.page import write_page
from speed_parts.published import SHAPES, published, tiny_dolly

_PARTS = ("cpu", "growth", "quickstart", "published")


def run_cpu(args: argparse.Namespace, report: dict[str, Any]) -> None:
    pythons = {"pfl": args.pfl_python}
    ways, missing = installed_ways(pythons)
    ways = [way for way in ways if not args.ways or any(way.startswith(chosen) for chosen in args.ways)]
    print(*missing, sep="\n")
    for clients in args.clients:
        row = compare(args.model, clients, args.records, args.repeats, ways, pythons)
        same = ("model", "clients", "records")
        report["cpu"] = [old for old in report.get("cpu", []) if [old[k] for k in same] != [row[k] for k in same]] + [
            row
        ]
        print(
            f"{row['model']}, {clients} clients x {args.records} records, {row['tokens']:,} tokens, load {row['machine']['load']}"
        )
        _save(args.json, report)
        for way in row["ways"]:
            print(
                f"  {way['way']:30} {way['wall_s']:8.2f} s wall {way['cpu_s']:8.2f} s CPU  {way['speed_cpu']:5.2f} of plain PEFT "
                f"(CPU), {way['speed_wall']:5.2f} (wall)  {way['peak_mib']:6.0f} MiB  {way['difference']:.0e}",
                flush=True,
            )


def run_published(args: argparse.Namespace, report: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dolly = args.dolly or tiny_dolly(Path(folder) / "made-up.jsonl")
        row = published(
            args.shape, dolly, args.tokenizer, epochs=args.epochs, rounds=args.rounds, max_tokens=args.max_tokens,
            device=args.device, dtype=args.dtype,
        )  # fmt: skip
    row["data"] = "Dolly" if args.dolly else "400 made-up records"
    same = ("shape", "epochs", "device", "data")
    report["published"] = [
        old for old in report.get("published", []) if [old[k] for k in same] != [row[k] for k in same]
    ] + [row]
    print(f"{args.shape}: {row['round_wall_s']:.1f} s a round, {row['whole_s'] / 60:.1f} minutes for 20 rounds")


def _save(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def smoke(args: argparse.Namespace) -> None:
    """The smallest size of every part, in about half a minute; writes nothing but what is asked for."""
    args.model, args.clients, args.records, args.repeats, args.ways = (
        "embedded",
        [2],
        1,
        1,
        args.ways or ["plain", "drencoder"],
    )
    args.shape, args.rounds, args.max_tokens, args.dolly = "small", 1, 64, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=_PARTS, default=["cpu", "growth", "quickstart"])
    parser.add_argument("--model", default="embedded", help="embedded, or a model's folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--records", type=int, default=8, help="of a client")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", help="only ways whose names begin so; plain PEFT must be among them")
    parser.add_argument(
        "--pfl-python", default=sys.executable, help="interpreter of an environment with pfl, torch and peft"
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="of the part growth")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dolly", type=Path, help="databricks-dolly-15k.jsonl; without it made-up records are used")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: the embedded model's")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size of everything")
    args = parser.parse_args()
    if args.smoke:
        smoke(args)
        args.part = _PARTS
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    if "cpu" in args.part:
        run_cpu(args, report)
    if "growth" in args.part:
        tables = ("population", "encoders", "clients") if args.smoke else args.tables
        for name, rows in growth(tables, smoke=args.smoke):
            report.setdefault("growth", {})[name] = {"rows": rows, "machine": describe_machine()}
            print(name, *rows, sep="\n  ", flush=True)
            _save(args.json, report)  # after every table, so that nothing is lost
    if "quickstart" in args.part:
        short = ["federation.rounds=2", "federation.population=300"] if args.smoke else []
        report["quickstart"] = run_alone("rounds", *short) | {"machine": describe_machine()}
    if "published" in args.part:
        run_published(args, report)
    _save(args.json, report)
    if args.page or args.smoke:
        page = write_page(report)
        if args.page:
            args.page.write_text(page)


if __name__ == "__main__":
    main()
