"""What it costs to clip every record by itself: drencoder's cohort of records beside Opacus and plain PEFT, on the same LoRA layers.

    python benchmarks/per_record.py [--model embedded | FOLDER] [--records 32] [--repeats 7] [--json FILE]

Opacus is no dependency of drencoder: `pip install --no-deps opacus` into the environment that runs this script (measured with
opacus 1.6.0), or into a folder that PYTHONPATH names. Without it the script says so in one sentence and compares the rest. One thread,
processes that take turns, medians; before anything is timed, all ways that clip must have computed the same sum.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from speed_parts.compare import REFERENCE, compare
from speed_parts.record_ways import RECORD_WAYS, UNLIKE

_UNPRIVATE = "PEFT, one batch, nothing clipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, or a model's folder")
    parser.add_argument("--records", type=int, default=32, help="of a batch; each is a client of one record")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="rows of other models and sizes in it are kept")
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.records, args.repeats = 2, 1
    ways = [REFERENCE, "drencoder", *RECORD_WAYS]
    if importlib.util.find_spec("opacus") is None:
        ways.remove("Opacus")
        print(f"Opacus is left out, since it is not installed in {sys.executable}.")
    row = compare(args.model, args.records, 1, args.repeats, ways, {}, unlike=UNLIKE)
    print(f"{row['model']}, {row['clients']} records, {row['tokens']:,} tokens, load {row['machine']['load']}\n")
    print("| way | seconds a step | CPU seconds | time beside one batch | peak memory | sum apart from the reference |")
    print("|---|---|---|---|---|---|")
    print(*map("| {} |".format, map(" | ".join, _cells(row))), sep="\n")
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.is_file() else []
        key = ("model", "clients")
        rows = [old for old in rows if [old[k] for k in key] != [row[k] for k in key]]
        args.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


def _cells(row: dict[str, Any]) -> list[list[str]]:
    speed = {way["way"]: way["speed_cpu"] for way in row["ways"]}
    return [
        [
            way["way"], f"{way['wall_s']:.2f}", f"{way['cpu_s']:.2f}", f"{speed[_UNPRIVATE] / way['speed_cpu']:.2f}",
            f"{way['peak_mib']:.0f} MiB", "another sum" if way["way"] in UNLIKE else f"{way['difference']:.0e}",
        ]
        for way in row["ways"]
    ]  # fmt: skip


if __name__ == "__main__":
    main()
