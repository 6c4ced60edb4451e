"""The order of the stages: plan, stage 1, gate, stage 2, evaluation, certificate; and going on after a kill.

Legend: D adapter values.

What is on disk, in order, for every slot (0 = stage 1, 1..T = rounds): the charge in the ledger, then the release's
consequence in the checkpoint, one file that is replaced atomically. A kill between the two costs a charge and no more.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from drencoder.encoders.contract import Encoder
from drencoder.errors import BudgetError, QuorumError
from drencoder.evaluation.held_out import held_out_loss, multiple_choice
from drencoder.evaluation.outcomes import measure_all
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import update_query
from drencoder.federated.round import released_update
from drencoder.federated.server_optimizer import ServerState, learning_rate, server_step
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs.asking import ask_cohort, downloaded_bytes, uploaded_bytes
from drencoder.runs.build import EngineMaker, Live, build
from drencoder.runs.certificate import check_same_recipe, file_digests, make_certificate, recipe_digest
from drencoder.runs.checkpoint import Progress, float32_bytes, load_checkpoint, save_checkpoint
from drencoder.runs.plan_overview import Overview
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.stage1 import fit_encoder, refresh_encoder, run_stage1

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


def run(
    recipe: Recipe, folder: str | Path, listener: Listener | None = None, engine: EngineMaker | None = None
) -> RunResult:
    """Runs a recipe into a new folder; `engine` makes what reaches the clients (default: this process trains them).

    Raises:
      DrencoderError: something cannot be had, before the folder exists; or the disk is full, later on.
    """
    listener = listener or _Silent()
    path = Path(folder)
    RunFolder.check_free(path)
    live = _prepare(recipe, listener, engine)
    run_folder = RunFolder.create(path, recipe.to_toml())
    plan = live.plan
    key = hashlib.sha256(f"replay/{recipe.seed}".encode()).digest() if plan.noise == "replay" else None
    facts = {"run_id": secrets.token_hex(8), "recipe": recipe_digest(recipe)}
    with Ledger.create(run_folder.ledger, plan, key=key, **facts) as ledger:
        run_folder.begin()
        start = Progress(ServerState.start(live.lora.initial_D))
        return _drive(live, run_folder, ledger, start, listener)


def resume(folder: str | Path, listener: Listener | None = None, engine: EngineMaker | None = None) -> RunResult:
    """Goes on with a run that was killed, with its own recipe, ledger and checkpoint.

    Raises:
      ArtifactError: the folder is not a run's, or its ledger was changed or cut.
    """
    listener = listener or _Silent()
    run_folder = RunFolder.open(Path(folder))
    recipe = load_recipe(run_folder.recipe)
    with Ledger.open(run_folder.ledger) as ledger:
        check_same_recipe(ledger, recipe)
        live = _prepare(recipe, listener, engine)
        start = load_checkpoint(run_folder, ledger, live.lora.initial_D, live.lora.layout.segments)
        listener.say(f"resuming after {'nothing' if start.slot < 0 else f'slot {start.slot}'}")
        run_folder.keep_metrics([row for row in run_folder.read_metrics() if row["round"] <= start.slot])
        return _drive(live, run_folder, ledger, start, listener)


def _prepare(recipe: Recipe, listener: Listener, engine: EngineMaker | None) -> Live:
    live = build(recipe, engine)
    listener.planned(live.overview)
    return live


def _drive(live: Live, folder: RunFolder, ledger: Ledger, now: Progress, listener: Listener) -> RunResult:
    """All stages from `now` on. Budget that runs out ends stage 2 early and cleanly."""
    plan = live.plan
    real = None
    if now.slot < 0 and plan.stage1_rate > 0:
        now, real = run_stage1(live, ledger, now, listener.say)
        if real is None:  # real gradients are never stored: what was made of them is, below
            save_checkpoint(folder, ledger, now)
    if now.gate is None:
        now, encoder = fit_encoder(live, now, real, listener.say)
        save_checkpoint(folder, ledger, now)
    else:
        encoder = live.encoder(now.prior, dict(now.encoder_state or {}))
    if max(0, now.slot) not in {row["round"] for row in folder.read_metrics()}:
        _evaluate_round(live, folder, ledger, now, listener)  # the start, or a round killed before its row was written
    for slot in range(max(1, now.slot + 1), plan.rounds + 1):
        now, encoder = refresh_encoder(live, now, encoder, slot)
        try:
            now = _round(live, ledger, now, encoder, slot, listener)
        except BudgetError as error:
            listener.say(f"stopped after round {now.slot}: {error}")
            break
        except QuorumError as error:
            listener.say(f"round {slot} was abandoned, its charge stays: {error}")
            now = replace(now, slot=slot)
        save_checkpoint(folder, ledger, now)
        _evaluate_round(live, folder, ledger, now, listener)
    return _finish(live, folder, ledger, now, encoder, listener)


def _round(live: Live, ledger: Ledger, now: Progress, encoder: Encoder, slot: int, listener: Listener) -> Progress:
    """One round: charge, gather, release, step. Reads like the algorithm; `federated.round` has each line."""
    recipe, plan = live.recipe, live.plan
    if ledger.resume_rule(slot) == "skip":
        listener.say(f"round {slot} was charged but its result was lost: skipped, so that no client releases twice")
        ledger.record_lost(slot)
        return replace(now, slot=slot)
    adaptive_clip = _adaptive_clip(recipe, now)
    query = update_query(encoder, recipe, slot, adaptive_clip, now.prior)
    result, permit = ask_cohort(live, ledger, query, now.state.adapter_D)
    direction_D = released_update(query, result.release, permit, plan.expected_cohort)
    if result.rejected or result.nonfinite:
        listener.say(f"round {slot}: {result.rejected} messages rejected, {result.nonfinite} updates not finite")
    sent = uploaded_bytes(result, plan.expected_cohort, query)
    state = server_step(now.state, direction_D, recipe.server, learning_rate(recipe.server, slot, plan.rounds))
    ledger.record_release(slot, float32_bytes(state.adapter_D), "adapter")
    next_clip = adaptive_clip.after(result.release.value, plan.expected_cohort).clip_l2 if adaptive_clip else None
    asked = plan.expected_cohort if result.release.contributors is None else result.release.contributors
    down = round(asked * downloaded_bytes(encoder, live.lora.layout.size)) + result.bytes_down
    return replace(
        now, state=state, slot=slot, bytes_up=now.bytes_up + sent, clip_l2=next_clip, bytes_down=now.bytes_down + down
    )


def _adaptive_clip(recipe: Recipe, now: Progress) -> AdaptiveClip | None:
    """The clip of this round, if it follows the codes' norms."""
    privacy = recipe.privacy
    if privacy.clip == "fixed":
        return None
    return AdaptiveClip(now.clip_l2 or privacy.clip_l2)


# --- evaluation ------------------------------------------------------------------------------------


def _evaluate_round(live: Live, folder: RunFolder, ledger: Ledger, now: Progress, listener: Listener) -> None:
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


# --- what is left behind ---------------------------------------------------------------------------


def _finish(
    live: Live, folder: RunFolder, ledger: Ledger, now: Progress, encoder: Encoder, listener: Listener
) -> RunResult:
    from drencoder.runs.report import write_report

    listener.say("evaluating base model, zero update and this run")
    with folder.replacing(folder.adapter) as temporary:
        live.lora.save(now.state.adapter_D, temporary)
    outcomes = measure_all(live.lora, now.state.adapter_D, live.held_out, live.questions)
    folder.write_json(folder.outcomes, {name: outcome.to_dict() for name, outcome in outcomes.items()})
    certificate = make_certificate(live, ledger, now, encoder)
    certificate["results"] = {name: outcome.estimates() for name, outcome in outcomes.items()}
    folder.write_json(folder.certificate, certificate)
    write_report(folder.path)
    ledger.record_closed(now.slot, file_digests(folder))
    listener.finished(certificate)
    return RunResult(folder.path, folder.adapter, folder.ledger, folder.read_metrics(), certificate)
