"""Forty sites whose patients have twelve records each: what can be learned if a site, a patient or a record is protected?

    python benchmarks/silos.py [--sites 40] [--patients 25] [--records 12] [--epsilon 4] [--seeds 0] [--arms ...] [--json FILE]
    python benchmarks/silos.py --model FOLDER --data notes.jsonl --site-field ward --owner-field patient --held-out FILE
    python benchmarks/silos.py --model FOLDER --speeches speeches.jsonl [--patients 6] [--minutes 45] ...

Every arm has the same text, rounds and optimiser, and the plan's noise for its own unit at one epsilon. The text is of the embedded
world, written to a file with a site and a patient in every record, or a file of your own, or real speeches of which a role is the
patient. Prints a table and writes JSON. `--minutes` starts no further arm that would end after them, if it took as long as the last.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
_SECURE = ["privacy.trust=secure-aggregation"]
_LOCAL = ["privacy.trust=local"]
ARMS: dict[str, list[str]] = {
    "a site as a whole, secure aggregation": ["privacy.unit=client", "federation.sampling_rate=1", *_SECURE],
    "a patient, secure aggregation": ["privacy.unit=owner", *_SECURE],
    "a patient, every site adds full noise": ["privacy.unit=owner", *_LOCAL],
    "a record, secure aggregation": ["privacy.unit=record", *_SECURE],
}


def write_world(path: Path, sites: int, patients: int, records: int) -> None:
    """Writes what each patient teaches as JSONL: fields instruction, response, category, ward, patient."""
    from drencoder.data.embedded_world.world import World

    world = World(0)
    with path.open("w") as file:
        for site in range(sites):
            for patient in range(patients):
                number = site * patients + patient
                for record in world.client_records(number, count=records, alpha=0.5, seed=7):
                    file.write(json.dumps({**record, "ward": f"w{site:02}", "patient": f"p{patient:03}"}) + "\n")


def write_speeches(speeches: Path, data: Path, held_out: Path, sites: int, records: int) -> None:
    """Writes real speeches (JSONL: client, text) as JSONL: fields text, ward, patient. A patient is a role, of which at most `records` speeches
    are kept; a keyed hash of the role's name, and nothing else, says at which site it is, or that it is among the tenth that is held out.
    """
    spoken: dict[str, list[str]] = {}
    for line in speeches.read_text("utf-8").splitlines():
        row = json.loads(line)
        spoken.setdefault(row["client"].upper(), []).append(row["text"])
    with data.open("w") as trained, held_out.open("w") as kept:
        for role, texts in spoken.items():
            number = int.from_bytes(hashlib.blake2b(role.encode(), digest_size=8, key=b"silos").digest())
            texts = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=b"silos").digest())[:records]
            for text in texts:
                row = {"text": text, "ward": f"w{number // 10 % sites:02}", "patient": role}
                (kept if number % 10 == 0 else trained).write(json.dumps(row) + "\n")


def run_arm(name: str, seed: int, args: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """One run: its plan, its epsilons, and what base model and run reach."""
    from drencoder import load_recipe, run
    from drencoder.runs.plan_overview import privacy_plan

    client = "privacy.unit=client" in ARMS[name]
    units = {"owner": args.patients, "record": args.patients * (args.mean_records or args.records)}
    unit = next(setting.partition("=")[2] for setting in ARMS[name] if setting.startswith("privacy.unit"))
    recipe = load_recipe(
        "quickstart",
        [
            f"seed={seed}", f"model.source={args.model}", f"data.source={data}", f"data.client_field={args.site_field}",
            f"data.owner_field={args.owner_field}", f"data.examples_per_client={args.site_records if client else args.records}",
            f"federation.population={args.sites}", f"federation.sampling_rate={args.rate}", f"federation.rounds={args.rounds}",
            f"federation.nodes={args.sites}", f"federation.units_per_site={units.get(unit, 0)}", "prior.source=none",
            "encoder.name=random", f"encoder.ratio={args.ratio}", f"privacy.epsilon={args.epsilon}", "privacy.delta=1e-5",
            "privacy.participation_cap=1000", "server.optimizer=fedadam", "server.momentum=0.9", "server.final_share=0.05",
            f"server.learning_rate={args.learning_rate}", f"evaluation.data={args.held_out}", "evaluation.every=0",
            *(["evaluation.benchmarks=['mmlu=embedded']"] if args.model == "embedded" else []), *ARMS[name], *args.set,
        ],
    )  # fmt: skip
    plan, started = privacy_plan(recipe), time.perf_counter()
    certificate = run(recipe, folder / f"{len(list(folder.iterdir()))}").certificate
    return {
        "arm": name, "seed": seed, "units": plan.units, "sampling_rate": plan.sampling_rate, "noise": plan.noise_multiplier,
        "k_star": plan.k_star(), "results": certificate["results"], "statement": certificate["statement"],
        "epsilon": {key: row["epsilon_pld"] for key, row in certificate["observers"].items()},
        "uploaded": certificate["bytes"]["uploaded"], "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 40), ("patients", 25), ("records", 12), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--site-records", type=int, help="of a site that is protected as a whole, in a round; default: 4 patients'"
    )
    parser.add_argument("--mean-records", type=int, help="that everybody takes a patient to have; default: --records")
    for name, number in (("epsilon", 4.0), ("rate", 0.3), ("ratio", 64.0), ("learning-rate", 0.02)):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, help="a file of your own; default: the embedded world's text")
    parser.add_argument(
        "--speeches", type=Path, help="a file of speeches (JSONL: client, text): each role is a patient"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="bound of all arms together")
    parser.add_argument("--site-field", default="ward")
    parser.add_argument("--owner-field", default="patient")
    parser.add_argument("--held-out", default="embedded", help="evaluation.data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.sites, args.patients, args.records, args.rounds, args.arms = 10, 2, 2, 1, [list(ARMS)[2]]
        args.set += ["evaluation.examples=8", "privacy.delta=1e-3"]
    args.site_records = args.site_records or 4 * args.records
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "notes.jsonl"
        if args.speeches is not None:
            args.held_out = Path(temporary) / "held-out.jsonl"
            write_speeches(args.speeches, data, args.held_out, args.sites, args.records)
        elif args.data is None:
            write_world(data, args.sites, args.patients, args.records)
        folder = Path(temporary) / "runs"
        folder.mkdir()
        for seed in args.seeds:
            for arm in args.arms:
                if rows and time.perf_counter() - started + rows[-1]["seconds"] > 60 * args.minutes:
                    print(f"{arm}, seed {seed}: not run, for lack of time", flush=True)
                    continue
                rows.append(run_arm(arm, seed, args, data, folder))
                print(f"{arm}, seed {seed}: {rows[-1]['seconds']:.0f} s", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(
        f"\n| what is protected at epsilon {args.epsilon:g} | N | q | noise | k* | held-out loss | accuracy | server | public |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| the model before training | - | - | - | - | {_scores(rows[0]['results']['base model'])} | - | - |")
    for row in rows:
        print(
            f"| {row['arm']} | {row['units']:,} | {row['sampling_rate']:g} | {row['noise']:.2f} | {row['k_star']:,.1f} | "
            f"{_scores(row['results']['this run'])} | {float(row['epsilon']['server']):.2f} | {float(row['epsilon']['public']):.2f} |"
        )


def _scores(result: dict[str, Any]) -> str:
    accuracy = ", ".join(f"{one['value']:.2f}" for one in result["accuracy"].values()) or "-"
    return f"{result['loss']['value']:.3f} | {accuracy}"


if __name__ == "__main__":
    main()
