"""Whose text the attacks on content and on membership are tried on, and what their attacker learns from.

Legend: N victims, M shadow clients, D adapter values.

Victims are the recipe's own clients with one record each, which is easier to attack than a mean of several; shadows are make-believe
clients whose text the server owns or the public has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from drencoder.data.tokenization import Example
from drencoder.data.units import everyone
from drencoder.models.cohort_training import cohort_updates
from drencoder.rng import derive_seed
from drencoder.runs.build import Components

_LEAST_SHADOWS = 32


@final
@dataclass(frozen=True)
class Victims:
    """Texts and updates, row by row, all at one adapter. Nothing of a text leaves the audit."""

    texts: Sequence[Example]
    update_ND: Tensor
    shadow_texts: Sequence[Example]
    shadow_MD: Tensor


def gather_victims(
    components: Components, adapter_D: Tensor, *, victims: int, shadows: int, seed: int
) -> Victims | None:
    """None where the recipe has neither evaluation text nor public text that an attacker could learn from."""
    known = components.texts.held_out(shadows)
    if len(known) < _LEAST_SHADOWS and components.texts.public is not None:
        known = [
            examples[0] for examples in components.texts.public_clients(shadows, 1, derive_seed(seed, "audit-shadows"))
        ]
    if len(known) < _LEAST_SHADOWS:
        return None
    everybody = everyone(components.texts.source, components.plan.population)
    start, texts = derive_seed(seed, "audit-victims") % len(everybody), []
    for place in range(start, start + len(everybody)):
        texts += components.texts.client(everybody[place % len(everybody)], 1)[:1]
        if len(texts) == victims:
            break
    return Victims(
        texts, one_record_updates(components, adapter_D, texts), known, one_record_updates(components, adapter_D, known)
    )


def one_record_updates(components: Components, adapter_D: Tensor, texts: Sequence[Example]) -> Tensor:
    """One update (len(texts), D) per client of one record, as the recipe's clients compute it."""
    return cohort_updates(
        components.lora, adapter_D, [[text] for text in texts], components.recipe.local, [0] * len(texts)
    ).cpu()
