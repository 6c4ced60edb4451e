"""The order of the stages: plan, stage 1, gate, stage 2, evaluation, certificate; and going on after a kill.

Legend: D adapter values.

What is on disk, in order, for every slot (0 = stage 1, 1..T = rounds): the charge in the ledger, then the release's
consequence in the checkpoint, one file that is replaced atomically. A kill between the two costs a charge and no more.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from drencoder import __version__
from drencoder.artifacts import RunFolder
from drencoder.build import Live, build
from drencoder.config import Recipe, load_recipe
from drencoder.encoders.contract import Encoder
from drencoder.encoders.gate import GateResult, measure_viability, require_viable
from drencoder.encoders.sizes import BYTES_PER_VALUE
from drencoder.errors import ArtifactError, BudgetError
from drencoder.evaluation import Estimate, held_out_loss, multiple_choice
from drencoder.overview import Overview
from drencoder.prior import GaussianPrior
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.plan import PrivacyPlan
from drencoder.rng import derive_seed
from drencoder.steps import CohortQuery, Outcome, ServerState, learning_rate, moment_query, server_step, update_query
from drencoder.training import cohort_updates

__all__ = ["Listener", "RunResult", "resume", "run"]


class Listener(Protocol):
    """Is told what happens, in order; shows it or not."""

    def planned(self, overview: Overview) -> None: ...
    def say(self, text: str) -> None: ...
    def round_done(self, row: Mapping[str, Any]) -> None: ...
    def finished(self, certificate: Mapping[str, Any]) -> None: ...


class _Silent:
    def planned(self, overview: Overview) -> None: ...
    def say(self, text: str) -> None: ...
    def round_done(self, row: Mapping[str, Any]) -> None: ...
    def finished(self, certificate: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind. `adapter` is a PEFT adapter folder."""

    folder: Path
    adapter: Path
    ledger: Path
    metrics: list[dict[str, Any]]
    certificate: dict[str, Any]


@dataclass(frozen=True)
class _Progress:
    """Everything that a resumed run cannot recompute. All of it is post-processing of releases."""

    state: ServerState
    slot: int  # the last slot that is done; -1 before stage 1
    bytes_up: int = 0
    prior: GaussianPrior | None = None
    encoder_state: Mapping[str, Tensor] | None = None
    gate: Mapping[str, Any] | None = None
    stage1: Mapping[str, Any] | None = None


def run(recipe: Recipe, folder: str | Path, listener: Listener | None = None) -> RunResult:
    """Runs a recipe into a new folder.

    Raises:
      DrencoderError: something cannot be had, before the folder exists; or the disk is full, later on.
    """
    listener = listener or _Silent()
    path = Path(folder)
    RunFolder.check_free(path)
    live = _prepare(recipe, listener)
    run_folder = RunFolder.create(path)
    run_folder.write(run_folder.recipe, recipe.to_toml().encode())
    plan = live.overview.privacy
    key = hashlib.sha256(f"replay/{recipe.seed}".encode()).digest() if plan.noise == "replay" else None
    with Ledger.create(run_folder.ledger, plan, run_id=secrets.token_hex(8), key=key) as ledger:
        start = _Progress(ServerState.start(live.lora.initial_D), slot=-1)
        return _drive(live, run_folder, ledger, start, listener)


def resume(folder: str | Path, listener: Listener | None = None) -> RunResult:
    """Goes on with a run that was killed, with its own recipe, ledger and checkpoint.

    Raises:
      ArtifactError: the folder is not a run's, or its ledger was changed or cut.
    """
    listener = listener or _Silent()
    run_folder = RunFolder.open(Path(folder))
    recipe = load_recipe(run_folder.recipe)
    live = _prepare(recipe, listener)
    if not run_folder.ledger.exists():
        raise ArtifactError(f"{folder} has no ledger, so nothing was charged yet: start it anew in another folder.")
    with Ledger.open(run_folder.ledger) as ledger:
        if ledger.plan != live.overview.privacy:
            raise ArtifactError(
                f"the plan in {run_folder.ledger} is not that of {run_folder.recipe}: restore the recipe."
            )
        start = _load_checkpoint(run_folder, live, ledger)
        listener.say(f"resuming after {'nothing' if start.slot < 0 else f'slot {start.slot}'}")
        run_folder.keep_metrics([row for row in run_folder.read_metrics() if row["round"] <= start.slot])
        return _drive(live, run_folder, ledger, start, listener)


def _prepare(recipe: Recipe, listener: Listener) -> Live:
    live = build(recipe)
    listener.planned(live.overview)
    return live


def _drive(live: Live, folder: RunFolder, ledger: Ledger, now: _Progress, listener: Listener) -> RunResult:
    """All stages from `now` on. Budget that runs out ends stage 2 early and cleanly."""
    plan = live.overview.privacy
    if now.slot < 0 and plan.stage1_rate > 0:
        now = _stage1(live, ledger, now, listener)
        _save_checkpoint(folder, ledger, now)
    if now.gate is None:
        now, encoder = _make_encoder(live, now, listener)
        _save_checkpoint(folder, ledger, now)
    else:
        encoder = live.encoder(now.prior, dict(now.encoder_state or {}))
    if max(0, now.slot) not in {row["round"] for row in folder.read_metrics()}:
        _evaluate_round(live, folder, ledger, now, listener)  # the start, or a round killed before its row was written
    for slot in range(max(1, now.slot + 1), plan.rounds + 1):
        try:
            now = _round(live, ledger, now, encoder, slot, listener)
        except BudgetError as error:
            listener.say(f"stopped after round {now.slot}: {error}")
            break
        _save_checkpoint(folder, ledger, now)
        _evaluate_round(live, folder, ledger, now, listener)
    return _finish(live, folder, ledger, now, encoder, listener)


def _stage1(live: Live, ledger: Ledger, now: _Progress, listener: Listener) -> _Progress:
    """The charged, noised moments of one cohort, and the prior that is fitted to them."""
    recipe, plan, segments = live.recipe, live.overview.privacy, live.lora.layout.segments
    if ledger.resume_rule(0) == "skip":
        listener.say("stage 1 was charged but its result was lost: going on with an uninformed prior")
        return replace(now, slot=0, prior=GaussianPrior.isotropic(segments), stage1={"lost": True})
    cohort = ledger.cohort(0)
    listener.say(f"stage 1: asking {_cohort_words(plan.trust, cohort, plan.stage1_cohort)} for two moments per tensor")
    query = moment_query(segments, recipe.prior)
    outcome, _ = _ask(live, ledger, query, now.state.adapter_D, cohort)
    release = outcome.release
    mean_V = release.value / plan.stage1_cohort
    prior = GaussianPrior.from_statistics(mean_V, segments, release.noise_std / plan.stage1_cohort)
    facts = {"statistics": query.wire.code_size, "message_bytes": query.wire.message_size}
    listener.say(f"stage 1: {facts['statistics']} noised statistics, prior rms {prior.rms:.2e}")
    sent = _bytes_up(outcome, plan.stage1_cohort, query)
    return replace(now, slot=0, prior=prior, stage1=facts, bytes_up=now.bytes_up + sent)


def _make_encoder(live: Live, now: _Progress, listener: Listener) -> tuple[_Progress, Encoder]:
    """Fits the encoder to synthetic gradients and asks the gate, before any of stage 2's budget is spent."""
    recipe = live.recipe
    encoder = live.encoder(now.prior)
    prior = now.prior or GaussianPrior.isotropic(live.lora.layout.segments)
    seed = derive_seed(recipe.seed, "gate")
    samples = prior.sample(min(64, recipe.prior.synthetic), seed)
    synthetic = measure_viability(encoder, samples.values_ND, seed)
    listener.say(f"gate, synthetic gradients: {synthetic.sentence}")
    public = measure_viability(encoder, _public_updates(live, now.state.adapter_D), seed)
    listener.say(f"gate, server-held text: cosine {public.cosine:.3f}, {public.captured_energy:.2%} of the energy")
    require_viable(synthetic, allow=recipe.encoder.gate == "warn")
    gate = {"synthetic": _gate_facts(synthetic), "public": _gate_facts(public)}
    return replace(now, gate=gate, encoder_state=encoder.state()), encoder


def _gate_facts(result: GateResult) -> dict[str, Any]:
    return {
        "cosine": result.cosine,
        "captured_energy": result.captured_energy,
        "random_cosine": result.random_cosine,
        "viable": result.viable,
    }


def _public_updates(live: Live, adapter_D: Tensor) -> Tensor:
    """Updates (up to 16, D) of make-believe clients that hold the server's own held-out text."""
    size = live.recipe.data.examples_per_client
    held_out = live.held_out
    groups = [held_out[start : start + size] for start in range(0, min(len(held_out), 16 * size), size)]
    while len(groups) < 2:  # the gate compares at least two
        groups.append(held_out)
    return cohort_updates(live.lora, adapter_D, groups, live.recipe.local, [0] * len(groups)).cpu()


def _round(live: Live, ledger: Ledger, now: _Progress, encoder: Encoder, slot: int, listener: Listener) -> _Progress:
    """One round: charge, gather, release, step. Reads like the algorithm; steps.py has each line."""
    recipe, plan = live.recipe, live.overview.privacy
    if ledger.resume_rule(slot) == "skip":
        listener.say(f"round {slot} was charged but its result was lost: skipped, so that no client releases twice")
        return replace(now, slot=slot)
    query = update_query(encoder, recipe, slot)
    outcome, permit = _ask(live, ledger, query, now.state.adapter_D, ledger.cohort(slot))
    direction_D = query.direction(outcome.release, permit, plan.expected_cohort)
    if recipe.local.upload == "state":
        direction_D = direction_D - now.state.adapter_D
    if outcome.rejected or outcome.nonfinite:
        listener.say(f"round {slot}: {outcome.rejected} messages rejected, {outcome.nonfinite} updates not finite")
    sent = _bytes_up(outcome, plan.expected_cohort, query)
    state = server_step(now.state, direction_D, recipe.server, learning_rate(recipe.server, slot, plan.rounds))
    return replace(now, state=state, slot=slot, bytes_up=now.bytes_up + sent)


def _ask(
    live: Live, ledger: Ledger, query: CohortQuery, adapter_D: Tensor, cohort: list[int]
) -> tuple[Outcome, Permit]:
    """Charge, gather, release: the same for both stages, in this order."""
    permit, noise = ledger.charge(query.slot), live.noise()
    outcome = query.release(live.engine.gather(query, adapter_D, cohort, permit, noise), permit, noise)
    if outcome.release.contributors is not None:
        # Local trust: how many noised messages hide each other is public, and makes the public's epsilon.
        ledger.record_contributors(query.slot, outcome.release.contributors)
    return outcome, permit


def _bytes_up(outcome: Outcome, expected: float, query: CohortQuery) -> int:
    """Bytes of a slot's uploads: counted under local trust, expected where the size of a cohort is secret."""
    if outcome.release.contributors is not None:
        return outcome.bytes_up
    return round(expected * query.wire.message_size)


def _cohort_words(trust: str, cohort: list[int], expected: float) -> str:
    return f"{len(cohort)} clients" if trust == "local" else f"about {expected:.0f} clients"


# --- evaluation ------------------------------------------------------------------------------------


def _evaluate_round(live: Live, folder: RunFolder, ledger: Ledger, now: _Progress, listener: Listener) -> None:
    """Writes and shows the row of the last round that is done (0: before the first)."""
    number, every = max(0, now.slot), live.recipe.evaluation.every
    row: dict[str, Any] = {"round": number, "epsilon": _spent(ledger), "bytes_up": now.bytes_up}
    if number == 0 or (every and number % every == 0):
        few = live.recipe.evaluation.progress_examples
        row["loss"] = held_out_loss(live.lora, now.state.adapter_D, live.held_out[:few]).value
        if live.questions:
            share = max(1, few // len(live.questions))
            options = [four for fours, _ in live.questions.values() for four in fours[:share]]
            answers = [answer for _, given in live.questions.values() for answer in given[:share]]
            row["accuracy"] = multiple_choice(live.lora, now.state.adapter_D, options, answers).value
    folder.append_metrics(row)
    listener.round_done(row)


def _spent(ledger: Ledger) -> dict[str, float | str]:
    return {name: "inf" if epsilon == float("inf") else epsilon for name, epsilon in ledger.spent().items()}


def _results(live: Live, adapter_D: Tensor) -> dict[str, Any]:
    """Loss and accuracy of the base model, of the untouched adapter (they must agree) and of this run."""
    zero = torch.zeros_like(live.lora.initial_D)
    models = {"base model": zero, "zero update": live.lora.initial_D, "this run": adapter_D}
    return {
        name: {
            "loss": _estimate(held_out_loss(live.lora, vector, live.held_out)),
            "accuracy": {
                key: _estimate(multiple_choice(live.lora, vector, options, answers))
                for key, (options, answers) in live.questions.items()
            },
        }
        for name, vector in models.items()
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "count": estimate.count}


# --- what is left behind ---------------------------------------------------------------------------


def _finish(
    live: Live, folder: RunFolder, ledger: Ledger, now: _Progress, encoder: Encoder, listener: Listener
) -> RunResult:
    from drencoder.report import write_report

    listener.say("evaluating base model, zero update and this run")
    with folder.replacing(folder.adapter) as temporary:
        live.lora.save(now.state.adapter_D, temporary)
    certificate = _certificate(live, ledger, now, encoder)
    folder.write_json(folder.certificate, certificate)
    write_report(folder.path)
    listener.finished(certificate)
    return RunResult(folder.path, folder.adapter, folder.ledger, folder.read_metrics(), certificate)


def _certificate(live: Live, ledger: Ledger, now: _Progress, encoder: Encoder) -> dict[str, Any]:
    recipe, plan, layout = live.recipe, live.overview.privacy, live.lora.layout
    privacy = ledger.certificate()
    uploads = plan.expected_cohort * sum(1 for slot in ledger.charges() if slot > 0)
    return {
        "version": 1,
        "drencoder": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": recipe.name,
        "statement": _statement(plan, privacy["observers"]),
        **privacy,
        "rounds": now.slot,
        "results": _results(live, now.state.adapter_D),
        "bytes": {
            "uploaded": now.bytes_up,
            "counted": "counted" if plan.trust == "local" else "expected: the size of a secret cohort is not published",
            "plain_lora": round(uploads * layout.size * BYTES_PER_VALUE[recipe.encoder.wire_dtype]),
        },
        "encoder": encoder.describe() | _flat(now.gate or {}),
        "stage1": {"prior": recipe.prior.source, **(now.stage1 or {})},
        "data": live.texts.source.provenance,
        "model": recipe.model.source,
    }


def _flat(gate: Mapping[str, Any]) -> dict[str, Any]:
    return {f"gate_{kind}_{key}": value for kind, facts in gate.items() for key, value in facts.items()}


def _statement(plan: PrivacyPlan, observers: Mapping[str, Any]) -> str:
    """The promise in one sentence."""
    if plan.non_private:
        return "This run added no noise: it has no privacy guarantee of any kind and is a baseline only."
    if plan.noise == "replay":
        return "This run's noise can be computed again: it has no privacy guarantee and is a test only."
    seen = {name: row["by_relation"][plan.relation]["epsilon_pld"] for name, row in observers.items()}
    words = {"add_remove": "adding or removing", "replace_one": "replacing"}[plan.relation]
    cost = seen["server" if plan.trust == "local" else "public"]
    promise = f"({float(cost):.3f}, {plan.delta:g})-differential privacy for {words} one client with all its text"
    if plan.trust == "local":
        rest = f"those who see only sums and the model: epsilon {float(seen['public']):.3f}"
        return f"Against the server: {promise}. Against {rest}."
    return f"Against everyone but the server: {promise}. The server is trusted: there is no guarantee against it."


# --- checkpoints -----------------------------------------------------------------------------------


def _checkpoint_path(folder: RunFolder) -> Path:
    return folder.checkpoints / "latest.safetensors"


def _save_checkpoint(folder: RunFolder, ledger: Ledger, now: _Progress) -> None:
    """One file, replaced atomically: tensors, and the rest as JSON in its header."""
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in now.state.tensors().items()}
    tensors |= {f"encoder.{name}": tensor.contiguous() for name, tensor in (now.encoder_state or {}).items()}
    facts = {
        "slot": now.slot,
        "steps": now.state.steps,
        "bytes_up": now.bytes_up,
        "prior": now.prior.to_dict() if now.prior else None,
        "gate": now.gate,
        "stage1": now.stage1,
        "ledger_head": ledger.head,
    }
    folder.write(_checkpoint_path(folder), save(tensors, metadata={"drencoder": json.dumps(facts)}))


def _load_checkpoint(folder: RunFolder, live: Live, ledger: Ledger) -> _Progress:
    path = _checkpoint_path(folder)
    if not path.exists():
        return _Progress(ServerState.start(live.lora.initial_D), slot=-1)
    data = path.read_bytes()
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["drencoder"])
    seq, digest = facts["ledger_head"]
    if not ledger.contains((seq, digest)):
        raise ArtifactError(
            f"{folder.ledger} lacks charges that {path.name} knows of: restore the whole ledger from a copy. A run "
            "without it has no guarantee."
        )
    if tensors["state.adapter"].shape != live.lora.initial_D.shape:
        raise ArtifactError(f"{path} is of another adapter: restore the run's own recipe.")
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    prior = facts["prior"]
    return _Progress(
        state=ServerState.of(state, facts["steps"]),
        slot=facts["slot"],
        bytes_up=facts["bytes_up"],
        prior=GaussianPrior.from_dict(prior, live.lora.layout.segments) if prior else None,
        encoder_state={
            name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")
        },
        gate=facts["gate"],
        stage1=facts["stage1"],
    )
