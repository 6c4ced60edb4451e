"""The in-process engine: a cohort's clients train on this machine, many at a time.

What crosses the line between a client and the server is bytes, here as on a network.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.data.tokenization import Example
from drencoder.federated.query import CohortQuery, Summed, Upload
from drencoder.federated.secure_round import hosted, node_of, round_settings, summed
from drencoder.models.cohort_training import advanced, client_update, cohort_updates, num_steps
from drencoder.models.lora import LoraModel
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import Stage

__all__ = ["LocalEngine"]


def _nobody(slot: int, stage: Stage, node: int) -> bool:
    return False


@final
@dataclass(frozen=True)
class LocalEngine:
    """Trains `parallel` clients as one batch; 1 = one by one through PEFT's own forward.

    `examples_of(client, slot)` gives the tokenised examples that one client uses in a slot; they live for one batch of
    clients. `tolerant` is for sites: a client whose training raises contributes zero, since what it holds must not decide
    whether the others' contributions arrive (docs/guarantee.md). Under secure aggregation the clients are spread over `nodes`,
    of which `threshold` must stay to the end, and `lost(slot, stage, node)` says which of them do not answer: for tests.
    """

    lora: LoraModel
    examples_of: Callable[[int, int], list[Example]]
    local: config.Local
    seed: int
    parallel: int
    tolerant: bool = False
    nodes: int = 1
    threshold: int = 1
    lost: Callable[[int, Stage, int], bool] = _nobody

    def ready(self) -> None:
        """This process is always there."""

    def gather(
        self, query: CohortQuery, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | Summed]:
        """Asks every client of the cohort; yields what they send, some clients at a time.

        Under secure aggregation it yields one sum over all. Raises VoidRoundError there when too few nodes answer.
        """
        if permit.shares is not None:
            yield self._aggregated(query, adapter_D, cohort, permit, noise)
            return
        for start in range(0, len(cohort), self.parallel):
            clients = cohort[start : start + self.parallel]
            yield query.upload(self._computed(query, adapter_D, clients), clients, permit, noise)

    def _computed(self, query: CohortQuery, adapter_D: Tensor, clients: Sequence[int]) -> Tensor:
        return (self._tolerated if self.tolerant else self._updates)(query, adapter_D, clients)

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

    def share_of(
        self, query: CohortQuery, adapter_D: Tensor, permit: Permit, noise: NoiseSource
    ) -> Callable[[Sequence[int]], npt.NDArray[np.uint32]]:
        """Secure aggregation, a node's side: trains clients and sums their shares; nothing is computed before it is called."""

        def share_of(clients: Sequence[int]) -> npt.NDArray[np.uint32]:
            return query.share(self._computed(query, adapter_D, clients), clients, permit, noise)

        return share_of

    def _aggregated(
        self, query: CohortQuery, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Summed:
        """The real protocol between `nodes` nodes in memory, with keys of this round only."""
        share_of = self.share_of(query, adapter_D, permit, noise)
        keys = [NodeKey.generate() for _ in range(self.nodes)]
        on_nodes = hosted(cohort, self.nodes)
        roster = [key.public for key in keys]
        settings = round_settings(query, permit, list(map(len, on_nodes)), roster, self.threshold)
        party = [node_of(settings, node, key, on_nodes[node], self.parallel, share_of) for node, key in enumerate(keys)]

        def exchange(stage: Stage, requests: Mapping[int, bytes]) -> dict[int, bytes]:
            there = [node for node in requests if not self.lost(permit.slot, stage, node)]
            return {node: party[node].answer(stage, requests[node]) for node in there}

        return summed(settings, on_nodes, exchange)

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
