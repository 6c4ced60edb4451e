"""How much of unseen clients' updates does a Kronecker basis of public text carry?

    OMP_NUM_THREADS=1 python benchmarks/kronecker.py [--seeds 0 1 2] [--json FILE]

On the embedded model, at the adapter's start and after plain federated rounds. A basis is scored on clients that it never saw
(but for the last row, the ceiling):

* rho: share of the energy of the clients' *mean* update inside the code; rho': the mean of that share over clients;
* cos, cos': their roots, the cosine of an update with its projection;
* (rho/rho')^2: the gain per round over uncompressed DP-LoRA when noise dominates and curvature follows energy.

Rows without a mark are of public text. Rows "(oracle)" need clients' updates that nobody has charged for: they show what a prior could win, not what one may use.

Legend: N clients, D adapter values, S tensors.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from drencoder import load_recipe
from drencoder.data.embedded_world.world import World
from drencoder.data.tokenization import Example
from drencoder.encoders.gaussian_prior import GaussianPrior, moment_statistics
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior
from drencoder.encoders.random_sketch import RandomSketch, allocate_code
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.models.cohort_training import cohort_updates
from drencoder.rng import derive_seed
from drencoder.runs.build import Components, build

RATIOS = (16, 64, 256)
TESTED, OTHERS, PUBLIC = 256, 64, 64  # clients scored, other clients, make-believe clients of public text
WARM_ROUNDS, WARM_COHORT = 8, 64
SKETCHES = 8
POOLED = 8
LOW_RANK = 16  # of 128: what a short downlink would carry
Shares = Callable[[Tensor], Tensor]


# --- capture ----------------------------------------------------------------------------------------------


def updates(live: Components, adapter_D: Tensor, groups: Sequence[list[Example]]) -> Tensor:
    """(N, D): the update of every group of examples."""
    return torch.cat(
        [
            cohort_updates(
                live.lora, adapter_D, groups[at : at + 32], live.recipe.local, [0] * len(groups[at : at + 32])
            )
            for at in range(0, len(groups), 32)
        ]
    )


def clients(live: Components, first: int, count: int) -> list[list[Example]]:
    return [live.texts.client(client, 1) for client in range(first, first + count)]


def public_texts(live: Components, seed: int) -> dict[str, list[list[Example]]]:
    """Make-believe clients of two kinds of public text: records of the clients' own format, and the general part's."""
    size, count = live.recipe.data.examples_per_client, PUBLIC
    documents = islice(World().documents(derive_seed(seed, "public-documents")), size * count)
    other = live.texts.tokenizer.examples(documents, owner="public text")
    same = live.texts.held_out(size * count)
    return {
        name: [examples[at : at + size] for at in range(0, len(examples), size)]
        for name, examples in (("same format", same), ("other formats", other))
    }


def warmed(live: Components) -> Tensor:
    """The adapter after some rounds without privacy, over clients that nothing else uses."""
    server = replace(live.recipe.server, optimizer="fedadam", learning_rate=0.02)
    state = ServerState.start(live.lora.initial_D)
    for number in range(WARM_ROUNDS):
        cohort = clients(live, 5000 + number * WARM_COHORT, WARM_COHORT)
        state = server_step(state, updates(live, state.adapter_D, cohort).mean(dim=0), server, server.learning_rate)
    return state.adapter_D


def kronecker(prior: MatrixNormalPrior, code_size: int) -> tuple[list[Shares], float]:
    encoder = KroneckerEncoder.build(prior, code_size)
    return [lambda u: share(encoder.encode(u, 0), u)], 1.0 - encoder.distortion / encoder.energy


def sketched(sketch: RandomSketch, energy_S: Tensor) -> tuple[list[Shares], float]:
    chances: list[Shares] = [lambda u, s=seed: share(sketch.encode(u, s) / sketch.scale, u) for seed in range(SKETCHES)]
    return chances, sketch.expected_capture(energy_S)


def share(inside_NK: Tensor, update_ND: Tensor) -> Tensor:
    """(N,): |inside|^2 / |update|^2."""
    return inside_NK.double().square().sum(1) / update_ND.double().square().sum(1)


def weightings(update_ND: Tensor) -> dict[str, Tensor]:
    """The same updates as a second moment may weigh them: as they are, all of one norm (as under a clip that always
    binds), and averaged by eights, which leaves what they share and takes away what each has alone."""
    unit_ND = update_ND / update_ND.norm(dim=1, keepdim=True).clamp(min=1e-30)
    pooled_ND = update_ND[: len(update_ND) // POOLED * POOLED].view(-1, POOLED, update_ND.shape[1]).mean(dim=1)
    return {"": update_ND, ", unit norm": unit_ND, f", pooled by {POOLED}": pooled_ND}


def priors_of(
    live: Components, adapter_D: Tensor, texts: dict[str, list[list[Example]]], tested_ND: Tensor
) -> dict[str, MatrixNormalPrior]:
    """Every prior that is compared, by the name of its row."""
    segments = live.lora.layout.segments
    sources: dict[str, Tensor] = {}
    for name, groups in texts.items():
        sources |= {f"{name}{how}": rows_ND for how, rows_ND in weightings(updates(live, adapter_D, groups)).items()}
    others_ND = updates(live, adapter_D, clients(live, 1000, OTHERS))
    sources["other clients (oracle)"], sources["the same clients (ceiling)"] = others_ND, tested_ND
    made = {
        name: MatrixNormalPrior.from_updates(update_ND, segments, declared=name, rank=128)
        for name, update_ND in sources.items()
    }
    for name in texts:
        low = MatrixNormalPrior.from_updates(sources[name], segments, declared=name, rank=LOW_RANK)
        made[f"{name}, rank {LOW_RANK}"] = low
    moments = GaussianPrior.from_statistics(moment_statistics(others_ND, segments).mean(dim=0), segments, 0.0)
    made["other formats, clients' energies (oracle)"] = made["other formats"].with_energies(moments.energy_S)
    return made


def bases(priors: dict[str, MatrixNormalPrior], code_size: int) -> dict[str, tuple[list[Shares], float]]:
    """Name -> projections (several if random) and the share that the prior itself expects."""
    public = priors["same format"]
    segments, energy_S = public.segments, public.energy_S
    informed = RandomSketch(segments, tuple(allocate_code(segments, code_size, energy_S, 0.0).tolist()))
    return {
        "random": sketched(RandomSketch.build(segments, code_size), energy_S),
        "random, by public energies": sketched(informed, energy_S),
    } | {name: kronecker(prior, code_size) for name, prior in priors.items()}


def capture(seed: int) -> list[dict[str, Any]]:
    """One row per stage of training, ratio and basis."""
    live = build(load_recipe("quickstart", [f"seed={seed}"]))
    size, texts = live.lora.layout.size, public_texts(live, seed)
    rows, first = [], {}
    for stage, adapter_D in (("start", live.lora.initial_D), ("trained", warmed(live))):
        tested_ND = updates(live, adapter_D, clients(live, 0, TESTED))
        mean_1D = tested_ND.mean(dim=0, keepdim=True)
        priors = priors_of(live, adapter_D, texts, tested_ND)
        first = first or {f"{name}, basis of the start": priors[name] for name in texts}
        agreement = float(torch.nn.functional.cosine_similarity(tested_ND, mean_1D).mean())
        for ratio in RATIOS:
            for name, (projections, expected) in bases(priors | first, size // ratio).items():
                rho = statistics.mean(float(project(mean_1D)) for project in projections)
                each = statistics.mean(float(project(tested_ND).mean()) for project in projections)
                facts = {"seed": seed, "stage": stage, "ratio": ratio, "basis": name}
                rows.append(facts | {"rho": rho, "rho_client": each, "expected": expected, "agreement": agreement})
    return rows


def print_capture(rows: list[dict[str, Any]]) -> None:
    console = Console(width=140)
    for stage in dict.fromkeys(row["stage"] for row in rows):
        at_stage = [row for row in rows if row["stage"] == stage]
        agreement = statistics.mean(row["agreement"] for row in at_stage)
        table = Table("code", "basis", "rho", "rho'", "cos", "cos'", "(rho/rho')^2", "prior expects")
        table.title = f"{stage}: cosine of a client's update with the mean {agreement:.2f}"
        for ratio in RATIOS:
            for name in dict.fromkeys(row["basis"] for row in rows):
                found = [row for row in at_stage if row["ratio"] == ratio and row["basis"] == name]
                rhos, each = [row["rho"] for row in found], [row["rho_client"] for row in found]
                rho, mean = statistics.mean(rhos), statistics.mean(each)
                gain = statistics.mean((a / b) ** 2 for a, b in zip(rhos, each, strict=True))
                cells = [f"1/{ratio}", name, f"{rho:.3f} ({min(rhos):.3f}-{max(rhos):.3f})"]
                cells += [f"{mean:.3f} ({min(each):.3f}-{max(each):.3f})", f"{rho**0.5:.2f}", f"{mean**0.5:.2f}"]
                table.add_row(*cells, f"{gain:.2f}", f"{statistics.mean(row['expected'] for row in found):.3f}")
            table.add_section()
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        args.seeds = [0]
        globals().update(TESTED=16, OTHERS=16, PUBLIC=16, WARM_ROUNDS=1, WARM_COHORT=4)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        rows += capture(seed)
    print_capture(rows)
    if args.json:
        machine = {"platform": platform.platform(), "processor": platform.processor(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
