"""What the formula R of METHOD 2.6 needs, measured: how much of an update a code carries, and how curved the loss is inside it.

For every task, adapter and seed, at the adapter's start and after some rounds without noise:

* a: |mean of clipped updates|^2 / C^2, with which k* = a n^2 / sigma^2 (a trusted server) or a n / sigma^2 (none);
* rho, rho': share of the energy inside the code, of the clients' mean and of a client by itself;
* lambda = g'Hg / |g|^2, D = tr(H) / lambda, D_P = E[d'Hd] / lambda with d the decoding of unit noise in the code;
* the distortion of `kronecker` on gradients of its own prior, beside the water-filling value.

Updates are of clients that no run has. H is that of the mean loss of held-out examples; traces are Hutchinson's, Hessian-vector
products central differences of the gradient. H need not be positive: |.| is taken and `negative` counts how often it mattered.

Legend: N clients, D adapter values, K code values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import utility_grid as grid
from torch import Tensor
from utility_cells import replace_text
from utility_grid import ARMS, RATIOS, Scale, Setting

from drencoder.build import Live, build
from drencoder.encoders.contract import Encoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.privacy.mechanism import clip_rows
from drencoder.rng import derive_seed
from drencoder.steps import ServerState, server_step
from drencoder.structured import MatrixNormalPrior
from drencoder.training import cohort_updates

FIRST_CLIENT = 100_000  # the largest population has 10,000
CLIENTS, HELD_OUT = 64, 64
WARM_ROUNDS = 8
PROBES, SKETCHES, DRAWS = 16, 8, 256
STEP = 1e-2  # length of a finite difference, over the length of the adapter
ENCODERS = ("hybrid", "kronecker", "random")
Vector = Callable[[Tensor], Tensor]


def measure(path: Path, scale: Scale, only: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> None:
    """Adds what is missing to the file, a task, adapter and seed at a time."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    known = {(row["task"], row["adapter"], row["seed"]) for row in rows}
    for adapter in only.get("adapters", grid.ADAPTERS):
        for task in only.get("tasks", grid.TASKS):
            for seed in seeds:
                if (task, adapter, seed) not in known:
                    rows += geometry(task, adapter, seed, scale)
                    replace_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
                    print(f"geometry of {task}, {adapter}, seed {seed}: done", flush=True)


def geometry(task: str, adapter: str, seed: int, scale: Scale) -> list[dict[str, Any]]:
    """One row per stage of training."""
    setting = Setting("non-private", task, adapter, CLIENTS, None)
    enough = replace(scale, examples=max(scale.examples, HELD_OUT), questions=1)
    live = build(grid.base_recipe(setting, seed, enough).changed({"prior.public": "embedded"}))
    rows = []
    for stage, state in (("start", ServerState.start(live.lora.initial_D)), ("trained", trained(live))):
        rows.append({"task": task, "adapter": adapter, "seed": seed, "stage": stage} | at_adapter(live, state, stage))
    return rows


def clients(live: Live, adapter_D: Tensor, first: int) -> Tensor:
    """(N, D): updates of clients that no run has."""
    return live.updates_of([live.texts.client(FIRST_CLIENT + first + i, 1) for i in range(CLIENTS)], adapter_D)


def trained(live: Live) -> ServerState:
    """After rounds without clip or noise, with the study's optimiser and the silent arm's first rate."""
    state = ServerState.start(live.lora.initial_D)
    for number in range(WARM_ROUNDS):
        mean_D = clients(live, state.adapter_D, (1 + number) * CLIENTS).mean(dim=0)
        state = server_step(state, mean_D, live.recipe.server, ARMS["lora"].first_rate)
    return state


def at_adapter(live: Live, state: ServerState, stage: str) -> dict[str, Any]:
    update_ND = clients(live, state.adapter_D, 0)
    mean_D = update_ND.mean(dim=0)
    clipped_ND = clip_rows(update_ND, grid.BASE_CLIP).values_NV
    hessian = curvature(live, state.adapter_D)
    steep = float(mean_D @ hessian(mean_D)) / float(mean_D @ mean_D)
    seed = derive_seed(live.recipe.seed, "geometry", stage)
    size = live.lora.layout.size
    trace = mean(float(probe @ hessian(probe)) for probe in signs(size, PROBES, seed))
    facts = {
        "alignment": float(clipped_ND.mean(dim=0).square().sum()) / grid.BASE_CLIP**2,
        "mean_norm": float(mean_D.norm()),
        "client_norm": float(update_ND.norm(dim=1).mean()),
        "agreement": float(torch.nn.functional.cosine_similarity(update_ND, mean_D[None]).mean()),
        "lambda": steep,
        "trace": trace,
        "D": abs(trace / steep),
        "negative": int(steep <= 0) + int(trace <= 0),
    }
    slot = 1 if stage == "start" else 1 + WARM_ROUNDS
    codes = [
        captured(encoder_of(live, state, name, ratio, slot), name, ratio, update_ND, hessian, steep, seed)
        for name in ENCODERS
        for ratio in RATIOS
    ]
    return facts | {"codes": codes, "distortion": distortions(live, state, slot, seed)}


def encoder_of(live: Live, state: ServerState, name: str, ratio: int, slot: int) -> Encoder:
    """The encoder that a run would have at this point."""
    changes = {"encoder.name": name, "encoder.ratio": float(ratio)}
    there = replace(live, recipe=live.recipe.changed(changes))
    return there.encoder(None, public=there.public_updates(state.adapter_D, slot), momentum_D=state.first_D)


def captured(
    encoder: Encoder, name: str, ratio: int, update_ND: Tensor, hessian: Vector, steep: float, seed: int
) -> dict[str, Any]:
    """rho, rho' and D_P of one code, over several sketch seeds where it has any."""
    mean_D = update_ND.mean(dim=0)
    energy = float(mean_D.double().square().sum())
    rhos, each = [], []
    for sketch in range(SKETCHES):
        back_ND = encoder.decode(encoder.encode(torch.cat([mean_D[None], update_ND]), sketch), sketch)
        inner_N = (back_ND[1:] * update_ND).double().sum(dim=1) / update_ND.double().square().sum(dim=1).clamp(
            min=1e-30
        )
        rhos.append(float((back_ND[0] * mean_D).double().sum()) / energy)
        each.append(float(inner_N.mean()))
    inside = []
    for number, noise_K in enumerate(signs(encoder.code_size, PROBES, seed)):
        direction_D = encoder.decode(noise_K[None], number)[0]
        inside.append(float(direction_D @ hessian(direction_D)))
    return {
        "encoder": name,
        "ratio": ratio,
        "code_size": encoder.code_size,
        "rho": mean(rhos),
        "rho_client": mean(each),
        "D_P": abs(mean(inside) / steep),
        "negative": int(mean(inside) <= 0),
    }


# --- curvature -------------------------------------------------------------------------------------------


def curvature(live: Live, adapter_D: Tensor) -> Vector:
    """v -> Hv for the mean loss of held-out examples, by central differences."""
    texts, local = [live.held_out[:HELD_OUT]], live.recipe.local

    def downhill(at_D: Tensor) -> Tensor:
        return cohort_updates(live.lora, at_D, texts, local, [0])[0].cpu()

    def product(vector_D: Tensor) -> Tensor:
        step = STEP * float(adapter_D.norm()) / float(vector_D.norm())
        return (downhill(adapter_D - step * vector_D) - downhill(adapter_D + step * vector_D)) / (2 * step)

    return product


def signs(size: int, count: int, seed: int) -> list[Tensor]:
    """Random vectors of +1 and -1: E[v v'] = I, with the least variance of v'Hv (Hutchinson 1990,
    https://doi.org/10.1080/03610919008812866)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1 for _ in range(count)]


# --- distortion ------------------------------------------------------------------------------------------


def distortions(live: Live, state: ServerState, slot: int, seed: int) -> list[dict[str, Any]]:
    """What `kronecker` loses of gradients drawn from the prior that it is made of, against the water-filling value."""
    there = replace(live, recipe=live.recipe.changed({"encoder.name": "kronecker"}))
    public = there.public_updates(state.adapter_D, slot)
    assert public is not None
    prior = public.prior(live.lora.layout.segments, live.recipe.prior.rank)
    variance_D = eigenvalues(prior)
    rows = []
    for ratio in RATIOS:
        encoder = KroneckerEncoder.build(prior, live.lora.layout.size // ratio)
        lost = total = 0.0
        for number in range(DRAWS):
            drawn_1D = prior.draw_row(seed, number)[None]
            lost += float((drawn_1D - encoder.decode(encoder.encode(drawn_1D, 0), 0)).double().square().sum())
            total += float(drawn_1D.double().square().sum())
        least = float(variance_D[encoder.code_size :].sum())
        # A draw's own length is chance that both sides share: lost / total against least / energy.
        rows.append(
            {"ratio": ratio, "measured": lost / DRAWS, "water_filling": least,
             "error": (lost / total) / (least / float(variance_D.sum())) - 1}
        )  # fmt: skip
    return rows


def eigenvalues(prior: MatrixNormalPrior) -> Tensor:
    """All D eigenvalues of the prior's covariance, largest first, written out without the encoder's own bookkeeping."""
    parts = []
    for row, column, energy in zip(prior.rows, prior.columns, prior.spread_S.tolist(), strict=True):
        sides = []
        for side in (row, column):
            rest = side.values_Q.new_full((side.length - len(side.values_Q),), side.floor)
            sides.append(torch.cat([side.values_Q, rest]))
        parts.append(energy * torch.outer(*sides).flatten())
    return torch.cat(parts).sort(descending=True).values
