"""Cohort-parallel against client-by-client local training, on the embedded model.

    python benchmarks/cohort_training.py [--clients 64] [--threads 1] [--repeats 5] [--json FILE]

Prints medians of interleaved repeats and the ratio pair by pair. Asserts nothing about time.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from drencoder.models.cohort_training import cohort_updates
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.build import build

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # plain PEFT, as the tests compare with it

from peft_reference import client_update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    overrides = [f"model.source={args.model}", "evaluation.examples=8", "evaluation.questions=8"]
    recipe = load_recipe(None, overrides)
    torch.set_num_threads(args.threads)
    components = build(recipe)
    clients = [components.texts.client(number, 1) for number in range(args.clients)]
    seeds, start_D = [0] * args.clients, components.lora.initial_D
    widths = (8, 32, 64)

    def one_by_one() -> torch.Tensor:
        return torch.stack([client_update(components.lora, start_D, examples, recipe.local, 0) for examples in clients])

    def together(width: int) -> torch.Tensor:
        parts = range(0, args.clients, width)
        return torch.cat(
            [
                cohort_updates(components.lora, start_D, clients[i : i + width], recipe.local, seeds[i : i + width])
                for i in parts
            ]
        )

    ways = {"one by one (PEFT)": one_by_one} | {f"{w} together": (lambda w=w: together(w)) for w in widths}
    results = {name: way() for name, way in ways.items()}  # warm-up, and the proof that they agree
    reference = results["one by one (PEFT)"]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)

    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(seconds["one by one (PEFT)"], seconds[name], strict=True)]
        rows.append(
            {
                "way": name,
                "ms_per_client": 1000 * statistics.median(seconds[name]) / args.clients,
                "times_faster": statistics.median(ratios),
                "largest_relative_difference": float(
                    ((results[name] - reference).norm(dim=1) / reference.norm(dim=1)).max()
                ),
            }
        )
    table = Table(
        "way",
        "ms a client",
        "times faster",
        "largest difference",
        title=f"{args.clients} clients, {args.threads} thread(s)",
    )
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['ms_per_client']:.2f}",
            f"{row['times_faster']:.2f}",
            f"{row['largest_relative_difference']:.1e}",
        )
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"threads": args.threads, "clients": args.clients, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
