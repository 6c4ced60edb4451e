"""The in-process engine: a cohort's clients train on this machine, many at a time.

An engine has one verb, `gather`: bring a query to a cohort and bring the uploads back. It knows neither stage,
encoder nor epsilon. What crosses the line between a client and the server is bytes, here as on a network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drencoder import config
from drencoder.examples import Example
from drencoder.model import LoraModel
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource
from drencoder.rng import derive_seed
from drencoder.steps import CohortQuery, Upload
from drencoder.training import client_update, cohort_updates

__all__ = ["LocalEngine"]


@final
@dataclass(frozen=True)
class LocalEngine:
    """Trains `parallel` clients as one batch; 1 = one by one through PEFT's own forward.

    `examples_of(client)` gives one client's tokenised examples; they live for one batch of clients.
    """

    lora: LoraModel
    examples_of: Callable[[int], list[Example]]
    local: config.Local
    seed: int
    parallel: int

    def gather(
        self, query: CohortQuery, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload]:
        """Asks every client of the cohort; yields what they send, some clients at a time."""
        for start in range(0, len(cohort), self.parallel):
            clients = cohort[start : start + self.parallel]
            yield query.upload(self._updates(adapter_D, clients, query.slot), clients, permit, noise)

    def _updates(self, adapter_D: Tensor, clients: Sequence[int], slot: int) -> Tensor:
        owned = [self.examples_of(client) for client in clients]
        seeds = [derive_seed(self.seed, "local-order", slot, client) for client in clients]
        if self.parallel > 1:
            return cohort_updates(self.lora, adapter_D, owned, self.local, seeds)
        one_by_one = zip(owned, seeds, strict=True)
        return torch.stack([client_update(self.lora, adapter_D, mine, self.local, seed) for mine, seed in one_by_one])
