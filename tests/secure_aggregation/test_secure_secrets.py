"""No secret of a round is ever used again: not by another node, not in another round, and not by a node that starts anew."""

import numpy as np

from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import SECRET_BYTES, NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings

KEYS = [NodeKey.generate() for _ in range(3)]


def node_of(number: int, slot: int) -> SecAggClient:
    settings = RoundSettings("run", slot, 0, 8, 16, 2, 1, (1, 1, 1), tuple(key.public for key in KEYS))
    return SecAggClient(settings, number, KEYS[number], lambda: np.zeros(8, dtype=np.uint32))


def test_every_key_and_seed_is_drawn_anew() -> None:
    nodes = [node_of(number, slot) for number in range(3) for slot in (1, 2) for _ in range(2)]
    secrets = [
        secret
        for node in nodes
        for secret in (node._sealing.private_bytes(), node._masking.private_bytes(), node._seed)
    ]
    assert len(secrets) == 36
    assert len(set(secrets)) == len(secrets)
    bits = np.unpackbits(np.frombuffer(b"".join(secrets), dtype=np.uint8))
    # X25519 fixes 5 of a private key's 256 bits; the others are fair coins: 12 standard deviations leave no room for chance.
    assert abs(int(bits.sum()) - bits.size / 2) < 12 * (bits.size / 4) ** 0.5


def test_a_node_that_is_asked_again_in_a_new_process_advertises_other_keys() -> None:
    said = set()
    for _ in range(2):
        node = node_of(0, 1)
        answer = node.answer(ProtocolStep.ADVERTISE, node._settings.frame_request(ProtocolStep.ADVERTISE, 0, b""))
        body = answer[-(2 * SECRET_BYTES + 96) :]
        said |= {body[:SECRET_BYTES], body[SECRET_BYTES : 2 * SECRET_BYTES]}
    assert len(said) == 4
