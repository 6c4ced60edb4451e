"""A node's side of a round: it gives five answers, bytes in and bytes out, and knows every reason to refuse one.

A node acts for the clients that it hosts. It sends one vector, the modular sum of their quantised and noised codes, hidden
under a mask of its own and one mask per peer; the peers' masks cancel in the sum over all nodes. Sources: Bonawitz et al. 2017
(https://eprint.iacr.org/2017/281), figure 4, with the signatures and the consistency check of its active-adversary version;
the complete graph of Bell et al. 2020's (https://eprint.iacr.org/2020/704) framework, since nodes are few and host many clients.

A server that lies can make a round fail, and no more. It learns a sum only if `threshold` nodes signed the same list
of nodes whose vectors are in it, and only for that list; two lists would need a node that signs both.
"""

import secrets
from collections.abc import Callable
from typing import final

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError, VoidRoundError
from drencoder.secure_aggregation import crypto, messages
from drencoder.secure_aggregation.crypto import SECRET_BYTES, KeyAgreement, NodeKey, digest
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings, pack_rows, unpack_rows
from drencoder.secure_aggregation.shamir import SHARE_BYTES, split

KEY_SHARE, SEED_SHARE = b"\1", b"\2"


@final
class SecAggClient:
    """A node's side of one round. Use a new one for every round; it answers each step once, in order.

    Args:
      settings: the node's own copy of the round's facts.
      node: its number in the roster.
      key: its long-term key.
      vector: gives the node's (V,) uint32 residues modulo 2^b; called once, when the keys are agreed on.

    Raises SecureError when the key is not the roster's.
    """

    def __init__(
        self, settings: RoundSettings, node: int, key: NodeKey, vector: Callable[[], npt.NDArray[np.uint32]]
    ) -> None:
        if node not in settings.nodes or settings.roster[node] != key.public:
            raise SecureError(f"Node {node} of the roster has another key: check the roster and the node's key file.")
        self._settings, self._node, self._key, self._vector = settings, node, key, vector
        self._next = ProtocolStep.ADVERTISE
        self._broken = False
        self._sealing, self._masking = KeyAgreement(), KeyAgreement()
        self._seed = secrets.token_bytes(SECRET_BYTES)
        self._peers: dict[int, tuple[bytes, bytes]] = {}  # U1: sealing and masking key of each node
        self._shares: dict[int, tuple[bytes, bytes]] = {}  # U2: shares of each node's masking key and seed
        self._survivors: dict[int, bytes] = {}  # U3: whose vectors are in the sum

    def answer(self, step: ProtocolStep, request: bytes) -> bytes:
        """Returns the answer to one request.

        Raises SecureError for a message of another round, step, node or size, a key that its owner did not sign, a share
        that was changed, a second request for a step, or lists that would make the node tell too much; VoidRoundError
        when there are too few nodes or clients. After either the node answers nothing more in this round.
        """
        if self._broken or step != self._next:
            raise SecureError(
                f"Node {self._node} has answered {step.name}, or refused a message before: each step has one answer."
            )
        self._broken = True  # until this step has gone well
        body = self._settings.parse_request(request, step, self._node)
        answer_step = {
            ProtocolStep.ADVERTISE: self._advertise, ProtocolStep.SHARE: self._share, ProtocolStep.MASK: self._mask,
            ProtocolStep.CONFIRM: self._confirm, ProtocolStep.UNMASK: self._unmask,
        }  # fmt: skip
        reply = self._settings.frame_answer(step, self._node, answer_step[step](body))
        if step != ProtocolStep.UNMASK:
            self._next, self._broken = ProtocolStep(step + 1), False
        return reply

    def _advertise(self, body: bytes) -> bytes:
        keys = self._sealing.public + self._masking.public
        return keys + self._key.sign(digest_keys(self._settings, self._node, keys))

    def _share(self, body: bytes) -> bytes:
        settings, context = self._settings, self._settings.context
        rows = unpack_rows(body, messages.KEYS_BYTES, settings.nodes)
        self._require_enough(len(rows))
        for node, row in rows.items():
            keys, signature = row[: 2 * SECRET_BYTES], row[2 * SECRET_BYTES :]
            if not crypto.is_signed(settings.roster[node], signature, digest_keys(settings, node, keys)):
                raise SecureError(f"The round's keys of node {node} are not signed by it: somebody stands between.")
            self._peers[node] = keys[:SECRET_BYTES], keys[SECRET_BYTES:]
        if self._peers.get(self._node) != (self._sealing.public, self._masking.public):
            raise SecureError(f"Node {self._node} is not in the list of keys with its own: the list is refused.")
        places = [node + 1 for node in rows]
        key_shares = split(self._masking.private_bytes(), settings.threshold, places)
        seed_shares = split(self._seed, settings.threshold, places)
        sealed = {}
        for node, (sealing, _) in self._peers.items():
            shares = key_shares[node + 1], seed_shares[node + 1]
            if node == self._node:
                self._shares[node] = shares
                continue
            purpose = _share_purpose(self._node, node)
            sealed[node] = crypto.seal(
                self._sealing.derive_secret(sealing, context, purpose), b"".join(shares), context + purpose
            )
        return commit_to_seed(settings, self._node, self._seed) + pack_rows(sealed)

    def _mask(self, body: bytes) -> bytes:
        settings, context = self._settings, self._settings.context
        rows = unpack_rows(body, messages.SEALED_BYTES, settings.nodes)
        if self._node in rows or not rows.keys() <= self._peers.keys():
            raise SecureError("Sealed shares came from nodes without signed keys in this round: refused.")
        self._require_enough(len(rows) + 1)
        for node, sealed in rows.items():
            purpose = _share_purpose(node, self._node)
            plain = crypto.open_sealed(
                self._sealing.derive_secret(self._peers[node][0], context, purpose), sealed, context + purpose
            )
            self._shares[node] = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
        total_V = np.array(self._vector(), dtype=np.uint32)
        if total_V.shape != (settings.values,) or int(total_V.max()) >> settings.bits:
            raise SecureError(
                f"Node {self._node} has a vector that is not {settings.values} values of {settings.bits} bits."
            )
        crypto.apply_mask(total_V, derive_own_mask_key(settings, self._node, self._seed), 1)
        for node in rows:
            key = derive_pair_mask_key(settings, self._masking, self._node, node, self._peers[node][1])
            crypto.apply_mask(total_V, key, pair_mask_sign(self._node, node))
        del self._sealing, self._masking, self._seed, self._vector
        return messages.pack_values(total_V, settings.bits)

    def _confirm(self, body: bytes) -> bytes:
        self._survivors = unpack_rows(body, 0, self._settings.nodes)
        if self._node not in self._survivors or not self._survivors.keys() <= self._shares.keys():
            raise SecureError("The list of answers names nodes that shared no keys, or leaves this one out: refused.")
        self._require_enough(len(self._survivors))
        clients = self._settings.count_clients(self._survivors)
        if clients < self._settings.least_clients:
            raise VoidRoundError(
                f"Only {clients} clients are in the sum, and {self._settings.least_clients} are needed for enough noise: "
                "the round is void."
            )
        return self._key.sign(digest_survivors(self._settings, body))

    def _unmask(self, body: bytes) -> bytes:
        signatures = unpack_rows(body, messages.KEYS_BYTES - 2 * SECRET_BYTES, self._settings.nodes)
        if not signatures.keys() <= self._survivors.keys():
            raise SecureError("A signature is of a node that is not in the sum: refused.")
        self._require_enough(len(signatures))
        text = digest_survivors(self._settings, pack_rows(self._survivors))
        for node, signature in signatures.items():
            if not crypto.is_signed(self._settings.roster[node], signature, text):
                raise SecureError(f"Node {node} signed another list of answers: the server told two stories.")
        # One share of every node and never both: its seed if its vector is in the sum, its key if it dropped out.
        revealed = {
            node: SEED_SHARE + seed if node in self._survivors else KEY_SHARE + key
            for node, (key, seed) in self._shares.items()
        }
        self._shares = {}
        return pack_rows(revealed)

    def _require_enough(self, count: int) -> None:
        if count < self._settings.threshold:
            raise VoidRoundError(
                f"Only {count} nodes are left and {self._settings.threshold} are needed: the round is void."
            )


# What a node sends and the server must be able to check or compute.


def digest_keys(settings: RoundSettings, node: int, keys: bytes) -> bytes:
    """Returns what a node signs about its keys of the round."""
    return digest(b"keys", settings.context, node.to_bytes(4, "little"), keys)


def digest_survivors(settings: RoundSettings, body: bytes) -> bytes:
    """Returns what a node signs about the list of nodes whose vectors are in the sum."""
    return digest(b"survivors", settings.context, body)


def commit_to_seed(settings: RoundSettings, node: int, seed: bytes) -> bytes:
    """Returns a commitment: it tells a right seed from a wrong one later, and nothing about a seed of 256 random bits now."""
    return digest(b"seed commit_to_seed", settings.context, node.to_bytes(4, "little"), seed)


def derive_own_mask_key(settings: RoundSettings, node: int, seed: bytes) -> bytes:
    """Returns the key of a node's own mask."""
    return digest(b"own mask", settings.context, node.to_bytes(4, "little"), seed)


def derive_pair_mask_key(
    settings: RoundSettings, agreement: KeyAgreement, node: int, peer: int, peer_key: bytes
) -> bytes:
    """Returns the key of the mask between two nodes, which is the same from both sides. `agreement` is the key of `node`."""
    low, high = min(node, peer), max(node, peer)
    return agreement.derive_secret(peer_key, settings.context, f"mask {low} {high}".encode())


def pair_mask_sign(node: int, peer: int) -> int:
    """Returns 1 for the node with the lower number, which adds the pair's mask, and -1 for the other, which takes it off."""
    return 1 if node < peer else -1


def _share_purpose(sender: int, receiver: int) -> bytes:
    return f"share {sender} {receiver}".encode()
