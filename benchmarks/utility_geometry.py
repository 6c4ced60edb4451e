"""What the formula R of METHOD 2.6 needs, measured: how much of an update a code carries, and how curved the loss is inside it.

For every task, adapter and seed, at the adapter's start and after some rounds without noise:

* a: |mean of clipped updates|^2 / C^2, with which k* = a n^2 / sigma^2 (a trusted server) or a n / sigma^2 (none);
* rho, rho': share of the energy inside the code, of the clients' mean and of a client by itself;
* lambda = g'Cg / |g|^2, D = tr(C) / lambda, D_P = E[d'Cd] / lambda with d the decoding of unit noise in the code;
* the sharpest direction after one round's step with its noise, of whole updates and inside the codes of each setting;
* the distortion of `kronecker` on gradients of its own prior, beside the water-filling value.

C is a curvature of the mean loss of held-out examples, three times (utility_curvature.py), "finite" with lambda from the Gauss-Newton
matrix. Traces by Hutchinson's probes. Updates are of clients that no run has.

Legend: N clients, D adapter values, K code values.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import utility_grid as grid
from torch import Tensor
from utility_cells import replace_text
from utility_curvature import HELD_OUT, KINDS, Curvature, signs
from utility_grid import ARMS, FORESEEN, Scale, Setting

from drencoder.encoders.code_sizes import auto_ratio, few_coordinates
from drencoder.encoders.contract import Encoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior
from drencoder.encoders.request import EncoderRequest
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.privacy.mechanism import clip_rows
from drencoder.privacy.plan import ALIGNMENT
from drencoder.rng import derive_seed
from drencoder.runs.build import Live, build
from drencoder.runs.plan_overview import privacy_plan

FIRST_CLIENT = 100_000  # the largest population has 10,000
CLIENTS = 64
WARM_ROUNDS = 8
PROBES, SKETCHES, DRAWS = 16, 8, 2048
# Learning rates at n = 64 that tuning tries first, of DP-LoRA and of hybrid together.
STEP_LENGTHS = (0.75, 1.5, 3.0, 6.0)
STAGES = ("start", "trained")
# Where A starts -> D / K of the hybrid codes that are sent from there; the public start is for small k*.
STARTS: Mapping[str, tuple[float, ...]] = {"peft": (2.0, 10.0, 64.0), "public": (10.0, 64.0)}
GEOMETRY_SEEDS = (0, 1, 2)
DISTORTION_RATIOS = (4, 16, 64, 256, 1024)


def measure(path: Path, scale: Scale, only: Mapping[str, Sequence[str]]) -> None:
    """Adds what is missing to the file, a task, adapter, start and seed at a time: whole rows, or parts that they lack."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    adapters, tasks = only.get("adapters", grid.ADAPTERS), only.get("tasks", grid.TASKS)
    for adapter, task, seed, start in product(adapters, tasks, GEOMETRY_SEEDS, STARTS):
        place = {"task": task, "adapter": adapter, "seed": seed, "start": start}
        known = [row for row in rows if place.items() <= row.items()]
        settings = noisy_settings(task, adapter, start, scale)
        if len(known) == len(STAGES) and not any(lacking(row, settings) for row in known):
            continue
        found = geometry(place, settings, scale, {row["stage"]: row for row in known})
        rows = [row for row in rows if row not in known] + found
        replace_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
        print(f"geometry of {task}, {adapter}, seed {seed}, A {start}: done", flush=True)


def noisy_settings(task: str, adapter: str, start: str, scale: Scale) -> list[tuple[Setting, float]]:
    """The study's settings with noise in which DP-LoRA or hybrid has this start, and their k*."""
    found = []
    for setting in grid.settings():
        if (setting.task, setting.adapter) == (task, adapter) and setting.epsilon is not None:
            k_star = privacy_plan(grid.base_recipe(setting, 0, scale)).k_star()
            if start == "peft" or few_coordinates(k_star):
                found.append((setting, k_star))
    return found


def lacking(row: Mapping[str, Any], settings: Sequence[tuple[Setting, float]]) -> bool:
    """Whether a code or a step of the row's start is missing."""
    codes = {code["ratio"] for code in row["codes"]}
    wanted = {(str(one), ratio) for one, k_star in settings for ratio in sent_in(one, k_star, row["start"])}
    return not codes.issuperset(STARTS[row["start"]]) or (row["stage"] == "start" and not wanted <= steps_of(row))


def steps_of(row: Mapping[str, Any]) -> set[tuple[str, float | None]]:
    """(setting, D / K) of the steps that are measured."""
    return {(step["setting"], step["ratio"]) for step in row.get("steps", ())}


def geometry(
    place: dict[str, Any], settings: Sequence[tuple[Setting, float]], scale: Scale, known: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per stage of training; of a stage that is known only what it lacks is measured."""
    setting = Setting("non-private", place["task"], place["adapter"], CLIENTS, None)
    enough = replace(scale, examples=max(scale.examples, HELD_OUT), questions=1)
    changes = {"prior.public": "embedded", "adapter.start": place["start"]}
    live = build(grid.base_recipe(setting, place["seed"], enough).changed(changes))
    rows = []
    for stage in STAGES:
        state = ServerState.start(live.lora.initial_D) if stage == "start" else trained(live)
        row = at_adapter(live, state, stage, known.get(stage) or place | {"stage": stage})
        rows.append(row | {"steps": noisy_steps(live, settings, row)} if stage == "start" else row)
    return rows


def clients(live: Live, adapter_D: Tensor, first: int) -> Tensor:
    """(N, D): updates of clients that no run has."""
    return live.updates_of([live.texts.client(FIRST_CLIENT + first + i, 1) for i in range(CLIENTS)], adapter_D)


def trained(live: Live) -> ServerState:
    """After rounds without noise, with the study's clip and optimiser and DP-LoRA's first rate."""
    state = ServerState.start(live.lora.initial_D)
    for number in range(WARM_ROUNDS):
        update_ND = clients(live, state.adapter_D, (1 + number) * CLIENTS)
        mean_D = clip_rows(update_ND, grid.BASE_CLIP).values_NV.mean(dim=0)
        state = server_step(state, mean_D, live.recipe.server, ARMS["dp-lora"].first_rate)
    return state


def at_adapter(live: Live, state: ServerState, stage: str, known: dict[str, Any]) -> dict[str, Any]:
    """`known` with everything that it lacks but the steps."""
    update_ND = clients(live, state.adapter_D, 0)
    curvature = Curvature(live, state.adapter_D)
    seed, slot = derive_seed(live.recipe.seed, f"geometry/{stage}"), 1 if stage == "start" else 1 + WARM_ROUNDS
    if "codes" not in known:
        # One start is enough for what the prior loses of its own draws.
        distortion = distortions(live, state, slot, seed) if known["start"] == "peft" else []
        known = known | shape(live, update_ND, curvature, seed) | {"codes": [], "distortion": distortion}
    codes = list(known["codes"])
    for ratio in STARTS[known["start"]]:
        if ratio in {code["ratio"] for code in codes}:
            continue
        encoder = encoder_of(live, state, ratio, slot)
        code = {"ratio": ratio, "code_size": encoder.code_size}
        codes.append(code | shares(encoder, update_ND) | noise_curvature(encoder, curvature, known["lambda"], seed))
    return known | {"codes": codes}


def noisy_steps(
    live: Live, settings: Sequence[tuple[Setting, float]], known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a round's first step, noise included, makes of the curvature: per setting and code (None: whole updates).

    `energy`: of the mean gradient, or of its code; `sharpest`: the largest eigenvalue of the Gauss-Newton matrix there (inside the
    code), one for each of STEP_LENGTHS, which are the same for all and have a noise of their own.
    """
    steps = list(known.get("steps", ()))
    there = steps_of(known)
    update_ND = clients(live, live.lora.initial_D, 0)
    state = ServerState.start(live.lora.initial_D)
    for setting, k_star in settings:
        noise_std = math.sqrt(ALIGNMENT / k_star) * grid.BASE_CLIP  # of a value of a round's mean
        for ratio in sent_in(setting, k_star, known["start"]):
            if (str(setting), ratio) in there:
                continue
            encoder = None if ratio is None else encoder_of(live, state, ratio, 1)
            sent_NK = update_ND if encoder is None else encoder.encode(update_ND, 0)
            mean_K = clip_rows(sent_NK, grid.BASE_CLIP).values_NV.mean(dim=0)
            sharpest = []
            for draw, rate in enumerate(STEP_LENGTHS):
                generator = torch.Generator().manual_seed(derive_seed(known["seed"], "noisy-step", draw))
                step_K = mean_K + noise_std * torch.randn(mean_K.shape, generator=generator)
                step_D = step_K if encoder is None else encoder.decode(step_K[None], 0)[0]
                there_D = state.adapter_D + rate * grid.noise_scale(k_star) * step_D
                sharpest.append(Curvature(live, there_D).sharpest(encoder, draw))
            energy = float(sent_NK.mean(dim=0).square().sum())
            steps.append({"setting": str(setting), "ratio": ratio, "energy": energy, "sharpest": sharpest})
    return steps


def sent_in(setting: Setting, k_star: float, start: str) -> list[float | None]:
    """What is sent from this start in a setting: whole updates, and the codes of hybrid."""
    found: list[float | None] = [None] if start == "peft" else []
    if (start == "public") == few_coordinates(k_star):
        wire_dtype = grid.wire_dtype_of(grid.Track("hybrid", setting))
        found.append(auto_ratio(setting.adapter_size, k_star, wire_dtype))
        sizes = [float(ARMS[arm].knobs["encoder.ratio"]) for arm in FORESEEN[1:] if ARMS[arm].runs_in(setting)]
        found += [size for size in sizes if size not in found]
    return found


def shape(live: Live, update_ND: Tensor, curvature: Curvature, seed: int) -> dict[str, Any]:
    """What does not depend on a code: how long and alike updates are, and how curved the loss is."""
    mean_D = update_ND.mean(dim=0)
    clipped_ND = clip_rows(update_ND, grid.BASE_CLIP).values_NV
    size = live.lora.layout.size
    steep = curvature.mean([mean_D / mean_D.norm()])
    steep["finite"] = steep["gauss-newton"]
    trace = curvature.mean([probe for one in signs(size, PROBES // 2, seed) for probe in curvature.both_signs(one)])
    return {
        "alignment": float(clipped_ND.mean(dim=0).square().sum()) / grid.BASE_CLIP**2,
        "mean_norm": float(mean_D.norm()),
        "client_norm": float(update_ND.norm(dim=1).mean()),
        "agreement": float(torch.nn.functional.cosine_similarity(update_ND, mean_D[None]).mean()),
        "lambda": steep,
        "trace": trace,
        "D": {kind: abs(trace[kind] / steep[kind]) for kind in KINDS},
        "negative": sum(value <= 0 for value in (*steep.values(), *trace.values())),
    }


def encoder_of(live: Live, state: ServerState, ratio: float, slot: int) -> Encoder:
    """The hybrid encoder that a run would have at this point."""
    changes = {"encoder.name": "hybrid", "encoder.ratio": ratio}
    there = replace(live, recipe=live.recipe.changed(changes))
    return there.encoder(
        None,
        public=there.public_updates(state.adapter_D, slot),
        history_JD=torch.stack([state.first_D, state.adapter_D - live.lora.initial_D.cpu()]),
    )


def shares(encoder: Encoder, update_ND: Tensor) -> dict[str, float]:
    """rho and rho', over several sketch seeds where the code has any."""
    mean_D = update_ND.mean(dim=0)
    rhos, each = [], []
    for sketch in range(SKETCHES):
        rows_ND = torch.cat([mean_D[None], update_ND])
        back_ND = encoder.decode(encoder.encode(rows_ND, sketch), sketch)
        energy_N = rows_ND.double().square().sum(dim=1).clamp(min=1e-30)
        inside_N = (back_ND * rows_ND).double().sum(dim=1) / energy_N
        rhos.append(float(inside_N[0]))
        each.append(float(inside_N[1:].mean()))
    return {"rho": mean(rhos), "rho_client": mean(each)}


def noise_curvature(encoder: Encoder, curvature: Curvature, steep: dict[str, float], seed: int) -> dict[str, Any]:
    """D_P: how curved the loss is where the code's noise goes."""
    directions = []
    for number, noise_K in enumerate(signs(encoder.code_size, PROBES // 2, seed)):
        directions += curvature.both_signs(encoder.decode(noise_K[None], number)[0])
    inside = curvature.mean(directions)
    negative = sum(value <= 0 for value in inside.values())
    return {"D_P": {kind: abs(inside[kind] / steep[kind]) for kind in KINDS}, "negative": negative}


# --- distortion ------------------------------------------------------------------------------------------


def distortions(live: Live, state: ServerState, slot: int, seed: int) -> list[dict[str, Any]]:
    """What `kronecker` loses of gradients drawn from the prior that it is made of, against the water-filling value."""
    there = replace(live, recipe=live.recipe.changed({"encoder.name": "kronecker"}))
    public = there.public_updates(state.adapter_D, slot)
    assert public is not None
    prior = public.prior(live.lora.layout.segments, EncoderRequest.rank)
    variance_D = eigenvalues(prior)
    encoders = {ratio: KroneckerEncoder.build(prior, live.lora.layout.size // ratio) for ratio in DISTORTION_RATIOS}
    lost = dict.fromkeys(DISTORTION_RATIOS, 0.0)
    for number in range(DRAWS):
        drawn_1D = prior.draw_row(seed, number)[None]
        for ratio, encoder in encoders.items():
            rest_1D = drawn_1D - encoder.decode(encoder.encode(drawn_1D, 0), 0)
            lost[ratio] += float(rest_1D.double().square().sum()) / DRAWS
    rows = []
    for ratio, encoder in encoders.items():
        least = float(variance_D[encoder.code_size :].sum())
        closed = encoder.distortion / least - 1
        error = lost[ratio] / least - 1
        rows.append(
            {"ratio": ratio, "draws": DRAWS, "water_filling": least, "error": error, "closed_form_error": closed}
        )
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
