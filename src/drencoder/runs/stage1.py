"""Stage 1: from a charged question to a cohort, over the prior, to a fitted encoder that the gate has seen.

`moments` is DR-Encoder's way: noised statistics, a Gaussian prior, synthetic gradients. `gradients` is FedCG's
(CG-FedLLM, https://arxiv.org/abs/2405.13746), the baseline: real gradients, which only a slot that the ledger has
charged as non-private can ask for.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.planning import clip_words, declared
from drencoder.encoders.request import TrainingGradients
from drencoder.encoders.viability import GateResult, measure_viability, require_viable
from drencoder.errors import LostError, QuorumError, RefusedError
from drencoder.federated.query import gradient_query, moment_query
from drencoder.federated.round import message_rows, message_wire
from drencoder.privacy.ledger import Ledger
from drencoder.rng import derive_seed
from drencoder.runs.asking import ask_cohort, uploaded_bytes
from drencoder.runs.build import Components
from drencoder.runs.checkpoint import Progress, float32_bytes
from drencoder.runs.start_clip import measured_clip, stage1_clip

Say = Callable[[str], None]

_GATE_UPDATES = 64  # synthetic ones at most
_GATE_VALUES = 1 << 27  # and 512 MiB of them
_GATE_CLIENTS = 16  # make-believe ones, of text that the server may look at


def run_stage1(
    components: Components, ledger: Ledger, progress: Progress, say: Say
) -> tuple[Progress, TrainingGradients | None]:
    """Asks stage 1's cohort. Moments become a prior; real gradients are handed on and never stored.

    Raises:
      LostError: FedCG's gradients were charged in a run that was killed before the encoder was made of them.
    """
    lost = ledger.resume_rule(0) == "skip"
    if components.recipe.prior.source == "gradients":
        if lost:
            raise LostError("stage 1's real gradients were charged but lost with the killed run: start a new run.")
        return _real_gradients(components, ledger, progress, say)
    if lost:
        say("stage 1 was charged but its result was lost: going on with an uninformed prior")
        ledger.record_lost(0)
        return _uninformed(components, progress), None
    try:
        return _moments(components, ledger, progress, say), None
    except RefusedError:
        raise  # no round would get an answer either
    except QuorumError as error:
        say(f"stage 1 was abandoned, its charge stays: {error} Going on with an uninformed prior.")
        return _uninformed(components, progress), None


def _uninformed(components: Components, progress: Progress) -> Progress:
    """Stage 1 charged and nothing had of it."""
    prior = GaussianPrior.isotropic(components.lora.layout.segments)
    return replace(progress, slot=0, prior=prior, stage1={"lost": True})


def _moments(components: Components, ledger: Ledger, progress: Progress, say: Say) -> Progress:
    """The charged, noised moments of one cohort, and the prior that is fitted to them."""
    recipe, plan, segments = components.recipe, components.plan, components.lora.layout.segments
    epochs = f", for each of {recipe.stage1_epochs} epochs" if recipe.stage1_epochs > 1 else ""
    whom = f"{plan.population} sites" if plan.curated else f"about {plan.stage1_cohort:.0f} clients"
    say(f"stage 1: asking {whom} for two moments per tensor{epochs}")
    clip_l2 = stage1_clip(components)
    query = moment_query(segments, recipe, clip_l2)
    result, permit = ask_cohort(components, ledger, query, progress.state.adapter_D)
    release = result.release
    ledger.record_release(0, float32_bytes(release.value), "statistics")
    mean_V = release.value / plan.stage1_cohort
    prior = GaussianPrior.from_statistics(mean_V, segments, release.noise_std / plan.stage1_cohort)
    sizes = {"statistics": query.spec.wire.code_size, "message_bytes": message_wire(query, permit).message_size}
    facts = sizes | {"clip_l2": clip_l2}
    say(f"stage 1: {facts['statistics']} noised statistics, prior rms {prior.rms:.2e}")
    sent = uploaded_bytes(result, plan.senders(0), query)
    return replace(progress, slot=0, prior=prior, stage1=facts | {"bytes": sent}, bytes_up=progress.bytes_up + sent)


def _real_gradients(
    components: Components, ledger: Ledger, progress: Progress, say: Say
) -> tuple[Progress, TrainingGradients]:
    """FedCG: every client's own gradients, one by one and without noise."""
    query = gradient_query(components.lora.layout.size, components.recipe.stage1_epochs)
    say(
        f"stage 1: asking about {components.plan.stage1_cohort:.0f} clients for their REAL gradients, un-noised (FedCG: not private)"
    )
    components.engine.ready()
    ledger.record_sites(asdict(site) for site in components.engine.sites())
    permit = ledger.charge(0)
    uploads = components.engine.gather(query, progress.state.adapter_D, list(permit.cohort), permit, components.noise())
    rows, sent = message_rows(query, uploads, permit)
    from drencoder.published.fedcg import RealGradients

    real = RealGradients.collected(rows.reshape(-1, components.lora.layout.size), permit)
    facts = {"gradients": len(real), "message_bytes": query.spec.wire.message_size, "bytes": sent}
    say(f"stage 1: {len(real)} real gradients collected, {sent:,} bytes")
    return replace(progress, slot=0, stage1=facts, bytes_up=progress.bytes_up + sent), real


def fit_encoder(
    components: Components, progress: Progress, real: TrainingGradients | None, say: Say
) -> tuple[Progress, Encoder]:
    """Fits the encoder and asks the gate, before any of stage 2's budget is spent."""

    def trained(step: int, loss: float, checked: float | None) -> None:
        if checked is not None:
            say(f"auto-encoder, step {step}: training loss {loss:.4g}, validation loss {checked:.4g}")

    structured = components.start_updates if components.encoder_has_public_text else None
    if structured is not None:
        say(f"structured prior: {len(structured.update_ND)} updates of public text ({structured.declared})")
    encoder = components.encoder(progress.prior, real=real, public=structured, on_step=trained)
    seed = derive_seed(components.recipe.seed, "gate")
    gate, verdict = {}, None
    shown = components.gate_updates(progress.state.adapter_D, _GATE_CLIENTS)
    if shown is not None:
        verdict = measure_viability(encoder, shown[0], seed)
        gate["public"] = _facts(verdict)
        say(
            f"gate, {shown[1]}: the code keeps {verdict.captured_energy:.2%} of an update's energy (cosine {verdict.cosine:.3f})"
        )
    # After real gradients no prior was fitted that could draw any, and of public text it would be the encoder's own.
    if verdict is None or (real is None and structured is None):
        prior = progress.prior or GaussianPrior.isotropic(components.lora.layout.segments)
        count = min(_GATE_UPDATES, max(2, _GATE_VALUES // components.lora.layout.size))
        samples = prior.sample(count, seed)
        verdict = measure_viability(encoder, samples.values_ND, seed)
        gate["synthetic"] = _facts(verdict)
        say(f"gate, synthetic gradients: {verdict.sentence}")
    require_viable(verdict, allow=components.recipe.encoder.gate == "warn")
    progress = replace(progress, gate=gate, encoder_state=encoder.state())
    return _with_clip(components, progress, encoder, say), encoder


def _with_clip(components: Components, progress: Progress, encoder: Encoder, say: Say) -> Progress:
    """The clip of the first round: the recipe's, or measured on public text."""
    recipe = components.recipe
    if recipe.privacy.clip_l2:
        return progress
    clip_l2 = measured_clip(recipe, encoder, components.start_updates)
    say(f"clip: {clip_l2:g}, {clip_words(recipe, components.start_updates.declared)}")
    return replace(progress, clip_l2=clip_l2)


def _facts(result: GateResult) -> Mapping[str, Any]:
    return {
        "cosine": result.cosine,
        "captured_energy": result.captured_energy,
        "random_cosine": result.random_cosine,
        "viable": result.viable,
    }


def refresh_encoder(
    components: Components, progress: Progress, encoder: Encoder, slot: int
) -> tuple[Progress, Encoder]:
    """The encoder of round `slot`: one of public text or of the run's momentum is made anew in every round after the first.

    Bases that are two rounds old carry an eighth less (docs/log.md). Public text at the adapter as it is and released
    momentum alone go in.
    """
    if not declared(components.recipe).refreshed or slot == 1:
        return progress, encoder
    public = components.public_updates(progress.state.adapter_D, slot)
    # Without stage 1's moments: they are of the start, where LoRA's A has no gradient.
    # Where the momentum points, and where the whole run has led so far: noise averages out of the second.
    history_JD = torch.stack([progress.state.first_D, progress.state.adapter_D - components.lora.initial_D.cpu()])
    encoder = components.encoder(None, public=public, history_JD=history_JD)
    return replace(progress, encoder_state=encoder.state()), encoder
