"""A cohort's question under secure aggregation, for any engine: who hosts whom, a node's part, the server's part.

A node first computes what it adds up (`ClientSide.node_share`): its clients train before the protocol begins. Then an engine gives each
node a `SecAggClient` made by `secure_node`, and calls `secure_sum` with a function that carries a step's messages to the nodes and
their answers back. Neither knows stages of learning, encoders or epsilon; both see bytes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError, VoidRoundError
from drencoder.federated.query import Query
from drencoder.federated.round import SecureSum, modulus_bits
from drencoder.privacy.ledger import Permit
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import RoundSettings
from drencoder.secure_aggregation.server import Exchange, SecAggServer, aggregate


def clients_by_node(cohort: Sequence[int], nodes: int) -> list[list[int]]:
    """The cohort's clients on each node: client number modulo nodes."""
    return [[client for client in cohort if client % nodes == node] for node in range(nodes)]


def round_settings(
    query: Query, permit: Permit, counts: Sequence[int], roster: Sequence[bytes], threshold: int
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
        run_id=permit.run_id, slot=permit.slot, attempt=permit.attempt, values=query.spec.wire.code_size,
        bits=modulus_bits(query, permit), threshold=threshold, least_clients=least, clients=tuple(counts), roster=tuple(roster),
    )  # fmt: skip


def secure_node(
    settings: RoundSettings, node: int, key: NodeKey, clients: Sequence[int], share_V: npt.NDArray[np.uint32]
) -> SecAggClient:
    """A node with the sum of its clients' shares.

    Raises SecureError when the settings count other clients for it than it hosts.
    """
    if len(clients) != settings.clients[node]:
        raise SecureError(
            f"Node {node} hosts {len(clients)} clients and the round counts {settings.clients[node]}: refused."
        )
    return SecAggClient(settings, node, key, lambda: share_V)


def secure_sum(settings: RoundSettings, on_nodes: Sequence[Sequence[int]], exchange: Exchange) -> SecureSum:
    """The server's part: all five steps, and whose codes are in the sum; `on_nodes` has each node's clients.

    Raises VoidRoundError when the round cannot be finished.
    """
    result = aggregate(SecAggServer(settings), exchange)
    clients = tuple(client for node in result.nodes for client in on_nodes[node])
    up, down = sum(result.bytes_up.values()), sum(result.bytes_down.values())
    return SecureSum(clients, result.sum_V, up, down, result.rejected)
