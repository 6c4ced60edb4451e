"""The server's side of a round, and the loop that carries both sides' messages over any engine.

`aggregate(server, exchange)` asks `exchange(step, {node: bytes}) -> {node: bytes}` five times. Nodes that do not answer
are left out of the dictionary. The server never sees a node's vector, only the sum over the nodes that stayed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError, VoidRoundError
from drencoder.secure_aggregation import messages
from drencoder.secure_aggregation.client import (
    KEY_SHARE,
    SEED_SHARE,
    commit_to_seed,
    derive_own_mask_key,
    derive_pair_mask_key,
    digest_keys,
    digest_survivors,
    pair_mask_sign,
)
from drencoder.secure_aggregation.crypto import SECRET_BYTES, SIGNATURE_BYTES, KeyAgreement, apply_mask, is_signed
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings, pack_rows, unpack_rows
from drencoder.secure_aggregation.shamir import SHARE_BYTES, combine

Exchange: TypeAlias = Callable[[ProtocolStep, Mapping[int, bytes]], Mapping[int, bytes]]


@dataclass(frozen=True, eq=False)
class ModularSum:
    """The sum (V,) uint32 modulo 2^b of the vectors of `nodes`.

    `bytes_up` and `bytes_down` count all messages of a step; `rejected` the answers that were malformed or forged.
    """

    sum_V: npt.NDArray[np.uint32] = field(repr=False)
    nodes: tuple[int, ...]
    bytes_up: Mapping[ProtocolStep, int]
    bytes_down: Mapping[ProtocolStep, int]
    rejected: int


@final
class SecAggServer:
    """The server of one round. For each step in order call
    `make_requests`, then `accept` with what came back; at the end call `unmask_sum`.

    An answer that is malformed, forged or of another round counts as none. Raises VoidRoundError as soon as too few are
    left; nobody's vector can be had then.
    """

    def __init__(self, settings: RoundSettings) -> None:
        self._settings = settings
        self._step = ProtocolStep.ADVERTISE
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

    def make_requests(self, step: ProtocolStep) -> dict[int, bytes]:
        """Returns the messages of a step, node -> bytes, for every node that has answered so far."""
        assert (step, False) == (self._step, self._done)
        bodies: dict[int, bytes] = {}
        if step == ProtocolStep.SHARE:
            bodies = dict.fromkeys(self._asked, pack_rows(self._keys))
        elif step == ProtocolStep.MASK:
            bodies = {node: pack_rows(self._sealed[node]) for node in self._asked}
        elif step == ProtocolStep.CONFIRM:
            bodies = dict.fromkeys(self._asked, self._survivors_body())
        elif step == ProtocolStep.UNMASK:
            bodies = dict.fromkeys(self._asked, pack_rows(self._signatures))
        return {node: self._settings.frame_request(step, node, bodies.get(node, b"")) for node in self._asked}

    def accept(self, step: ProtocolStep, answers: Mapping[int, bytes]) -> None:
        """Accepts the answers that came back to a step, node -> bytes.

        Raises VoidRoundError when fewer nodes than the threshold are left, or too few clients.
        """
        assert (step, False) == (self._step, self._done)
        accept_answer = {
            ProtocolStep.ADVERTISE: self._accept_keys,
            ProtocolStep.SHARE: self._accept_shares,
            ProtocolStep.MASK: self._accept_masked_vector,
            ProtocolStep.CONFIRM: self._accept_signature,
            ProtocolStep.UNMASK: self._accept_revealed_shares,
        }[step]
        accepted = []
        for node in sorted(answers):
            try:
                if node not in self._asked:
                    raise SecureError(f"Node {node} was not asked.")
                accept_answer(node, self._settings.parse_answer(answers[node], step, node))
            except SecureError:
                self.rejected += 1
                continue
            accepted.append(node)
        self._check_enough(step, accepted)
        self._asked = tuple(accepted)
        if step == ProtocolStep.SHARE:  # only those who shared have masks between them
            self._sealed = {
                receiver: {sender: self._sealed[sender][receiver] for sender in accepted if sender != receiver}
                for receiver in accepted
            }
        if step == ProtocolStep.MASK:
            self._survivors = tuple(accepted)
        if step == ProtocolStep.UNMASK:
            self._done = True
        else:
            self._step = ProtocolStep(step + 1)

    def unmask_sum(self) -> tuple[npt.NDArray[np.uint32], tuple[int, ...]]:
        """Returns the sum modulo 2^b, (V,) uint32, and the nodes whose vectors are in it.

        Raises VoidRoundError when revealed shares do not give the secrets that their owners had promised.
        """
        assert self._done
        settings, total_V = self._settings, self._total_V
        for node in self._commitments:
            secret = self._combine_secret(node)
            if node in self._survivors:
                if commit_to_seed(settings, node, secret) != self._commitments[node]:
                    raise VoidRoundError(f"Shares of node {node}'s seed are wrong: the round is void.")
                apply_mask(total_V, derive_own_mask_key(settings, node, secret), -1)
                continue
            key = KeyAgreement(secret)
            if key.public != self._masking_key(node):
                raise VoidRoundError(f"Shares of node {node}'s key are wrong: the round is void.")
            for other in self._survivors:
                pair = derive_pair_mask_key(settings, key, node, other, self._masking_key(other))
                apply_mask(total_V, pair, -pair_mask_sign(other, node))
        return total_V & np.uint32((1 << settings.bits) - 1), self._survivors

    def _accept_keys(self, node: int, body: bytes) -> None:
        if len(body) != messages.KEYS_BYTES:
            raise SecureError("Keys of another length.")
        text = digest_keys(self._settings, node, body[: 2 * SECRET_BYTES])
        if not is_signed(self._settings.roster[node], body[2 * SECRET_BYTES :], text):
            raise SecureError("Keys that their owner did not sign.")
        self._keys[node] = body

    def _accept_shares(self, node: int, body: bytes) -> None:
        rows = unpack_rows(body[SECRET_BYTES:], messages.SEALED_BYTES, self._settings.nodes)
        if rows.keys() != self._keys.keys() - {node}:
            raise SecureError("Shares for other nodes than were listed.")
        self._commitments[node] = body[:SECRET_BYTES]
        self._sealed[node] = rows

    def _accept_masked_vector(self, node: int, body: bytes) -> None:
        self._total_V += messages.unpack_values(body, self._settings.values, self._settings.bits)

    def _accept_signature(self, node: int, body: bytes) -> None:
        text = digest_survivors(self._settings, self._survivors_body())
        if len(body) != SIGNATURE_BYTES or not is_signed(self._settings.roster[node], body, text):
            raise SecureError("A list that its owner did not sign.")
        self._signatures[node] = body

    def _accept_revealed_shares(self, node: int, body: bytes) -> None:
        rows = unpack_rows(body, 1 + SHARE_BYTES, self._settings.nodes)
        expected = {owner: SEED_SHARE if owner in self._survivors else KEY_SHARE for owner in self._commitments}
        if {owner: row[:1] for owner, row in rows.items()} != expected:
            raise SecureError("Other shares than were asked for.")
        for owner, row in rows.items():
            self._revealed.setdefault(owner, {})[node] = row[:1], row[1:]

    def _survivors_body(self) -> bytes:
        return pack_rows(dict.fromkeys(self._survivors, b""))

    def _masking_key(self, node: int) -> bytes:
        return self._keys[node][SECRET_BYTES : 2 * SECRET_BYTES]

    def _combine_secret(self, node: int) -> bytes:
        shares = list(self._revealed[node].items())[: self._settings.threshold]
        try:
            return combine({holder + 1: share for holder, (_, share) in shares})
        except SecureError as error:
            raise VoidRoundError(f"{error} The round is void.") from None

    def _check_enough(self, step: ProtocolStep, accepted: list[int]) -> None:
        needed = self._settings.threshold
        if len(accepted) < needed:
            raise VoidRoundError(
                f"{len(accepted)} of {len(self._settings.roster)} nodes answered {step.name} and {needed} are needed: "
                "the round is void."
            )
        clients = self._settings.count_clients(accepted)
        if step == ProtocolStep.MASK and clients < self._settings.least_clients:
            raise VoidRoundError(
                f"Only {clients} clients are in the sum and {self._settings.least_clients} are needed for enough noise: "
                "the round is void."
            )


def aggregate(server: SecAggServer, exchange: Exchange) -> ModularSum:
    """Runs all five steps and returns the sum; `exchange` carries the messages of one step.

    Raises VoidRoundError when the round cannot be finished.
    """
    up, down = dict.fromkeys(ProtocolStep, 0), dict.fromkeys(ProtocolStep, 0)
    for step in ProtocolStep:
        requests = server.make_requests(step)
        down[step] = sum(map(len, requests.values()))
        answers = exchange(step, requests)
        up[step] = sum(map(len, answers.values()))
        server.accept(step, answers)
    total_V, nodes = server.unmask_sum()
    return ModularSum(total_V, nodes, up, down, server.rejected)
