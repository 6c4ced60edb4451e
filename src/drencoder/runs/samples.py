"""Three answers before and after: what base and adapted model say to prompts that everybody may read.

No text of a client is asked, nor text that the server owns or that owners were set aside with: what is shown here goes into the report.
Answers are post-processing of the released adapter. A run without privacy shows none, since its answers could repeat a client's text.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.evaluation_text import evaluation_basis
from drencoder.errors import DataError, ModelError
from drencoder.evaluation.samples import answer
from drencoder.recipe.recipe import Recipe
from drencoder.rng import derive_seed
from drencoder.runs.build import Components

_PROMPTS = 3
_TOKENS = 40  # of an answer: two models answer, and the cost must stay far below that of a round
_GENERAL = (
    "Explain in one sentence why the sky is blue.",
    "Write one friendly sentence to a new neighbour.",
    "What should I do if I have lost my bank card?",
)


@dataclass(frozen=True)
class Samples:
    """`rows` have `prompt`, `base` and `adapted`; `prompts_are` says whose prompts these are, in words."""

    prompts_are: str
    rows: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def answer_prompts(components: Components, adapter_D: Tensor) -> Samples:
    """Lets the base model and the adapted one answer a few public prompts, always with the most likely token.

    A prompt that cannot be asked, such as one that a chat template refuses, is left out.
    """
    prompts_are, records = _prompts(components)
    lora, tokenizer, rows = components.lora, components.texts.tokenizer, []
    models = {"base": torch.zeros_like(lora.initial_D), "adapted": adapter_D.to(lora.device)}
    for record in records:
        try:
            said = {
                name: answer(lora, vector_D, tokenizer, record, max_tokens=_TOKENS).text
                for name, vector_D in models.items()
            }
        except (DataError, ModelError):
            continue
        prompt = "\n\n".join(part for part in (record["instruction"], record.get("context", "")) if part)
        rows.append({"prompt": prompt, **said})
    return Samples(prompts_are, rows)


def _prompts(components: Components) -> tuple[str, list[dict[str, str]]]:
    """Whose prompts they are, and records."""
    recipe, texts = components.recipe, components.texts
    if texts.evaluation is not None and _is_public_evaluation(recipe):
        return "of the public evaluation data", [dict(record) for record in texts.evaluation(_PROMPTS)]
    if texts.public is not None and recipe.prior.public not in ("", "self", "embedded"):
        drawn = texts.public.draw(_PROMPTS, derive_seed(recipe.seed, "samples"))
        return f"of public text: {texts.public.declared}", [dict(text) for text in drawn if not isinstance(text, tuple)]
    return "general ones", [{"instruction": text} for text in _GENERAL]


def _is_public_evaluation(recipe: Recipe) -> bool:
    """Whether everybody may read the evaluation data: generated, or a published benchmark."""
    kind = recipe.evaluation.data.partition(":")[0]
    return evaluation_basis(recipe) == "generated" or kind in TAXONOMIES
