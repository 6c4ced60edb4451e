"""What the formula R of METHOD 2.6 needs, measured: how much of an update a code carries, and how curved the loss is inside it.

For every task, adapter and seed, at the adapter's start and after some rounds without noise:

* a: |mean of clipped updates|^2 / C^2, with which k* = a n^2 / sigma^2 (a trusted server) or a n / sigma^2 (none);
* rho, rho': share of the energy inside the code, of the clients' mean and of a client by itself;
* lambda = g'Cg / |g|^2, D = tr(C) / lambda, D_P = E[d'Cd] / lambda with d the decoding of unit noise in the code;
* the distortion of `kronecker` on gradients of its own prior, beside the water-filling value.

C is a curvature of the mean loss of held-out examples, three times: the Hessian, which has negative directions (of it |.| is taken, and
`negative` counts how often that mattered), and the Gauss-Newton matrix, J' (diag(p) - pp') J over the logits, which has none, both by
central differences; and "finite", the loss's second difference over noise as long as a run's, FINITE in every value, with
lambda from the Gauss-Newton matrix. Traces by Hutchinson's probes. Updates are of clients that no run has.

Legend: N clients, D adapter values, K code values, M predicted tokens, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import utility_grid as grid
from torch import Tensor
from utility_cells import replace_text
from utility_grid import ARMS, Scale, Setting

from drencoder.build import Live, build
from drencoder.encoders.contract import Encoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.subset import is_lora_b
from drencoder.examples import collate
from drencoder.privacy.mechanism import clip_rows
from drencoder.rng import derive_seed
from drencoder.steps import ServerState, server_step
from drencoder.structured import MatrixNormalPrior
from drencoder.training import cohort_updates

FIRST_CLIENT = 100_000  # the largest population has 10,000
CLIENTS, HELD_OUT = 64, 64
WARM_ROUNDS = 8
PROBES, HESSIAN_PROBES, SKETCHES, DRAWS = 16, 8, 8, 2048
STEP = 1e-3  # length of a finite difference, over the length of the adapter
CODES = (("B", 2), ("B", 10), ("B", 64), ("both", 64))  # of hybrid: tensors, D / K
GEOMETRY_SEEDS = (0, 1, 2)
DISTORTION_RATIOS = (4, 16, 64, 256, 1024)
FINITE = 0.05  # rms of the noise that a run's rounds add up to in a value, of the order that DP-LoRA's tuned runs have at n = 8
KINDS = ("hessian", "gauss-newton", "finite")


def measure(path: Path, scale: Scale, only: Mapping[str, Sequence[str]]) -> None:
    """Adds what is missing to the file, a task, adapter and seed at a time: whole rows, or codes that they lack."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    for adapter in only.get("adapters", grid.ADAPTERS):
        for task in only.get("tasks", grid.TASKS):
            for seed in GEOMETRY_SEEDS:
                known = [row for row in rows if (row["task"], row["adapter"], row["seed"]) == (task, adapter, seed)]
                if known and not any(map(lacking, known)):
                    continue
                found = geometry(task, adapter, seed, scale, {row["stage"]: row for row in known})
                rows = [row for row in rows if row not in known] + found
                replace_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
                print(f"geometry of {task}, {adapter}, seed {seed}: done", flush=True)


def lacking(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The codes that a row does not have."""
    there = {(code["tensors"], code["ratio"]) for code in row["codes"]}
    return [code for code in CODES if code not in there]


def geometry(
    task: str, adapter: str, seed: int, scale: Scale, known: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per stage of training; of a stage that is known only its missing codes are measured."""
    setting = Setting("non-private", task, adapter, CLIENTS, None)
    enough = replace(scale, examples=max(scale.examples, HELD_OUT), questions=1)
    live = build(grid.base_recipe(setting, seed, enough).changed({"prior.public": "embedded"}))
    rows = []
    for stage, state in (("start", ServerState.start(live.lora.initial_D)), ("trained", trained(live))):
        place = {"task": task, "adapter": adapter, "seed": seed, "stage": stage}
        rows.append(at_adapter(live, state, stage, known.get(stage) or place))
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
    """`known` with everything that it lacks."""
    update_ND = clients(live, state.adapter_D, 0)
    curvature = Curvature(live, state.adapter_D)
    seed, slot = derive_seed(live.recipe.seed, f"geometry/{stage}"), 1 if stage == "start" else 1 + WARM_ROUNDS
    if "codes" not in known:
        distortion = distortions(live, state, slot, seed)
        known = known | shape(live, update_ND, curvature, seed) | {"codes": [], "distortion": distortion}
    codes = list(known["codes"])
    for tensors, ratio in lacking(known):
        encoder = encoder_of(live, state, tensors, ratio, slot)
        code = {"tensors": tensors, "ratio": ratio, "code_size": encoder.code_size}
        codes.append(code | shares(encoder, update_ND) | noise_curvature(encoder, curvature, known["lambda"], seed))
    return known | {"codes": codes}


def shape(live: Live, update_ND: Tensor, curvature: "Curvature", seed: int) -> dict[str, Any]:
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


def encoder_of(live: Live, state: ServerState, tensors: str, ratio: int, slot: int) -> Encoder:
    """The hybrid encoder that a run would have at this point."""
    changes = {"encoder.name": "hybrid", "encoder.ratio": float(ratio), "encoder.tensors": tensors}
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


def noise_curvature(encoder: Encoder, curvature: "Curvature", steep: dict[str, float], seed: int) -> dict[str, Any]:
    """D_P: how curved the loss is where the code's noise goes."""
    directions = []
    for number, noise_K in enumerate(signs(encoder.code_size, PROBES // 2, seed)):
        directions += curvature.both_signs(encoder.decode(noise_K[None], number)[0])
    inside = curvature.mean(directions)
    negative = sum(value <= 0 for value in inside.values())
    return {"D_P": {kind: abs(inside[kind] / steep[kind]) for kind in KINDS}, "negative": negative}


# --- curvature -------------------------------------------------------------------------------------------


class Curvature:
    """d'Hd and d'Gd of the mean held-out loss at one adapter, by central differences."""

    def __init__(self, live: Live, adapter_D: Tensor) -> None:
        self.lora, self.adapter_D = live.lora, adapter_D
        self.examples, self.local = live.held_out[:HELD_OUT], replace(live.recipe.local, batch_size=HELD_OUT)
        self.batch = collate([self.examples], live.lora.base.pad_id).to(live.lora.device)
        self.chance_MV = self._logits(adapter_D).softmax(dim=1)
        self.wanted_M1 = self.batch.input_ids[self.batch.predicted][:, None].cpu()
        self.at_rest = self._loss(adapter_D)
        self.sign_D = torch.ones_like(adapter_D)
        for segment in live.lora.layout.segments:
            if is_lora_b(segment):
                self.sign_D[segment.start : segment.stop] = -1

    def both_signs(self, direction_D: Tensor) -> list[Tensor]:
        """The direction, and with the sign of LoRA's B turned: the mean of both forms is free of what A and B do to each other,
        which has no part in a trace but most of its variance (at B = 0 all of the Hessian's)."""
        return [direction_D, direction_D * self.sign_D]

    def mean(self, directions: Sequence[Tensor]) -> dict[str, float]:
        """Kind of curvature -> mean of d'Cd; the Hessian's over the first directions only, for it needs gradients."""
        hessian = mean(self._hessian(direction_D) for direction_D in directions[:HESSIAN_PROBES])
        return dict(
            zip(
                KINDS,
                (hessian, mean(map(self._gauss_newton, directions)), mean(map(self._finite, directions))),
                strict=True,
            )
        )

    def _ends(self, direction_D: Tensor) -> tuple[Tensor, Tensor, float]:
        step = STEP * float(self.adapter_D.norm()) / float(direction_D.norm())
        return self.adapter_D - step * direction_D, self.adapter_D + step * direction_D, 2 * step

    def _hessian(self, direction_D: Tensor) -> float:
        low_D, high_D, width = self._ends(direction_D)
        return float(direction_D @ (self._downhill(low_D) - self._downhill(high_D))) / width

    def _gauss_newton(self, direction_D: Tensor) -> float:
        low_D, high_D, width = self._ends(direction_D)
        change_MV = (self._logits(high_D) - self._logits(low_D)) / width
        mean_M1 = (self.chance_MV * change_MV).sum(dim=1, keepdim=True)
        return float((self.chance_MV * (change_MV - mean_M1).square()).sum(dim=1).mean())

    def _finite(self, direction_D: Tensor) -> float:
        ends = (self._loss(self.adapter_D + sign * FINITE * direction_D) for sign in (-1, 1))
        return (sum(ends) - 2 * self.at_rest) / FINITE**2

    def _loss(self, at_D: Tensor) -> float:
        log_MV = self._logits(at_D).log_softmax(dim=1)
        return -float(log_MV.gather(1, self.wanted_M1).mean())

    def _downhill(self, at_D: Tensor) -> Tensor:
        return cohort_updates(self.lora, at_D, [self.examples], self.local, [0])[0].cpu()

    @torch.no_grad()
    def _logits(self, at_D: Tensor) -> Tensor:
        stack = {name: tensor[None] for name, tensor in self.lora.layout.unflatten(at_D.to(self.lora.device)).items()}
        with self.lora.stacked(stack):
            return self.lora.logits_before(self.batch.input_ids, self.batch.predicted).double().cpu()


def signs(size: int, count: int, seed: int) -> list[Tensor]:
    """Random vectors of +1 and -1: E[v v'] = I, with the least variance of v'Cv (Hutchinson 1990,
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
