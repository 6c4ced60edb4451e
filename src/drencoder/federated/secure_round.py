"""A cohort's question under secure aggregation, for any engine: who hosts whom, a node's part, the server's part.

An engine gives each node a `SecureNode` made by `node_of`, and calls `summed` with a function that carries a stage's messages to
the nodes and their answers back. Neither knows stages of learning, encoders or epsilon; both see bytes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError, VoidRoundError
from drencoder.federated.query import CohortQuery, Summed
from drencoder.privacy.ledger import Permit
from drencoder.secure_aggregation.client import SecureNode
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import RoundSettings
from drencoder.secure_aggregation.server import Exchange, SecureServer, aggregate

__all__ = ["hosted", "node_of", "round_settings", "summed"]


def hosted(cohort: Sequence[int], nodes: int) -> list[list[int]]:
    """The cohort's clients on each node: client number modulo nodes."""
    return [[client for client in cohort if client % nodes == node] for node in range(nodes)]


def round_settings(
    query: CohortQuery, permit: Permit, counts: Sequence[int], roster: Sequence[bytes], threshold: int
) -> RoundSettings:
    """The public facts of one round. Every party makes its own copy, from its own plan, recipe and roster.

    `counts` says how many clients of the cohort are on each node. A node may take them from the server: it checks its own,
    and since they are part of the context, a lie about an honest node's makes that node's messages worthless.

    Raises VoidRoundError for a cohort that is too small for the plan, or larger than what the modulus was made for.
    """
    assert permit.shares is not None
    least, most = permit.shares.least_contributors, permit.shares.most_contributors
    if not least <= sum(counts) <= most:
        raise VoidRoundError(
            f"the cohort of slot {permit.slot} has {sum(counts)} clients and the plan needs {least} to {most}: the round is void."
        )
    return RoundSettings(
        run_id=permit.run_id,
        slot=permit.slot,
        attempt=permit.attempt,
        values=query.wire.code_size,
        bits=query.bits(permit),
        threshold=threshold,
        least_clients=least,
        clients=tuple(counts),
        roster=tuple(roster),
    )


def node_of(
    settings: RoundSettings,
    node: int,
    key: NodeKey,
    clients: Sequence[int],
    parallel: int,
    share_of: Callable[[Sequence[int]], npt.NDArray[np.uint32]],
) -> SecureNode:
    """A node that trains its clients when its masked vector is asked for, `parallel` of them at a time.

    `share_of(clients)` gives their updates' `CohortQuery.share`. The node refuses to start when the settings count
    other clients for it than it hosts.
    """
    if len(clients) != settings.clients[node]:
        raise SecureError(
            f"Node {node} hosts {len(clients)} clients and the round counts {settings.clients[node]}: refused."
        )

    def vector() -> npt.NDArray[np.uint32]:
        total_V = np.zeros(settings.values, dtype=np.uint32)
        for start in range(0, len(clients), parallel):
            total_V += share_of(clients[start : start + parallel])
        return total_V & np.uint32((1 << settings.bits) - 1)

    return SecureNode(settings, node, key, vector)


def summed(settings: RoundSettings, on_nodes: Sequence[Sequence[int]], exchange: Exchange) -> Summed:
    """The server's part: all five stages, and whose codes are in the sum; `on_nodes` has each node's clients.

    Raises VoidRoundError when the round cannot be finished.
    """
    found = aggregate(SecureServer(settings), exchange)
    clients = tuple(client for node in found.nodes for client in on_nodes[node])
    return Summed(clients, found.sum_V, sum(found.bytes_up.values()), sum(found.bytes_down.values()), found.rejected)
