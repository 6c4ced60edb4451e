"""This module draws whose updates are attacked: disjoint groups of clients, and what the attacker knows of the population.

Legend: N clients of a group, M shadow clients, D adapter values.

Four groups, all drawn from the same population: `targets` are attacked; `collected` took part in stage 1; `reference`
are known to nobody but a reference model (leakage 2); `shadow` are make-believe clients with the server's own
held-out text, on which an attacker learns. Every client holds one record, the hardest case: a mean over many
records hides each of them better, and this is not what is under test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from drencoder.audit.warm_start import warm_adapter
from drencoder.data.tokenization import Example
from drencoder.errors import DataError
from drencoder.models.cohort_training import cohort_updates
from drencoder.rng import derive_seed
from drencoder.runs.build import Components

MIN_CLIENTS = 8
_WARM_STEPS = 4
_WARM_EXAMPLES = 32  # of each step
_SHADOWS = 1024
_MIN_SHADOWS = 16


@final
@dataclass(frozen=True)
class Subjects:
    """Updates (rows) and texts of the groups, all at the same `adapter_D`."""

    adapter_D: Tensor
    target_texts: Sequence[Example]
    target_ND: Tensor
    collected_ND: Tensor
    reference_ND: Tensor
    shadow_texts: Sequence[Example]
    shadow_MD: Tensor


def gather_subjects(components: Components, clients: int, seed: int) -> Subjects:
    """Trains all groups, `clients` in each but the shadows.

    Raises:
      DataError: fewer than 8 clients, a population that is too small, or too little held-out text.
    """
    population = components.recipe.federation.population
    if clients < MIN_CLIENTS:
        raise DataError(f"The audit was asked for {clients} clients; its intervals need at least {MIN_CLIENTS}.")
    if population < 3 * MIN_CLIENTS:
        raise DataError(
            f"The audit needs three groups of at least {MIN_CLIENTS} clients and the population has {population:,}: set "
            f"federation.population to {3 * MIN_CLIENTS} or more."
        )
    if 3 * clients > population:
        raise DataError(
            f"The audit of {clients:,} clients needs three such groups and the population has {population:,}: ask for "
            f"{population // 3:,} clients at most."
        )
    warm, shadow_texts = _split_server_texts(components)
    adapter_D = warm_adapter(components, warm)
    start = derive_seed(seed, "audit-clients") % (population - 3 * clients + 1)
    chosen = [components.texts.client(start + client, 1)[0] for client in range(3 * clients)]
    target_ND, collected_ND, reference_ND = _train_updates(components, adapter_D, chosen).split(clients)
    return Subjects(
        adapter_D=adapter_D,
        target_texts=chosen[:clients],
        target_ND=target_ND,
        collected_ND=collected_ND,
        reference_ND=reference_ND,
        shadow_texts=shadow_texts,
        shadow_MD=_train_updates(components, adapter_D, shadow_texts),
    )


def _split_server_texts(components: Components) -> tuple[list[Example], list[Example]]:
    """Splits the server's own text into what trains the adapter at first and what its make-believe clients hold."""
    num_warm = _WARM_STEPS * _WARM_EXAMPLES
    held_out = components.texts.held_out(num_warm + _SHADOWS)
    warm = min(num_warm, len(held_out) // 2)
    if len(held_out) - warm < _MIN_SHADOWS:
        raise DataError(
            f"The server has {len(held_out)} texts of evaluation data; the attacker learns from at least {2 * _MIN_SHADOWS}: name "
            "a file of so many that the server owns in evaluation.data, or raise data.held_out_share."
        )
    return held_out[:warm], held_out[warm:]


def _train_updates(components: Components, adapter_D: Tensor, texts: Sequence[Example]) -> Tensor:
    """Computes one update (len(texts), D) per client of one record, as the recipe's clients do."""
    clients = [[one] for one in texts]
    return cohort_updates(components.lora, adapter_D, clients, components.recipe.local, [0] * len(clients)).cpu()
