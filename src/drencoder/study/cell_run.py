"""One run of a study, in a worker process: the product's own run, or training without a federation, and what is kept of it.

The top level imports no torch: the pool limits a worker's threads before torch is loaded.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from drencoder.data.units import SiteUnits
from drencoder.errors import LostError
from drencoder.recipe.recipe import Local, Recipe
from drencoder.rng import derive_seed
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import Row

_BATCH = 32
_ENCODER_FACTS = ("name", "code_size", "update_size", "head", "directions", "random", "expected_capture")


def federated(recipe: Recipe, folder: Path) -> Row:
    """Runs the recipe in this folder, or resumes it there, and gives the facts of its certificate.

    Raises:
      DrencoderError: as the run does.
    """
    from drencoder.runs import run as runs

    if not RunFolder(folder).ledger.exists():  # nothing was charged: what a killed start left is worth nothing
        shutil.rmtree(folder, ignore_errors=True)
        return facts(runs.run(recipe, folder).certificate)
    try:
        return facts(runs.resume(folder).certificate)
    except LostError:  # killed with FedCG's gradients in memory: its ledger is kept, and the cell is run anew
        folder.rename(_free_name_beside(folder))
        return facts(runs.run(recipe, folder).certificate)


def facts(certificate: Mapping[str, Any]) -> Row:
    """What a study keeps of a certificate: scores, bytes sent up by all clients, every observer's epsilon, and the encoder."""
    encoder, sent = certificate["encoder"], certificate["bytes"]
    gate = {key: value for key, value in encoder.items() if key.startswith("gate_public_")}
    return {
        **_scores(certificate["results"]),
        "bytes_up": sent["uploaded"],
        "bytes_stage1": sent["stage1"],
        "rounds": certificate["rounds"],
        "epsilon": {name: observer["epsilon_pld"] for name, observer in certificate["observers"].items()},
        "private": certificate["private"],
        "encoder": {key: encoder[key] for key in _ENCODER_FACTS if key in encoder} | gate,
    }


def centralised(recipe: Recipe, folder: Path) -> Row:
    """Trains LoRA by AdamW on pooled text: the ceiling that federated and private runs are held against.

    The run sees as much text as all rounds of the federated run: that of the first q N T clients (or units of sites), or of all in as many epochs
    as rounds ask each of them, in batches of 32. `local.learning_rate` is the learning rate. There is no clip, no noise and no guarantee.
    """
    from drencoder.evaluation.outcomes import measure_all
    from drencoder.models.cohort_training import cohort_updates
    from drencoder.runs.build import build

    components = build(recipe)
    plan, source = components.plan, components.texts.source
    turns = plan.expected_cohort * plan.rounds
    clients: Sequence[int] = range(plan.population)
    if isinstance(source, SiteUnits):
        clients = [unit for site in range(plan.population) for unit in source.units(site)]
    clients = clients[: max(1, round(turns))]
    epochs = max(1, round(turns / len(clients)))
    pooled = [example for client in clients for example in components.texts.client(client, slot=1)]
    local = Local(upload="increment", epochs=epochs, batch_size=_BATCH, learning_rate=recipe.local.learning_rate)
    seed, start_D = derive_seed(recipe.seed, "centralised"), components.lora.initial_D
    adapter_D = start_D.cpu() + cohort_updates(components.lora, start_D, [pooled], local, [seed])[0].cpu()
    outcomes = measure_all(components.lora, adapter_D, components.held_out, components.questions)
    stored = {name: outcome.to_dict() for name, outcome in outcomes.items()}
    RunFolder(folder).write_json(RunFolder(folder).outcomes, stored)
    return {
        **_scores({name: outcome.estimates() for name, outcome in outcomes.items()}), "bytes_up": 0, "bytes_stage1": 0,
        "rounds": plan.rounds, "epsilon": dict.fromkeys(("server", "clients", "public"), "inf"), "private": False, "encoder": {},
    }  # fmt: skip


def _scores(results: Mapping[str, Any]) -> Row:
    """Loss and accuracies of this run, and of the base model and the zero update beside it."""

    def scores_of(model: str) -> Row:
        row = results[model]
        accuracy = {name: estimate["value"] for name, estimate in row["accuracy"].items()}
        return {"loss": row["loss"]["value"] if row["loss"] else math.inf, "accuracy": accuracy}

    return {**scores_of("this run"), "base": scores_of("base model"), "zero": scores_of("zero update")}


def _free_name_beside(folder: Path) -> Path:
    """A name for the folder of a run that was lost."""
    return next(path for number in count(1) if not (path := folder.with_name(f"{folder.name}.lost-{number}")).exists())
