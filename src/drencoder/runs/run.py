"""The order of the stages: plan, stage 1, gate, stage 2, evaluation, certificate; and going on after a kill.

Legend: D adapter values.

What is on disk, in order, for every slot (0 = stage 1, 1..T = rounds): the charge in the ledger, then the release's
consequence in the checkpoint, one file that is replaced atomically. A kill between the two costs a charge and no more.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from drencoder.data.evaluation_text import NO_EVALUATION
from drencoder.data.survey import with_population
from drencoder.encoders.contract import Encoder
from drencoder.errors import BudgetError, QuorumError, RefusedError
from drencoder.evaluation.held_out import choice_picks, held_out_loss
from drencoder.evaluation.outcomes import measure_all
from drencoder.evaluation.verdict import verdict
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import update_query
from drencoder.federated.round import released_update
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.federated.server_rate import learning_rate
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs.asking import ask_cohort, downloaded_bytes, uploaded_bytes
from drencoder.runs.build import Components, EngineMaker, build
from drencoder.runs.certificate import (
    STATED,
    TWIN_SENTENCE,
    adapter_digests,
    check_same_recipe,
    file_digests,
    make_certificate,
    recipe_digest,
)
from drencoder.runs.checkpoint import Progress, float32_bytes, load_checkpoint, save_checkpoint
from drencoder.runs.model_card import write_model_card
from drencoder.runs.plan_overview import Overview
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.samples import answer_prompts
from drencoder.runs.stage1 import fit_encoder, refresh_encoder, run_stage1
from drencoder.runs.twin import (
    TwinLines,
    check_twin,
    forget_weights,
    is_finished,
    make_private_folder,
    twin_components,
)


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
    twin: "RunResult | None" = None
    """The run's non-private twin, which nobody may see but who holds all clients' text."""


def run(
    recipe: Recipe,
    folder: str | Path,
    listener: Listener | None = None,
    engine: EngineMaker | None = None,
    *,
    twin: bool = False,
    samples: bool = False,
) -> RunResult:
    """Runs a recipe into a new folder; `engine` makes what reaches the clients (default: this process trains them).

    Args:
      twin: trains a twin without noise afterwards, for who holds all clients' text and nobody else (`runs.twin`).
      samples: lets base and adapted model answer a few public prompts (`runs.samples`).

    Raises:
      DrencoderError: something cannot be had, before the folder exists; or the disk is full, later on.
    """
    listener = listener or _Silent()
    path = Path(folder)
    RunFolder.check_free(path)
    check_twin(recipe, wanted=twin, here=engine is None)
    recipe = with_population(recipe) if engine is None else recipe
    components = _prepare(recipe, listener, engine)
    return _with_twin(run_built(components, path, listener, _Extras(twin, samples)), components, listener, wanted=twin)


def resume(
    folder: str | Path,
    listener: Listener | None = None,
    engine: EngineMaker | None = None,
    *,
    twin: bool = False,
    samples: bool = False,
) -> RunResult:
    """Goes on with a run that was killed, with its own recipe, ledger and checkpoint; `twin` and `samples` as for `run`.

    Raises:
      ArtifactError: the folder is not a run's, or its ledger was changed or cut.
    """
    listener = listener or _Silent()
    run_folder = RunFolder.open(Path(folder))
    recipe = load_recipe(run_folder.recipe)
    check_twin(recipe, wanted=twin, here=engine is None)
    components, result = _resume(run_folder, recipe, listener, _Extras(twin, samples), engine=engine)
    return _with_twin(result, components, listener, wanted=twin)


@dataclass(frozen=True)
class _Extras:
    """What a run leaves behind beside what every run leaves."""

    twin: bool = False
    samples: bool = False


_NO_EXTRAS = _Extras()


def run_built(components: Components, path: Path, listener: Listener, extras: _Extras = _NO_EXTRAS) -> RunResult:
    """Runs what `build` made, into a new folder."""
    recipe, plan = components.recipe, components.plan
    run_folder = RunFolder.create(path, recipe.to_toml())
    key = hashlib.sha256(f"replay/{recipe.seed}".encode()).digest() if plan.noise == "replay" else None
    facts = {"run_id": secrets.token_hex(8), "recipe": recipe_digest(recipe)}
    with Ledger.create(run_folder.ledger, plan, key=key, **facts) as ledger:
        run_folder.begin()
        start = Progress(ServerState.start(components.lora.initial_D))
        return _drive(components, run_folder, ledger, start, listener, extras)


def _resume(
    run_folder: RunFolder,
    recipe: Recipe,
    listener: Listener,
    extras: _Extras,
    *,
    engine: EngineMaker | None = None,
    components: Components | None = None,
) -> tuple[Components, RunResult]:
    """Goes on in this folder; the components are made where they are not at hand."""
    with Ledger.open(run_folder.ledger) as ledger:
        check_same_recipe(ledger, recipe)
        components = components or _prepare(recipe, listener, engine)
        start = load_checkpoint(run_folder, ledger, components.lora.initial_D, components.lora.layout.segments)
        listener.say(f"resuming after {'nothing' if start.slot < 0 else f'slot {start.slot}'}")
        run_folder.keep_metrics([row for row in run_folder.read_metrics() if row["round"] <= start.slot])
        return components, _drive(components, run_folder, ledger, start, listener, extras)


def _with_twin(result: RunResult, components: Components, listener: Listener, *, wanted: bool) -> RunResult:
    """Trains the run's twin, or goes on with it, if it is wanted. The run itself is finished and stays as it is."""
    if not wanted:
        return result
    own, lines = twin_components(components, result.certificate), TwinLines(listener.say)
    folder = RunFolder(RunFolder(result.folder).twin)
    if is_finished(folder):
        return replace(result, twin=_result(folder))
    make_private_folder(folder)
    lines.planned(own.overview)
    if folder.ledger.exists():
        _resume(folder, own.recipe, lines, _NO_EXTRAS, components=own)
    else:
        run_built(own, folder.path, lines)
    forget_weights(folder)
    return replace(result, twin=_result(folder))


def _result(folder: RunFolder) -> RunResult:
    certificate = folder.read_json(folder.certificate)
    return RunResult(folder.path, folder.adapter, folder.ledger, folder.read_metrics(), certificate)


def _prepare(recipe: Recipe, listener: Listener, engine: EngineMaker | None) -> Components:
    components = build(recipe, engine)
    listener.planned(components.overview)
    if left_out := components.lora.left_out:
        names = ", ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
        listener.say(
            f"adapter.targets = {recipe.adapter.targets[0]!r} leaves out layers that cannot have an adapter: {names}"
        )
    for sentence in components.texts.report(recipe.evaluation.examples):
        listener.say(sentence)
    return components


def _drive(
    components: Components,
    folder: RunFolder,
    ledger: Ledger,
    progress: Progress,
    listener: Listener,
    extras: _Extras,
) -> RunResult:
    """All stages from `now` on. Budget that runs out ends stage 2 early and cleanly."""
    plan = components.plan
    real = None
    if progress.slot < 0 and plan.stage1_rate > 0:
        progress, real = run_stage1(components, ledger, progress, listener.say)
        if real is None:  # real gradients are never stored: what was made of them is, below
            save_checkpoint(folder, ledger, progress)
    if progress.gate is None:
        progress, encoder = fit_encoder(components, progress, real, listener.say)
        save_checkpoint(folder, ledger, progress)
    else:
        encoder = components.encoder(progress.prior, dict(progress.encoder_state or {}))
    if max(0, progress.slot) not in {row["round"] for row in folder.read_metrics()}:
        _evaluate_round(
            components, folder, ledger, progress, listener
        )  # the start, or a round killed before its row was written
    for slot in range(max(1, progress.slot + 1), plan.rounds + 1):
        progress, encoder = refresh_encoder(components, progress, encoder, slot)
        try:
            progress = _round(components, ledger, progress, encoder, slot, listener)
        except BudgetError as error:
            listener.say(f"stopped after round {progress.slot}: {error}")
            break
        except QuorumError as error:
            listener.say(f"round {slot} was abandoned, its charge stays: {error}")
            progress = replace(progress, slot=slot)
            if isinstance(error, RefusedError):
                save_checkpoint(folder, ledger, progress)
                raise
        save_checkpoint(folder, ledger, progress)
        _evaluate_round(components, folder, ledger, progress, listener)
    return _finish(components, folder, ledger, progress, encoder, listener, extras)


def _round(
    components: Components, ledger: Ledger, progress: Progress, encoder: Encoder, slot: int, listener: Listener
) -> Progress:
    """One round: charge, gather, release, step. Reads like the algorithm; `federated.round` has each line."""
    recipe, plan = components.recipe, components.plan
    if ledger.resume_rule(slot) == "skip":
        listener.say(f"round {slot} was charged but its result was lost: skipped, so that no client releases twice")
        ledger.record_lost(slot)
        return replace(progress, slot=slot)
    adaptive_clip = _adaptive_clip(recipe, progress)
    query = update_query(encoder, recipe, slot, adaptive_clip, progress.prior, progress.clip_l2)
    result, permit = ask_cohort(components, ledger, query, progress.state.adapter_D)
    direction_D = released_update(query, result.release, permit, plan.expected_cohort)
    # Under central trust these counts depend on who is in a secret cohort: nobody is told them.
    if plan.capped and (result.rejected or result.nonfinite):
        listener.say(f"round {slot}: {result.rejected} messages rejected, {result.nonfinite} updates not finite")
    sent = uploaded_bytes(result, plan.senders(slot), query)
    state = server_step(progress.state, direction_D, recipe.server, learning_rate(recipe.server, plan, slot))
    ledger.record_release(slot, float32_bytes(state.adapter_D), "adapter")
    if adaptive_clip:
        progress = replace(progress, clip_l2=adaptive_clip.after(result.release.value, plan.expected_cohort).clip_l2)
    asked = plan.senders(slot) if result.release.contributors is None else result.release.contributors
    down = round(asked * downloaded_bytes(encoder, components.lora.layout.size)) + result.bytes_down
    return replace(
        progress,
        state=state,
        slot=slot,
        bytes_up=progress.bytes_up + sent,
        bytes_down=progress.bytes_down + down,
    )


def _adaptive_clip(recipe: Recipe, progress: Progress) -> AdaptiveClip | None:
    """The clip of this round, if it follows the codes' norms."""
    privacy = recipe.privacy
    if privacy.clip == "fixed":
        return None
    return AdaptiveClip(progress.clip_l2 or privacy.clip_l2)


# --- evaluation ------------------------------------------------------------------------------------


def _evaluate_round(
    components: Components, folder: RunFolder, ledger: Ledger, progress: Progress, listener: Listener
) -> None:
    """Writes and shows the row of the last round that is done (0: before the first)."""
    number, every = max(0, progress.slot), components.recipe.evaluation.every
    row: dict[str, Any] = {"round": number, "epsilon": _spent(ledger), "bytes_up": progress.bytes_up}
    if number == 0 or (every and number % every == 0):
        few = components.recipe.evaluation.progress_examples
        if components.held_out:
            row["loss"] = held_out_loss(components.lora, progress.state.adapter_D, components.held_out[:few]).value
        if components.questions:
            share = max(1, few // len(components.questions))
            options = [four for fours, _ in components.questions.values() for four in fours[:share]]
            answers = [answer for _, given in components.questions.values() for answer in given[:share]]
            picks = choice_picks(components.lora, progress.state.adapter_D, options)
            row["accuracy"] = sum(pick == answer for pick, answer in zip(picks, answers, strict=True)) / len(answers)
    folder.append_metrics(row)
    listener.round_done(row)


def _spent(ledger: Ledger) -> dict[str, float | str]:
    return {name: "inf" if epsilon == float("inf") else epsilon for name, epsilon in ledger.spent().items()}


# --- what is left behind ---------------------------------------------------------------------------


def _finish(
    components: Components,
    folder: RunFolder,
    ledger: Ledger,
    progress: Progress,
    encoder: Encoder,
    listener: Listener,
    extras: _Extras,
) -> RunResult:
    from drencoder.runs.report import write_report

    if components.held_out or components.questions:
        listener.say("evaluating base model, zero update and this run")
    with folder.replacing(folder.adapter) as temporary:
        components.lora.save(progress.state.adapter_D, temporary)
        components.texts.tokenizer.save(temporary)
    outcomes = measure_all(components.lora, progress.state.adapter_D, components.held_out, components.questions)
    stored = {name: outcome.to_dict() for name, outcome in outcomes.items()}
    folder.write_json(folder.outcomes, stored)
    certificate = make_certificate(components, ledger, progress, encoder)
    certificate["results"] = {name: outcome.estimates() for name, outcome in outcomes.items()}
    uniform_loss = math.log(components.lora.base.vocabulary)
    certificate["uniform_loss"] = uniform_loss
    certificate["verdict"] = verdict(stored, uniform_loss, NO_EVALUATION)
    if extras.twin or folder.twin.exists():
        certificate["twin"] = TWIN_SENTENCE
    if extras.samples and certificate["private"]:
        listener.say("asking base and adapted model a few public prompts")
        folder.write_json(folder.samples, answer_prompts(components, progress.state.adapter_D).to_dict())
    stated = {key: certificate[key] for key in STATED} | {"adapter": adapter_digests(folder)}
    save_checkpoint(folder, ledger, progress, stated)
    folder.write_json(folder.certificate, certificate)
    folder.write(folder.model_card, write_model_card(folder.read_json(folder.certificate)).encode())
    write_report(folder.path)
    ledger.record_closed(progress.slot, file_digests(folder))
    listener.finished(certificate)
    return RunResult(folder.path, folder.adapter, folder.ledger, folder.read_metrics(), certificate)
