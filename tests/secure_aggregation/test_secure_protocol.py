"""The protocol: right sums with and without drop-outs, and what no message shows."""

import itertools

import numpy as np
import pytest
from protocol_parties import HEADER, VALUES, Party, round_of, until
from scipy import stats

from drencoder.errors import VoidRoundError
from drencoder.secure_aggregation.crypto import KeyAgreement
from drencoder.secure_aggregation.messages import (
    ProtocolStep,
    pack_rows,
    pack_values,
    unpack_values,
)

# Sums


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize(("nodes", "threshold"), [(2, 2), (3, 2), (5, 3), (7, 7)])
def test_the_sum_is_the_plain_modular_sum(nodes, threshold, bits):
    party = Party(round_of(nodes, threshold, bits=bits))
    found = party.run()
    assert found.nodes == tuple(range(nodes))
    assert np.array_equal(found.sum_V, party.plain(range(nodes)))
    assert found.rejected == 0


@pytest.mark.parametrize("dropped", [d for count in (1, 2) for d in itertools.product(ProtocolStep, repeat=count)])
def test_drop_outs_at_every_step_are_recovered_from(dropped):
    party = Party(round_of(5, 3))
    party.dropped = {3 - node: step for node, step in enumerate(dropped)}
    found = party.run()
    # A vector is in the sum if it was sent, whoever vanishes afterwards.
    there = tuple(node for node in range(5) if party.dropped.get(node, ProtocolStep.UNMASK) > ProtocolStep.MASK)
    assert found.nodes == there
    assert np.array_equal(found.sum_V, party.plain(there))


@pytest.mark.parametrize("step", list(ProtocolStep))
def test_too_many_drop_outs_void_the_round(step):
    party = Party(round_of(5, 3))
    party.dropped = dict.fromkeys((0, 2, 4), step)
    with pytest.raises(VoidRoundError, match=f"2 of 5 nodes answered {step.name}"):
        party.run()


def test_too_few_clients_void_the_round_on_both_sides():
    party = Party(round_of(3, 2, clients=(1, 8, 1), least=9))
    party.dropped = {1: ProtocolStep.MASK}
    with pytest.raises(VoidRoundError, match="2 clients"):
        party.run()
    # A server that goes on all the same meets nodes that do not.
    settings = party.settings
    party = Party(settings)
    _, requests = until(party, ProtocolStep.CONFIRM)
    few = settings.frame_request(ProtocolStep.CONFIRM, 0, pack_rows({0: b"", 2: b""}))
    with pytest.raises(VoidRoundError, match="2 clients"):
        party.nodes[0].answer(ProtocolStep.CONFIRM, few)
    assert party.nodes[1].answer(ProtocolStep.CONFIRM, requests[1])  # all ten are enough


# What the server sees


def test_masked_vectors_look_uniform_and_contain_no_plain_vector():
    settings = round_of(3, 2, values=20_000, bits=16)
    party = Party(settings, vectors=np.full((3, 20_000), 7, dtype=np.uint32))
    found = party.run()
    assert np.array_equal(found.sum_V, np.full(20_000, 21))
    plain = pack_values(party.vectors[0], 16)
    masked = [unpack_values(party.sent[ProtocolStep.MASK, node][HEADER:], 20_000, 16) for node in range(3)]
    for vector in masked:
        assert stats.chisquare(np.bincount(vector >> 8, minlength=256)).pvalue > 1e-5
        assert stats.chisquare(np.bincount(vector & 255, minlength=256)).pvalue > 1e-5
        assert abs(np.corrcoef(vector[1:], vector[:-1])[0, 1]) < 5 / np.sqrt(20_000)
    # Two masked vectors together say nothing either: no pair's mask stands alone.
    for a, b in itertools.combinations(masked, 2):
        both = ((a.astype(np.int64) + b) & 0xFFFF).astype(np.int64)
        assert stats.chisquare(np.bincount(both >> 8, minlength=256)).pvalue > 1e-5
    for data in party.sent.values():
        assert plain[:8] not in data


def test_without_masks_the_uniformity_test_would_fail():
    vector = np.full(20_000, 7)
    assert stats.chisquare(np.bincount(vector & 255, minlength=256)).pvalue < 1e-100


def test_two_rounds_never_share_masks():
    vectors = np.zeros((3, VALUES), dtype=np.uint32)
    seen = set()
    for facts in (round_of(3, 2), round_of(3, 2), round_of(3, 2, attempt=1), round_of(3, 2, slot=2)):
        party = Party(facts, vectors=vectors)
        party.run()
        seen |= {party.sent[ProtocolStep.MASK, node][HEADER:] for node in range(3)}
    assert len(seen) == 12
    # Even with the same keys another round, slot or attempt has other masks.
    mine, peer = KeyAgreement(), KeyAgreement()
    contexts = {round_of(3, 2, slot=slot, attempt=attempt).context for slot in (1, 2) for attempt in (0, 1)}
    assert len({mine.derive_secret(peer.public, context, b"mask 0 1") for context in contexts}) == 4


def test_no_message_holds_a_secret():
    party = Party(round_of(4, 3))
    secrets = [node._seed for node in party.nodes] + [node._masking.private_bytes() for node in party.nodes]
    party.run()
    traffic = b"".join(party.sent.values())
    assert all(secret not in traffic for secret in secrets)
    assert all(not hasattr(node, "_seed") for node in party.nodes)  # and a node forgets them
