"""The three leakages over several seeds: pooled AUC per attack and arm, as a table and as JSON.

    python benchmarks/leakages.py [--seeds 0 1 2] [--clients 64] [--trials 32] [--train-steps 200] [--set KEY=VALUE]
                                  [--processes 1] [--json FILE]

Each seed draws other clients, trains its own encoders and has its own noise. The table has the mean over seeds, the smallest
lower and the largest upper end of the seeds' 95 % intervals, and how often a bound was passed.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

Cell = tuple[int, int, int, int, tuple[str, ...]]


def run_cell(cell: Cell) -> dict[str, Any]:
    """One seed, in a process of its own with one thread."""
    seed, clients, trials, train_steps, overrides = cell
    os.environ["OMP_NUM_THREADS"] = "1"
    from leakage_study.leakages import audit_leakages

    from drencoder import load_recipe  # torch is loaded in the worker, after the thread count is set
    from drencoder.runs.build import build

    quick = ["evaluation.examples=8"]
    live = build(load_recipe("quickstart", [*quick, *overrides]))
    started = time.perf_counter()
    audit = audit_leakages(live, clients=clients, seed=seed, trials=trials, train_steps=train_steps)
    return audit.to_dict() | {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the tables again, for a results page")
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.clients, args.trials, args.train_steps = [0], 8, 8, 2
    cells = [(seed, args.clients, args.trials, args.train_steps, tuple(args.set)) for seed in args.seeds]
    audits = []
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        for audit in pool.imap(run_cell, cells):
            audits.append(audit)
            if args.json:  # after every seed, so that nothing is lost
                args.json.write_text(json.dumps({"overrides": args.set, "audits": audits}, indent=1) + "\n", "utf-8")
    print_table(audits)
    if args.markdown:
        args.markdown.write_text(markdown(audits), "utf-8")


def print_table(audits: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=180)
    for leakage in dict.fromkeys(finding["leakage"] for finding in audits[0]["findings"]):
        table = Table("arm", "the attacker sees", "attack", "AUC", "max AUC", "found", "exposed", title=leakage)
        for key, rows in rows_by_attack(audits, leakage).items():
            aucs, bounds = [row["auc"] for row in rows], [row["max_auc"] for row in rows]
            mean, found = sum(auc["value"] for auc in aucs) / len(aucs), [row["tokens_found"] for row in rows]
            interval = f"{min(auc['low'] for auc in aucs):.3f}, {max(auc['high'] for auc in aucs):.3f}"
            table.add_row(
                *key,
                f"{mean:.3f} \\[{interval}]",
                "-" if None in bounds else f"{max(bounds):.3f}",
                "" if None in found else f"{sum(found) / len(found):.0%}",
                "" if None in bounds else f"{sum(row['exposed'] for row in rows)} of {len(rows)}",
            )
        console.print(table)
    for audit in audits:
        example = audit["example"]
        console.print(f"seed {audit['facts']['seed']}: {audit['seconds']:.0f} s", markup=False)
        console.print(f"  text: {example['text']!r}\n  read: {example['recovered']}", markup=False)


def markdown(audits: list[dict[str, Any]]) -> str:
    """One table per leakage: mean AUC over seeds, then every seed's."""
    parts = []
    for leakage in dict.fromkeys(finding["leakage"] for finding in audits[0]["findings"]):
        parts += ["", f"### {leakage}", "", "| arm | the attacker sees | attack | AUC (seeds) | max AUC | found |"]
        parts.append("|---|---|---|---|---|---|")
        for key, rows in rows_by_attack(audits, leakage).items():
            aucs, found = [row["auc"]["value"] for row in rows], [row["tokens_found"] for row in rows]
            bounds = [row["max_auc"] for row in rows]
            cells = [*key, f"{sum(aucs) / len(aucs):.2f} ({' '.join(f'{auc:.2f}' for auc in aucs)})"]
            cells.append("-" if None in bounds else f"{max(bounds):.2f}")
            cells.append("" if None in found else f"{sum(found) / len(found):.0%}")
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts).lstrip() + "\n"


def rows_by_attack(audits: list[dict[str, Any]], leakage: str) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(arm, sees, attack) -> the findings of all seeds; the size of the smallest cohort differs between seeds."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for audit in audits:
        for finding in audit["findings"]:
            sees = "sum over a cohort" if finding["sees"].startswith("sum of") else finding["sees"]
            if finding["leakage"] == leakage:
                rows.setdefault((finding["arm"], sees, finding["attack"]), []).append(finding)
    return rows


if __name__ == "__main__":
    main()
