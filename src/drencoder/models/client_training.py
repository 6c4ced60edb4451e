"""What a client computes, as one verb: from the shared adapter and its own records to updates.

Legend: K clients, D adapter values, E epochs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from drencoder.data.tokenization import Example
from drencoder.errors import DeviceError
from drencoder.models.cohort_training import adapter_after, cohort_updates, num_steps
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed


class ClientTrainer(Protocol):
    """Trains clients. It knows neither codes, noise, rounds of a protocol nor epsilon."""

    @property
    def batch_clients(self) -> int:
        """How many clients it is best given at a time."""
        ...

    def train_clients(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        """Updates (K, E * D), float32: of each client the updates of `epochs` epochs, one after the other.

        Row i is a function of the adapter, the seeds and the records of `clients[i]`.
        """
        ...


@final
@dataclass(frozen=True)
class CohortTrainer:
    """Trains up to `batch_clients` clients of a causal language model as one batch.

    `examples_of(client, slot)` gives the tokenised examples that one client uses in a slot; they live for one batch of
    clients. A client without examples sends a zero update. A client whose training raises sends NaN, which the clip makes
    zero and counts: what it holds must not decide whether the others' contributions arrive (docs/guarantee.md). A fault that
    is nobody's own shows before a round is paid for, when the viability gate trains on the server's own text.

    `reports_failures`: whether standard error says that a client's training raised, and with which type of exception. Not under
    central trust, where the cohort is secret: each line would tell that one of the clients that can fail was in it.
    """

    lora: LoraModel
    examples_of: Callable[[int, int], list[Example]]
    local: config.Local
    seed: int
    batch_clients: int
    reports_failures: bool = True

    def train_clients(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        """See `ClientTrainer`."""
        try:
            return self._train(adapter_D, clients, slot, epochs)
        except DeviceError:  # of this machine, and no client's: nobody can train here any more
            raise
        except Exception as error:
            failure = type(error).__name__  # its type only: the text of an exception may quote the client's
            full = isinstance(error, torch.OutOfMemoryError)
        # Outside of the except clause, whose traceback would keep the failed batch's graph in memory.
        if full and self.lora.save_memory():
            return self.train_clients(adapter_D, clients, slot, epochs)
        if len(clients) > 1:  # halves: to find one of 32 takes ten trainings more, and not 32
            halves = clients[: len(clients) // 2], clients[len(clients) // 2 :]
            return torch.cat([self.train_clients(adapter_D, half, slot, epochs) for half in halves])
        if self.reports_failures:
            print(f"a client's training failed ({failure}); it contributes zero", file=sys.stderr)
        return torch.full((1, epochs * adapter_D.numel()), torch.nan, device=self.lora.device)

    def _train(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        records = [self.examples_of(client, slot) for client in clients]
        steps_K1 = torch.tensor([[num_steps(examples, self.local)] for examples in records], device=self.lora.device)
        adapter, updates = adapter_D.to(self.lora.device), []
        for epoch in range(epochs):
            seeds = [derive_seed(self.seed, "local-order", slot, client, epoch) for client in clients]
            updates.append(cohort_updates(self.lora, adapter, records, self.local, seeds))
            adapter = adapter_after(self.local, adapter, updates[-1], steps_K1)
        return torch.cat(updates, dim=1)
