"""A real model and real text: what the default, other encoders and DP-LoRA learn from three tasks at equal privacy.

    python benchmarks/real_text.py --model FOLDER --data FOLDER --out DIR [--hours 5] [--cells bank dolly/central ...] [--list]
    python benchmarks/real_text.py --out DIR --page [--results docs/results]
    python benchmarks/real_text.py --smoke

A cell is one run: a task, a trust model, an epsilon, an arm, a rate and a seed. Cells are in order of what they tell; each finished one
is a line of DIR/cells.jsonl, so that the same command goes on where it was stopped. No cell is started after --hours. --cells keeps
those whose key begins with one of the texts. --page writes the page, its table and its figure from the cells that are there.

FOLDER of --data has banking77/, dolly/ and shakespeare/ (docs/results/real-text.md says where they are from). All of it is public text, so the
study may look at what no run shows: how much of the clients' own updates each code holds, round by round. --smoke makes two runs of the embedded
model on made-up text in a folder that is thrown away.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from drencoder.recipe.recipe import Recipe
from drencoder.study.cells import Cell, CellStore, Row, Track, loss_of
from drencoder.study.pool import run_cell


@dataclass(frozen=True)
class Size:
    """Of a run: rounds, clients a round on average, records of a client, tokens of a record, held-out texts."""

    rounds: int = 10
    cohort: int = 32
    records: int = 2
    tokens: int = 128
    measured: int = 128


SMOKE = Size(rounds=1, cohort=4, records=1, tokens=32, measured=8)
OWNERS = 10_000  # simulated ones of banking77's questions
SHORT = 400  # characters of a Dolly record, all fields together
RATE = 0.02  # of the server, for all but the default, whose plan chooses; a step of a cell halves or doubles it

_BANK = {"instruction": "text", "response": "category"}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "bank": (
        "banking77: the intent of a customer's question; 10,000 simulated owners of about one each; measured on the file's test part",
        {"data.source": "banking77/train.csv", "data.fields": _BANK, "evaluation.data": "banking77/test.csv"},
    ),
    "dolly": (
        f"databricks-dolly-15k, records of at most {SHORT} characters; simulated owners; measured on 5 % of the records",
        {"data.source": "dolly-short.jsonl"},
    ),
    "shakespeare": (
        "speeches of Tiny Shakespeare; the owner is the role; measured on 10 % of the roles, who are no clients",
        {"data.source": "shakespeare.jsonl", "data.client_field": "client", "data.held_out_share": 0.1},
    ),
}


@dataclass(frozen=True)
class Arm:
    """A method: what it changes in a recipe of model, data, epsilon and trust, and what it is in words."""

    words: str
    knobs: Mapping[str, Any]
    private: bool = True


_WHOLE = {"encoder.name": "identity", "prior.source": "none"}
_PUBLISHED = {"encoder.name": "autoencoder", "encoder.gate": "warn", "privacy.noise_in": "update"}
_FEW = {"federation.sampling_rate": 0.02}
_STEPS = {"local.upload": "increment", "local.epochs": 4, "local.learning_rate": 5e-4, "server.optimizer": "fedavgm"}
ARMS = {
    "hybrid": Arm("the default", {}),
    "dp-lora": Arm("DP-LoRA: whole updates, clipped and noised", _WHOLE),
    "lora": Arm(
        "LoRA without privacy: whole updates, no noise", _WHOLE | {"privacy.trust": "non-private"}, private=False
    ),
    "random": Arm("random sketch of 1/64", {"encoder.name": "random", "encoder.ratio": 64.0, "prior.source": "none"}),
    "ffa": Arm("FFA-LoRA: B whole, A as it started", {"encoder.name": "ffa", "prior.source": "none"}),
    "hybrid-few": Arm("the default with 2 % of the clients a round", _FEW),
    "steps": Arm("the default encoder, four local AdamW steps", _STEPS | {"server.learning_rate": 1.0}),
    "autoencoder": Arm("DR-Encoder as published", _PUBLISHED | {"prior.source": "moments"}),
    "fedcg": Arm(
        "FedCG as published, no privacy",
        _PUBLISHED | {"prior.source": "gradients", "privacy.trust": "non-private"},
        private=False,
    ),
}


def _cell(task: str, arm: str, *, trust: str = "central", epsilon: float = 8.0, step: float = 0, seed: int = 0) -> Cell:
    budget = epsilon if ARMS[arm].private else None
    return Cell(Track(arm, budget, f"{task}/{trust if ARMS[arm].private else 'no-privacy'}"), seed, step)


CELLS = [
    _cell("bank", "hybrid"),
    _cell("bank", "dp-lora"),
    _cell("bank", "lora"),
    _cell("bank", "random"),
    _cell("bank", "lora", step=-2),
    _cell("shakespeare", "hybrid"),
    _cell("dolly", "hybrid"),
    _cell("shakespeare", "hybrid-few"),
    _cell("bank", "dp-lora", step=-1),
    _cell("shakespeare", "dp-lora"),
    _cell("dolly", "dp-lora"),
    _cell("bank", "ffa"),
    _cell("bank", "hybrid", epsilon=2.0),
    _cell("bank", "dp-lora", epsilon=2.0),
    _cell("bank", "hybrid", trust="local"),
    _cell("bank", "dp-lora", trust="local"),
    _cell("bank", "steps"),
    _cell("bank", "hybrid", seed=1),
    _cell("bank", "dp-lora", seed=1),
    _cell("bank", "random", seed=1),
    _cell("bank", "autoencoder"),
    _cell("bank", "fedcg"),
    _cell("bank", "dp-lora", step=1),
    _cell("bank", "random", epsilon=2.0),
    _cell("shakespeare", "lora"),
    _cell("shakespeare", "random"),
    _cell("dolly", "lora"),
    _cell("dolly", "random"),
    _cell("shakespeare", "dp-lora", step=-1),
    _cell("dolly", "dp-lora", step=-1),
    _cell("shakespeare", "hybrid", seed=1),
    _cell("shakespeare", "dp-lora", seed=1),
    _cell("dolly", "hybrid", seed=1),
    _cell("dolly", "dp-lora", seed=1),
    _cell("bank", "hybrid", trust="local", step=2),
    _cell("dolly", "dp-lora", step=-2),
]


def recipe_of(cell: Cell, model: str, data: Path, out: Path, size: Size) -> Recipe:
    """The recipe of a cell; the population is counted from the data."""
    from drencoder.data.survey import with_population
    from drencoder.federated.server_rate import planned_rate
    from drencoder.runs.plan_overview import privacy_plan

    task, trust = cell.track.setting.split("/")
    place = data if task == "bank" else out
    knobs = {
        key: str(place / value) if key in ("data.source", "evaluation.data") else value
        for key, value in TASKS[task][1].items()
    }
    knobs |= {
        "name": "real-text",
        "seed": cell.seed,
        "model.source": model,
        "data.examples_per_client": size.records,
        "data.max_tokens": size.tokens,
        "data.template": "plain",
        "federation.rounds": size.rounds,
        "evaluation.examples": size.measured,
        "evaluation.every": 2,
        "privacy.trust": trust.replace("no-privacy", "central"),
    }
    arm = ARMS[cell.track.method]
    knobs |= arm.knobs
    if cell.track.epsilon is not None:
        knobs["privacy.epsilon"] = cell.track.epsilon
    knobs["federation.population"] = 0  # as many as the data have
    if task == "bank":  # about one question each
        questions = len(Path(knobs["data.source"]).read_text("utf-8").splitlines()) - 1
        knobs["federation.population"] = min(OWNERS, questions)
    recipe = with_population(Recipe().changed(knobs))
    rate = knobs.get("federation.sampling_rate", min(1.0, size.cohort / recipe.federation.population))
    recipe = recipe.changed({"federation.sampling_rate": rate})
    default = cell.track.method.startswith("hybrid")
    if default and not cell.rate_step:
        return recipe
    first = planned_rate(recipe.server, privacy_plan(recipe)) if default else recipe.server.learning_rate or RATE
    return recipe.changed({"server.learning_rate": first * 2.0**cell.rate_step})


def run_real(cell: Cell, model: str, data: Path, out: Path, size: Size) -> Row:
    """One cell: the product's own run, its rounds, and how much of the clients' updates its codes held.

    Of a cell that was killed and went on, the energy is that of the rounds since.
    """
    from unittest.mock import patch

    from real_text_study.energy import CohortEnergy

    from drencoder.federated import client_side
    from drencoder.federated.server_rate import planned_rate
    from drencoder.runs.plan_overview import privacy_plan
    from drencoder.runs.run_folder import RunFolder
    from drencoder.study.cell_run import federated

    recipe = recipe_of(cell, model, data, out, size)
    folder, energy = out / "runs" / cell.key, CohortEnergy(client_side.client_message)
    with patch.object(client_side, "client_message", energy.client_message):
        row = federated(recipe, folder)
    metrics = [
        {key: one[key] for key in ("round", "loss", "bytes_up") if key in one}
        for one in RunFolder(folder).read_metrics()
    ]
    certificate = RunFolder(folder).read_json(RunFolder(folder).certificate)
    return row | {
        "rate": planned_rate(recipe.server, privacy_plan(recipe)),
        "results": {name: result["loss"] for name, result in certificate["results"].items()},
        "uniform": certificate["uniform_loss"],
        "clients": [recipe.federation.population, size.cohort],
        "metrics": metrics,
        "energy": energy.rounds(),
    }


def write_prepared(data: Path, out: Path) -> None:
    """The short records of Dolly, in the file's own order, and Shakespeare's speeches with each role's name in one spelling."""
    lines = (data / "dolly" / "databricks-dolly-15k.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [
        line
        for line, row in zip(lines, rows, strict=True)
        if row["response"].strip() and sum(len(row[key]) for key in ("instruction", "context", "response")) <= SHORT
    ]
    (out / "dolly-short.jsonl").write_text("\n".join(kept) + "\n", "utf-8")
    speeches = [json.loads(line) for line in (data / "shakespeare" / "speeches.jsonl").read_text("utf-8").splitlines()]
    named = [json.dumps({**row, "client": row["client"].upper()}) for row in speeches]
    (out / "shakespeare.jsonl").write_text("\n".join(named) + "\n", "utf-8")


def run_cells(
    cells: Sequence[Cell], model: str, data: Path, out: Path, *, size: Size, hours: float = 1.0, threads: int = 1
) -> None:
    """Runs what has no row yet, each in a process of its own."""
    deadline = time.monotonic() + 3600 * hours
    with CellStore(out, {**asdict(size), "model": Path(model).name}) as store:
        if not (out / "shakespeare.jsonl").exists():
            write_prepared(data, out)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the workers, who import torch
        work = partial(run_real, model=model, data=data.resolve(), out=out.resolve(), size=size)
        for cell in cells:
            if cell.key in store.rows or time.monotonic() > deadline:
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(run_cell, work, cell).result()
            store.add(row)
            print(
                f"{cell.key}: loss {loss_of(row):.3f}, {row['seconds'] / 60:.1f} minutes {row.get('error', '')}",
                flush=True,
            )


def smoke() -> None:
    """Two runs of the embedded model on made-up text, and the page that they make."""
    from real_text_study.page import write_page

    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        for name in ("banking77", "dolly", "shakespeare"):
            (data / name).mkdir(parents=True)
        for part in ("train", "test"):
            lines = [f"where is {part} card {n},card_{n % 3}" for n in range(24)]
            (data / "banking77" / f"{part}.csv").write_text("\n".join(["text,category", *lines]) + "\n", "utf-8")
        notes = [{"instruction": f"add one to {n}", "context": "", "response": f"{n + 1}"} for n in range(24)]
        (data / "dolly" / "databricks-dolly-15k.jsonl").write_text("\n".join(map(json.dumps, notes)), "utf-8")
        speeches = [{"client": f"role {n % 12}", "text": f"so say {n} of us"} for n in range(36)]
        (data / "shakespeare" / "speeches.jsonl").write_text("\n".join(map(json.dumps, speeches)), "utf-8")
        run_cells(
            [_cell("bank", "hybrid"), _cell("bank", "dp-lora"), _cell("shakespeare", "hybrid")],
            "embedded",
            data,
            out,
            size=SMOKE,
        )
        write_page(out, Path(folder))
        print(f"page of {len((Path(folder) / 'real-text.md').read_text('utf-8'))} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct in Hugging Face's layout")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of the study")
    parser.add_argument("--hours", type=float, default=5.0, help="no cell is started after this time")
    parser.add_argument("--threads", type=int, default=1, help="of a run")
    parser.add_argument("--cells", nargs="+", default=[""], metavar="KEY", help="beginnings of the cells' keys")
    parser.add_argument("--list", action="store_true", help="show the cells and which are done")
    parser.add_argument("--page", action="store_true", help="write the page from the cells that are there")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--smoke", action="store_true", help="two tiny runs, nothing is kept")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    if args.out is None:
        parser.error("--out is needed")
    cells = [cell for cell in CELLS if any(cell.key.startswith(begin) for begin in args.cells)]
    if args.list:
        from drencoder.study.cells import read_rows

        rows = read_rows(args.out)
        for cell in cells:
            print(f"{'done' if cell.key in rows else '    '} {cell.key}")
        return
    if not args.page:
        if args.model is None or args.data is None:
            parser.error("--model and --data are needed to run cells")
        run_cells(
            cells, str(args.model.resolve()), args.data, args.out, size=Size(), hours=args.hours, threads=args.threads
        )
        return
    from real_text_study.page import write_page

    write_page(args.out, args.results)


if __name__ == "__main__":
    main()
