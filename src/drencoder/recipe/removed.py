"""Knobs, and values of knobs, that earlier versions had: what the error for each of them says. No torch, no TOML.

The table is read only for a key or a value that is not valid any more, so an entry may stand here before its knob goes.
"""

from drencoder.errors import RecipeError
from drencoder.reading import shown

_FIXED = "it is always {}"
_LM_EVAL = "`drencoder evaluate RUN --tasks ...` asks whole benchmarks as lm-eval does"
_ROTATED = "use rotated4, rotated2 or rotated1, or float32"

REMOVED: dict[str, str] = {
    "adapter.layers": "name the modules of these layers in adapter.targets, such as layers.0.self_attn.q_proj",
    "data.alpha": _FIXED.format("0.5"),
    "data.split": "write the split behind the place, such as data.source = 'hub:ORG/NAME:validation'",
    "data.task": "write data.source = 'embedded:next' or 'embedded:facts'; plain 'embedded' teaches letters",
    "encoder.architecture": "choose encoder.name = 'autoencoder-cnn1d' or 'autoencoder-unet'; 'autoencoder' is the ResNet",
    "encoder.explore": _FIXED.format("0.25"),
    "encoder.floor": _FIXED.format("0.6"),
    "encoder.normalise": "encoder.name = 'autoencoder' scales by the root mean square, and 'autoencoder-published' does not scale",
    "encoder.tensors": "hybrid always sends LoRA's B alone; sending A as well lost 9 % to 185 % (docs/results/utility.md)",
    "encoder.train_steps": "the auto-encoder trains 400 steps at most and stops early",
    "encoder.wire_dtype=float16": _ROTATED,
    "encoder.wire_dtype=int2": _ROTATED,
    "encoder.wire_dtype=int4": _ROTATED,
    "encoder.wire_dtype=int8": _ROTATED,
    "evaluation.ceval": "name the place in evaluation.benchmarks, such as 'ceval=FOLDER'",
    "evaluation.max_tokens": "a question may have data.max_tokens tokens",
    "evaluation.mmlu": "name the place in evaluation.benchmarks, such as 'mmlu=FOLDER'",
    "evaluation.progress_examples": "an evaluation between rounds takes an eighth of evaluation.examples",
    "evaluation.prompts": "`drencoder generate RUN TEXT` answers any prompt",
    "evaluation.questions": "evaluation.examples counts questions, too",
    "evaluation.shots": "a run's quick score shows no examples; " + _LM_EVAL,
    "evaluation.split": "a run's quick score asks the questions that its benchmark is scored on; " + _LM_EVAL,
    "evaluation.subjects": "a run's quick score asks all subjects; " + _LM_EVAL,
    "evaluation.template": _LM_EVAL,
    "local.upload=state": "use increment",
    "model.dtype=float16": "it loses small gradients; use bfloat16, or float32 where a processor has no products in bfloat16",
    "prior.clip_l2": "stage 1 clips at privacy.clip_l2, as the rounds do",
    "prior.collection": "clients always train by themselves in stage 1",
    "prior.d1_share": _FIXED.format("0.3"),
    "prior.epochs": "stage 1 asks for statistics of each of local.epochs",
    "prior.noise_ratio": "stage 1 always has a round's noise multiplier",
    "prior.public_clients": _FIXED.format("16"),
    "prior.rank": _FIXED.format("64"),
    "prior.refresh": "an encoder of public text or of released momentum is made anew in every round",
    "prior.synthetic": "the auto-encoder always trains on 512 synthetic gradients",
    "privacy.clip_quantile": "an adaptive clip always follows the median",
    "privacy.clip_rate": _FIXED.format("0.3"),
    "server.beta2": _FIXED.format("0.99"),
    "server.decoding": "the server always decodes plainly",
    "server.tau": _FIXED.format("1e-8"),
}
"""`section`, `section.key` or `section.key=value` -> the end of a sentence that says what to do instead."""


def reject_removed_key(where: str, origin: str = "") -> None:
    """Raises `RecipeError` for a section or a `section.key` that an earlier version had; does nothing for any other.

    `origin` is the file that has it. A run's own recipe is not to be mended: its ledger has the digest.
    """
    if where in REMOVED:
        is_runs = origin.endswith("recipe.resolved.toml")
        cure = f" {origin} is of a run that had it: use the version of drencoder that made that run." if is_runs else ""
        raise RecipeError(f"{where} was removed in 0.2: {REMOVED[where]}.{cure}")


def reject_removed_value(where: str, value: object) -> None:
    """Raises `RecipeError` for a value that `section.key` could have in an earlier version; does nothing for any other."""
    ending = REMOVED.get(f"{where}={value}")
    if ending is not None:
        raise RecipeError(f"{where} = {shown(value)} was removed in 0.2: {ending}.")
