"""The server's side of a round, and the loop that carries both sides' messages over any engine.

`aggregate(server, exchange)` asks `exchange(stage, {node: bytes}) -> {node: bytes}` five times. Nodes that do not answer
are left out of the dictionary. The server never sees a node's vector, only the sum over the nodes that stayed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError, VoidRoundError
from drencoder.secure_aggregation.client import (
    KEY_SHARE,
    SEED_SHARE,
    advertised,
    commitment,
    pair_key,
    pair_sign,
    seed_key,
    survivors_text,
)
from drencoder.secure_aggregation.crypto import SECRET_BYTES, SIGNATURE_BYTES, Agreement, mask, verified
from drencoder.secure_aggregation.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    RoundSettings,
    Stage,
    rows_body,
    unpack_rows,
    unpack_values,
)
from drencoder.secure_aggregation.shamir import SHARE_BYTES, combine

__all__ = ["Exchange", "ModularSum", "SecureServer", "aggregate"]

Exchange: TypeAlias = Callable[[Stage, Mapping[int, bytes]], Mapping[int, bytes]]


@dataclass(frozen=True, eq=False)
class ModularSum:
    """The sum (V,) uint32 modulo 2^b of the vectors of `nodes`.

    `bytes_up` and `bytes_down` count all messages of a stage; `rejected` the answers that were malformed or forged.
    """

    sum_V: npt.NDArray[np.uint32] = field(repr=False)
    nodes: tuple[int, ...]
    bytes_up: Mapping[Stage, int]
    bytes_down: Mapping[Stage, int]
    rejected: int


@final
class SecureServer:
    """The server of one round. Stages in order: `requests`, then `accept` with what came back; at last `result`.

    An answer that is malformed, forged or of another round counts as none. Raises VoidRoundError as soon as too few are
    left; nobody's vector can be had then.
    """

    def __init__(self, settings: RoundSettings) -> None:
        self._settings = settings
        self._stage = Stage.ADVERTISE
        self._asked: tuple[int, ...] = tuple(settings.nodes)
        self._keys: dict[int, bytes] = {}  # U1: keys and signature
        self._commitments: dict[int, bytes] = {}  # U2
        self._sealed: dict[int, dict[int, bytes]] = {}  # U2: for whom -> from whom -> sealed shares
        self._total_V = np.zeros(settings.values, dtype=np.uint32)
        self._survivors: tuple[int, ...] = ()  # U3
        self._signatures: dict[int, bytes] = {}  # U4
        self._revealed: dict[int, dict[int, tuple[bytes, bytes]]] = {}  # whose -> from whom -> kind and share
        self._done = False
        self.rejected = 0

    def requests(self, stage: Stage) -> dict[int, bytes]:
        """The messages of a stage, for every node that is still in."""
        assert (stage, False) == (self._stage, self._done)
        bodies: dict[int, bytes] = {}
        if stage == Stage.SHARE:
            bodies = dict.fromkeys(self._asked, rows_body(self._keys))
        elif stage == Stage.MASK:
            bodies = {node: rows_body(self._sealed[node]) for node in self._asked}
        elif stage == Stage.CONFIRM:
            bodies = dict.fromkeys(self._asked, self._survivors_body())
        elif stage == Stage.UNMASK:
            bodies = dict.fromkeys(self._asked, rows_body(self._signatures))
        return {node: self._settings.request(stage, node, bodies.get(node, b"")) for node in self._asked}

    def accept(self, stage: Stage, answers: Mapping[int, bytes]) -> None:
        """Takes what came back. Raises VoidRoundError when fewer than the threshold are left, or too few clients."""
        assert (stage, False) == (self._stage, self._done)
        take = {
            Stage.ADVERTISE: self._advertised,
            Stage.SHARE: self._shared,
            Stage.MASK: self._masked,
            Stage.CONFIRM: self._confirmed,
            Stage.UNMASK: self._unmasked,
        }[stage]
        good = []
        for node in sorted(answers):
            try:
                if node not in self._asked:
                    raise SecureError(f"Node {node} was not asked.")
                take(node, self._settings.answer_body(answers[node], stage, node))
            except SecureError:
                self.rejected += 1
                continue
            good.append(node)
        self._check_enough(stage, good)
        self._asked = tuple(good)
        if stage == Stage.SHARE:  # only those who shared have masks between them
            self._sealed = {to: {of: self._sealed[of][to] for of in good if of != to} for to in good}
        if stage == Stage.MASK:
            self._survivors = tuple(good)
        if stage == Stage.UNMASK:
            self._done = True
        else:
            self._stage = Stage(stage + 1)

    def result(self) -> tuple[npt.NDArray[np.uint32], tuple[int, ...]]:
        """The sum modulo 2^b and the nodes whose vectors are in it.

        Raises VoidRoundError when revealed shares do not give the secrets that their owners had promised.
        """
        assert self._done
        settings, total_V = self._settings, self._total_V
        for node in self._commitments:
            secret = self._secret(node)
            if node in self._survivors:
                if commitment(settings, node, secret) != self._commitments[node]:
                    raise VoidRoundError(f"Shares of node {node}'s seed are wrong: the round is void.")
                mask(total_V, seed_key(settings, node, secret), -1)
                continue
            key = Agreement(secret)
            if key.public != self._masking_key(node):
                raise VoidRoundError(f"Shares of node {node}'s key are wrong: the round is void.")
            for other in self._survivors:
                pair = pair_key(settings, key, node, other, self._masking_key(other))
                mask(total_V, pair, -pair_sign(other, node))
        return total_V & np.uint32((1 << settings.bits) - 1), self._survivors

    def _advertised(self, node: int, body: bytes) -> None:
        if len(body) != KEYS_BYTES:
            raise SecureError("Keys of another length.")
        text = advertised(self._settings, node, body[: 2 * SECRET_BYTES])
        if not verified(self._settings.roster[node], body[2 * SECRET_BYTES :], text):
            raise SecureError("Keys that their owner did not sign.")
        self._keys[node] = body

    def _shared(self, node: int, body: bytes) -> None:
        rows = unpack_rows(body[SECRET_BYTES:], SEALED_BYTES, self._settings.nodes)
        if rows.keys() != self._keys.keys() - {node}:
            raise SecureError("Shares for other nodes than were listed.")
        self._commitments[node] = body[:SECRET_BYTES]
        self._sealed[node] = rows

    def _masked(self, node: int, body: bytes) -> None:
        self._total_V += unpack_values(body, self._settings.values, self._settings.bits)

    def _confirmed(self, node: int, body: bytes) -> None:
        text = survivors_text(self._settings, self._survivors_body())
        if len(body) != SIGNATURE_BYTES or not verified(self._settings.roster[node], body, text):
            raise SecureError("A list that its owner did not sign.")
        self._signatures[node] = body

    def _unmasked(self, node: int, body: bytes) -> None:
        rows = unpack_rows(body, 1 + SHARE_BYTES, self._settings.nodes)
        wanted = {of: SEED_SHARE if of in self._survivors else KEY_SHARE for of in self._commitments}
        if {of: row[:1] for of, row in rows.items()} != wanted:
            raise SecureError("Other shares than were asked for.")
        for of, row in rows.items():
            self._revealed.setdefault(of, {})[node] = row[:1], row[1:]

    def _survivors_body(self) -> bytes:
        return rows_body(dict.fromkeys(self._survivors, b""))

    def _masking_key(self, node: int) -> bytes:
        return self._keys[node][SECRET_BYTES : 2 * SECRET_BYTES]

    def _secret(self, node: int) -> bytes:
        shares = list(self._revealed[node].items())[: self._settings.threshold]
        try:
            return combine({giver + 1: share for giver, (_, share) in shares})
        except SecureError as error:
            raise VoidRoundError(f"{error} The round is void.") from None

    def _check_enough(self, stage: Stage, good: list[int]) -> None:
        needed = self._settings.threshold
        if len(good) < needed:
            raise VoidRoundError(
                f"{len(good)} of {len(self._settings.roster)} nodes answered {stage.name} and {needed} are needed: "
                "the round is void."
            )
        clients = self._settings.clients_of(good)
        if stage == Stage.MASK and clients < self._settings.least_clients:
            raise VoidRoundError(
                f"Only {clients} clients are in the sum and {self._settings.least_clients} are needed for enough noise: "
                "the round is void."
            )


def aggregate(server: SecureServer, exchange: Exchange) -> ModularSum:
    """Runs all five stages over an engine. Raises VoidRoundError when the round cannot be finished."""
    up, down = dict.fromkeys(Stage, 0), dict.fromkeys(Stage, 0)
    for stage in Stage:
        requests = server.requests(stage)
        down[stage] = sum(map(len, requests.values()))
        answers = exchange(stage, requests)
        up[stage] = sum(map(len, answers.values()))
        server.accept(stage, answers)
    total_V, nodes = server.result()
    return ModularSum(total_V, nodes, up, down, server.rejected)
