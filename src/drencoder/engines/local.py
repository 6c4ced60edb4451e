"""The in-process engine: a cohort's clients train on this machine, many at a time.

What crosses the line between a client and the server is bytes, here as on a network.
"""

import sys
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
from drencoder.training import advanced, client_update, cohort_updates, num_steps

__all__ = ["LocalEngine"]


@final
@dataclass(frozen=True)
class LocalEngine:
    """Trains `parallel` clients as one batch; 1 = one by one through PEFT's own forward.

    `examples_of(client, slot)` gives the tokenised examples that one client uses in a slot; they live for one batch of
    clients. `tolerant` is for sites: a client whose training raises contributes zero, since what it holds must not decide
    whether the others' contributions arrive (docs/guarantee.md).
    """

    lora: LoraModel
    examples_of: Callable[[int, int], list[Example]]
    local: config.Local
    seed: int
    parallel: int
    tolerant: bool = False

    def ready(self) -> None:
        """This process is always there."""

    def gather(
        self, query: CohortQuery, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload]:
        """Asks every client of the cohort; yields what they send, some clients at a time."""
        for start in range(0, len(cohort), self.parallel):
            clients = cohort[start : start + self.parallel]
            update = self._tolerated if self.tolerant else self._updates
            yield query.upload(update(query, adapter_D, clients), clients, permit, noise)

    def _tolerated(self, query: CohortQuery, adapter_D: Tensor, clients: Sequence[int]) -> Tensor:
        """As `_updates`, with rows of NaN, which the clip makes zero, for clients whose training raises."""
        try:
            return self._updates(query, adapter_D, clients)
        except Exception as error:
            if len(clients) > 1:
                return torch.cat([self._tolerated(query, adapter_D, [client]) for client in clients])
            # Its type only: the text of an exception may quote the client's.
            print(f"client {clients[0]}: {type(error).__name__} in training; it contributes zero", file=sys.stderr)
            return torch.full((1, query.epochs * adapter_D.numel()), torch.nan)

    def _updates(self, query: CohortQuery, adapter_D: Tensor, clients: Sequence[int]) -> Tensor:
        """What the clients compute, (K, epochs * D): the updates of as many epochs as the query asks for, in a row."""
        owned = [self.examples_of(client, query.slot) for client in clients]
        steps_K1 = torch.tensor([[num_steps(mine, self.local)] for mine in owned], device=self.lora.device)
        adapter, path = adapter_D.to(self.lora.device), []
        for epoch in range(query.epochs):
            seeds = [derive_seed(self.seed, "local-order", query.slot, client, epoch) for client in clients]
            path.append(self._train(adapter, owned, seeds))
            adapter = advanced(self.local, adapter, path[-1], steps_K1)
        return torch.cat(path, dim=1)

    def _train(self, adapter: Tensor, owned: Sequence[list[Example]], seeds: Sequence[int]) -> Tensor:
        if self.parallel > 1:
            return cohort_updates(self.lora, adapter, owned, self.local, seeds)
        starts = adapter.expand(len(owned), -1)
        one_by_one = zip(starts, owned, seeds, strict=True)
        return torch.stack([client_update(self.lora, own, mine, self.local, seed) for own, mine, seed in one_by_one])
