"""Forty sites whose patients have twelve records each: what can be learned if a site, a patient or a record is protected?

    python benchmarks/silos.py [--sites 40] [--patients 25] [--records 12] [--epsilon 4] [--seeds 0] [--arms ...] [--json FILE]
    python benchmarks/silos.py --model FOLDER --data notes.jsonl --site-field ward --owner-field patient --held-out FILE
    python benchmarks/silos.py --model FOLDER --speeches speeches.jsonl [--patients 6] [--minutes 45] ...

Every arm has the same text, rounds and optimiser, and the plan's noise for its own unit at one epsilon. The text is of the embedded
world, written to a file with a site and a patient in every record, or a file of your own, or real speeches of which a role is the
patient. The server's rate is the one that each arm's plan gives, or the same for all with `--learning-rate`. Prints a table and writes JSON.

A control has the same noise and nothing else: `--noise-alone` runs the arms with clients and units that all send zero. Noise can lower a
model's loss by itself, if the model is too sure.

Held-out losses are compared in pairs, text by text: with the base model, and with the first arm that protects a site as a whole.
`--minutes` starts no further arm that would end after them, if it took as long as the last; `--only-plans` prints what each arm's plan says
of rounds and rates, and trains nothing.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from drencoder import Recipe, load_recipe, run
from drencoder.evaluation.statistics import loss_difference
from drencoder.federated.in_process import InProcessEngine
from drencoder.federated.server_rate import planned_rate
from drencoder.runs.plan_overview import privacy_plan

_GATHER = InProcessEngine.gather
_TOLD = (
    "sites", "patients", "records", "rounds", "rate", "ratio", "learning_rate", "epsilon", "mean_records", "site_records", "split", "noise_alone", "set",
)  # fmt: skip
EMBEDDED = [
    "encoder.name=random", "server.optimizer=fedadam", "server.momentum=0.9", "server.final_share=0.05",
    "evaluation.benchmarks=['mmlu=embedded']",
]  # fmt: skip
_SECURE = ["privacy.trust=secure-aggregation"]
_LOCAL = ["privacy.trust=local"]
_WHOLE_SITE = ["privacy.unit=client", "federation.sampling_rate=1"]
ARMS: dict[str, list[str]] = {
    "a site as a whole, secure aggregation": [*_WHOLE_SITE, *_SECURE],
    "a site as a whole, every site adds full noise": [*_WHOLE_SITE, *_LOCAL],
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


def write_speeches(speeches: Path, data: Path, held_out: Path, sites: int, records: int, split: str) -> None:
    """Writes real speeches (JSONL: client, text) as JSONL: fields text, ward, patient. A patient is a role, of which at most `records` speeches
    are kept; a hash of the role's name under the key `split`, and nothing else, says at which site it is, or that it is among the tenth
    that is held out.
    """
    spoken: dict[str, list[str]] = {}
    for line in speeches.read_text("utf-8").splitlines():
        row = json.loads(line)
        spoken.setdefault(row["client"].upper(), []).append(row["text"])
    with data.open("w") as trained, held_out.open("w") as kept:
        for role, texts in spoken.items():
            number = int.from_bytes(hashlib.blake2b(role.encode(), digest_size=8, key=split.encode()).digest())
            texts = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=b"silos").digest())[:records]
            for text in texts:
                row = {"text": text, "ward": f"w{number // 10 % sites:02}", "patient": role}
                (kept if number % 10 == 0 else trained).write(json.dumps(row) + "\n")


def recipe_of(name: str, seed: int, args: argparse.Namespace, data: Path) -> Recipe:
    """The recipe of an arm: the defaults, but for the embedded model, which has a code and a falling rate that were tuned for it."""
    embedded = args.model == "embedded"
    client = "privacy.unit=client" in ARMS[name]
    units = {"owner": args.patients, "record": args.patients * (args.mean_records or args.records)}
    unit = next(setting.partition("=")[2] for setting in ARMS[name] if setting.startswith("privacy.unit"))
    return load_recipe(
        "quickstart" if embedded else None,
        [
            f"seed={seed}", f"model.source={args.model}", f"data.source={data}", f"data.client_field={args.site_field}",
            f"data.owner_field={args.owner_field}", f"data.examples_per_client={args.site_records if client else args.records}",
            f"federation.population={args.sites}", f"federation.sampling_rate={args.rate}", f"federation.rounds={args.rounds}",
            f"federation.nodes={args.sites}", f"federation.units_per_site={units.get(unit, 0)}", "prior.source=none",
            f"encoder.ratio={args.ratio}", f"privacy.epsilon={args.epsilon}", "privacy.delta=1e-5",
            "privacy.participation_cap=1000", *(EMBEDDED if embedded else []),
            f"server.learning_rate={args.learning_rate}", f"evaluation.data={args.held_out}", "evaluation.every=0",
            *ARMS[name], *args.set,
        ],
    )  # fmt: skip


def planned(name: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What an arm's plan says, before anything is trained. `gain`: rate times rounds times the root of k*, to which what is learned goes along."""
    plan = privacy_plan(recipe)
    rate, k_star = planned_rate(recipe.server, plan), plan.k_star()
    return {
        "arm": name, "seed": seed, "units": plan.units, "sampling_rate": plan.sampling_rate, "rounds": plan.rounds,
        "noise": plan.noise_multiplier, "k_star": k_star, "rate": rate, "gain": rate * plan.rounds * k_star**0.5,
    }  # fmt: skip


@dataclass(frozen=True)
class ZeroTrainer:
    """A `ClientTrainer` whose clients have nothing to say."""

    batch_clients: int

    def train_clients(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        return torch.zeros(len(clients), epochs * adapter_D.numel())


def gather_zeros(engine: InProcessEngine, *asked: Any) -> Any:
    """Like `InProcessEngine.gather`, but every client and every unit of a site sends the zero update."""
    zero = ZeroTrainer(engine.trainer.batch_clients)
    curator = None if engine.curator is None else replace(engine.curator, trainer=zero)
    return _GATHER(replace(engine, trainer=zero, curator=curator), *asked)


def run_arm(recipe: Recipe, folder: Path, noise_alone: bool) -> dict[str, Any]:
    """One run: its epsilons, and what base model and run reach, text by text."""
    started, cpu = time.perf_counter(), time.process_time()
    with mock.patch.object(InProcessEngine, "gather", gather_zeros if noise_alone else _GATHER):
        finished = run(recipe, folder / f"{len(list(folder.iterdir()))}")
    certificate = finished.certificate
    outcomes = json.loads((finished.folder / "outcomes.json").read_text("utf-8"))
    return {
        "results": certificate["results"], "statement": certificate["statement"],
        "epsilon": {key: row["epsilon_pld"] for key, row in certificate["observers"].items()},
        "outcomes": {who: {key: outcomes[who][key] for key in ("losses", "targets")} for who in ("base model", "this run")},
        "uploaded": certificate["bytes"]["uploaded"], "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


def compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The paired differences of an arm's held-out loss, nats a token, with a 95 % bootstrap over texts: {other: difference}."""
    site = next((one for one in rows if one["arm"].startswith("a site") and one["seed"] == row["seed"]), row)
    others = {"base model": row["outcomes"]["base model"]}
    if site is not row:
        others[site["arm"]] = site["outcomes"]["this run"]
    own = row["outcomes"]["this run"]
    return {
        name: asdict(loss_difference(other["losses"], own["losses"], own["targets"], seed=0))
        for name, other in others.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 40), ("patients", 25), ("records", 12), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--site-records", type=int, help="of a site that is protected as a whole, in a round; default: 4 patients'"
    )
    parser.add_argument("--mean-records", type=int, help="that everybody takes a patient to have; default: --records")
    for name, number in (("epsilon", 4.0), ("rate", 0.3), ("ratio", 64.0), ("learning-rate", 0.0)):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, help="a file of your own; default: the embedded world's text")
    parser.add_argument(
        "--speeches", type=Path, help="a file of speeches (JSONL: client, text): each role is a patient"
    )
    parser.add_argument("--split", default="silos", help="the key of the hash that says where a role is")
    parser.add_argument("--only-plans", action="store_true")
    parser.add_argument("--noise-alone", action="store_true")
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
    arguments = {key: value for key, value in vars(args).items() if key in _TOLD}
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "notes.jsonl"
        if args.speeches is not None:
            args.held_out = Path(temporary) / "held-out.jsonl"
            write_speeches(args.speeches, data, args.held_out, args.sites, args.records, args.split)
        elif args.data is None:
            write_world(data, args.sites, args.patients, args.records)
        folder = Path(temporary) / "runs"
        folder.mkdir()
        for seed in args.seeds:
            for arm in args.arms:
                if rows and time.perf_counter() - started + rows[-1]["seconds"] > 60 * args.minutes:
                    print(f"{arm}, seed {seed}: not run, for lack of time", flush=True)
                    continue
                recipe = recipe_of(arm, seed, args, data)
                plan = planned(arm, seed, recipe)
                if args.only_plans:
                    print(json.dumps(plan), flush=True)
                    continue
                row = plan | run_arm(recipe, folder, args.noise_alone)
                rows.append(row)
                print(f"{arm}, seed {seed}: {row['seconds']:.0f} s, of one core {row['cpu_seconds']:.0f} s", flush=True)
                if args.json:
                    told = [one | {"differences": compare(one, rows)} for one in rows]
                    args.json.write_text(json.dumps({"arguments": arguments, "arms": told}, indent=1) + "\n")
    if rows:
        print(table(rows, args.epsilon))


def table(rows: list[dict[str, Any]], epsilon: float) -> str:
    """The table of the results page."""
    lines = [
        f"| what is protected at epsilon {epsilon:g} | N | q | noise | k* | rate | held-out loss | accuracy | less than the base model | less than the "
        "site's | server | public |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        f"| the model before training | - | - | - | - | - | {_scores(rows[0]['results']['base model'])} | - | - | - | - |",
    ]
    for row in rows:
        base, site = [*compare(row, rows).values(), None][:2]
        lines.append(
            f"| {row['arm']} | {row['units']:,} | {row['sampling_rate']:g} | {row['noise']:.2f} | {row['k_star']:,.1f} | {row['rate']:.4f} | "
            f"{_scores(row['results']['this run'])} | {_gain(base)} | {_gain(site)} | {float(row['epsilon']['server']):.2f} | "
            f"{float(row['epsilon']['public']):.2f} |"
        )
    return "\n".join(lines)


def _gain(difference: dict[str, Any] | None) -> str:
    """How much lower, with the interval."""
    if difference is None:
        return "-"
    return f"{-difference['value']:+.3f} ({-difference['high']:+.3f} to {-difference['low']:+.3f})"


def _scores(result: dict[str, Any]) -> str:
    accuracy = ", ".join(f"{one['value']:.2f}" for one in result["accuracy"].values()) or "-"
    return f"{result['loss']['value']:.3f} | {accuracy}"


if __name__ == "__main__":
    main()
