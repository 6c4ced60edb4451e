"""What the clients of one machine send, for any engine: they train some at a time, and each batch is encoded, clipped and noised.

Legend: D adapter values, V values of a message.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from drencoder.federated.query import Query
from drencoder.federated.round import Upload, client_message, client_share, modulus_bits, trained_batches
from drencoder.federated.site_round import SiteCurator
from drencoder.models.client_training import ClientTrainer
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource


@final
@dataclass(frozen=True)
class ClientSide:
    """Clients of this machine. With a `curator` they are sites, whose own units are protected."""

    trainer: ClientTrainer
    curator: SiteCurator | None = None

    def uploads(
        self, query: Query, adapter_D: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload]:
        """The messages of these clients, some clients at a time; of a site its one message."""
        if self.curator is not None:
            yield from (self.curator.message(query, adapter_D, site, permit, noise) for site in clients)
            return
        for batch, update_ND in trained_batches(self.trainer, query, adapter_D, clients):
            yield client_message(query, update_ND, batch, permit, noise)

    def node_share(
        self, query: Query, adapter_D: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> npt.NDArray[np.uint32]:
        """Secure aggregation: what a node adds up of these clients, (V,) uint32 modulo 2^b. It must not leave unmasked.

        A large node needs no more memory than a batch of its clients and one vector.
        """
        if self.curator is not None:
            return self.curator.node_share(query, adapter_D, clients, permit, noise)
        total_V = np.zeros(query.spec.wire.code_size, dtype=np.uint32)
        for batch, update_ND in trained_batches(self.trainer, query, adapter_D, clients):
            total_V += client_share(query, update_ND, batch, permit, noise)
        return total_V & np.uint32((1 << modulus_bits(query, permit)) - 1)
