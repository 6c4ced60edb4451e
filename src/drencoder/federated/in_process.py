"""The in-process engine: a cohort's clients are on this machine.

What crosses the line between a client and the server is bytes, here as on a network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from drencoder.federated.client_side import ClientSide
from drencoder.federated.engine import SiteFacts
from drencoder.federated.query import Query
from drencoder.federated.round import SecureSum, Upload
from drencoder.federated.secure_round import clients_by_node, round_settings, secure_node, secure_sum
from drencoder.federated.site_round import SiteCurator
from drencoder.models.client_training import ClientTrainer
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep


class AlwaysThere:
    """What every engine says whose clients are in this process."""

    def ready(self) -> None:
        """This process is always there."""

    def sites(self) -> Sequence[SiteFacts]:
        """None: the clients are here."""
        return ()

    def unasked(self) -> Sequence[int]:
        """None: whoever is in a cohort is asked."""
        return ()


@final
@dataclass(frozen=True)
class InProcessEngine(AlwaysThere):
    """Hands a query to clients of this machine, some at a time, and yields what they send.

    Under secure aggregation the clients are spread over `nodes`, of which `threshold` must stay to the end, and
    `lost(slot, stage, node)` says which of them do not answer: for tests. With a `curator` the clients are sites, whose own units
    are protected.
    """

    trainer: ClientTrainer
    nodes: int = 1
    threshold: int = 1
    lost: Callable[[int, ProtocolStep, int], bool] = lambda slot, stage, node: False
    curator: SiteCurator | None = None

    def gather(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | SecureSum]:
        """See `Engine.gather`."""
        if permit.shares is not None:
            yield self._aggregated(query, adapter_D, cohort, permit, noise)
            return
        yield from ClientSide(self.trainer, self.curator).uploads(query, adapter_D, cohort, permit, noise)

    def _aggregated(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> SecureSum:
        """The real protocol between `nodes` nodes in memory, with keys of this round only. The clients train first."""
        keys = [NodeKey.generate() for _ in range(self.nodes)]
        on_nodes = clients_by_node(cohort, self.nodes)
        roster = [key.public for key in keys]
        settings = round_settings(query, permit, list(map(len, on_nodes)), roster, self.threshold)
        side = ClientSide(self.trainer, self.curator)
        parties = [
            secure_node(settings, node, key, clients, side.node_share(query, adapter_D, clients, permit, noise))
            for node, (key, clients) in enumerate(zip(keys, on_nodes, strict=True))
        ]

        def exchange(stage: ProtocolStep, requests: Mapping[int, bytes]) -> dict[int, bytes]:
            present = [node for node in requests if not self.lost(permit.slot, stage, node)]
            return {node: parties[node].answer(stage, requests[node]) for node in present}

        return secure_sum(settings, on_nodes, exchange)
