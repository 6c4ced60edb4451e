"""The three leakages of federated fine-tuning, shown without protection and measured with it.

The order is the paper's (DR-Encoder: Wu et al., AAAI-25, https://arxiv.org/abs/2412.17053, introduction): the upload, the
encoder, the result. Arms: no protection (plain LoRA), FedCG (CG-FedLLM, https://arxiv.org/abs/2405.13746) as published
and with noise, DR-Encoder as published, an un-noised sketch, and this package's random sketch with noise. All private arms have the
recipe's epsilon. One audit is one seed: the clients that are drawn, one set of trained encoders, replayable noise.
"""

from dataclasses import replace
from typing import Any, Protocol

from drencoder.encoders.identity import IdentityEncoder
from drencoder.errors import DataError
from drencoder.published.fitting import AutoencoderOptions
from drencoder.runs.build import Components
from drencoder.runs.start_clip import measured_clip
from leakage_study.findings import Audit
from leakage_study.membership import release_findings
from leakage_study.setup import AuditSetup, plan_under
from leakage_study.subjects import gather_subjects
from leakage_study.tokens import SpanAttack, token_findings
from leakage_study.training_set import training_set_findings

_ENCODER = "autoencoder-cnn1d"  # of the whole adapter: the published variant that carries most (1/32)
_MIN_TRIALS = 8
_NOTES = (
    "The adapter is a few non-private steps on the server's own text into training: at LoRA's start B = 0, and A's "
    "gradient, which the span attack reads, is zero.",
    "Every client holds one record, which is easier to attack than a mean over several.",
    "max AUC bounds every attack on one such release: on replacing a client (tokens), on adding one (the others). A "
    "measured AUC far below it is a fact about these attacks, not a promise.",
    "A code that carries nothing hides everything: read an auto-encoder's row beside its captured energy (the gate).",
)


class Listener(Protocol):
    """Is told what happens."""

    def say(self, text: str) -> None: ...


def audit_leakages(
    components: Components,
    *,
    clients: int = 64,
    seed: int = 0,
    listener: Listener | None = None,
    trials: int = 32,
    train_steps: int = 200,
) -> Audit:
    """Runs the three experiments on the recipe's model, text, adapter and epsilon. The same for the same arguments.

    Args:
      components: what `build.build` returns.
      clients: size of each of the three groups of clients (attacked, in stage 1, reference); at least 8.
      trials: releases that each membership attack sees; at least 8.
      train_steps: of each auto-encoder.

    Raises:
      DataError: too few clients or trials, too small a population, or too little held-out text.
      ModelError: an adapter or model that the token attack cannot read.
    """
    if trials < _MIN_TRIALS:
        raise DataError(f"The audit was asked for {trials} trials; its intervals need at least {_MIN_TRIALS}.")
    say = listener.say if listener else lambda _text: None
    if not components.recipe.privacy.clip_l2:  # there is no run to measure it in
        whole = IdentityEncoder(components.lora.layout.segments)
        clip_l2 = measured_clip(components.recipe, whole, components.start_updates)
        components = replace(components, recipe=components.recipe.changed({"privacy.clip_l2": clip_l2}))
    span = SpanAttack.of(components.lora)  # refuse an unknown model before any training
    say(f"audit: training {3 * clients} clients of one record, and shadow clients on the server's own text")
    setup = AuditSetup(
        components=components,
        subjects=gather_subjects(components, clients, seed),
        seed=seed,
        trials=trials,
        options=AutoencoderOptions(steps=train_steps, name=_ENCODER),
        local=plan_under(components, "local"),
        central=plan_under(components, "central"),
    )
    say("audit: an auto-encoder from noised statistics (DR-Encoder) and one from real gradients (FedCG)")
    arms = setup.make_arms()
    say("audit, leakage 1: tokens of a client's text, from its upload")
    tokens, example = token_findings(setup, arms, span)
    say("audit, leakage 2: membership in the auto-encoder's training set")
    training_set = training_set_findings(setup)
    say("audit, leakage 3: membership in a release")
    findings = (*tokens, *training_set, *release_findings(setup, arms))
    return Audit(findings, _facts(setup), example, _NOTES)


def _facts(setup: AuditSetup) -> dict[str, Any]:
    recipe = setup.components.recipe
    return {
        "recipe": recipe.name,
        "model": recipe.model.source,
        "adapter_size": setup.segments[-1].stop,
        "clients": len(setup.subjects.target_ND),
        "shadow_clients": len(setup.subjects.shadow_MD),
        "seed": setup.seed,
        "trials": setup.trials,
        "train_steps": setup.options.steps,
        "encoder": setup.options.name,
        "epsilon": recipe.privacy.epsilon,
        "delta": recipe.privacy.delta,
        "local_noise_multiplier": setup.sigma,
        "stage1_noise_multiplier": setup.stage1_sigma,
        "central_noise_multiplier": setup.central.noise_multiplier,
    }
