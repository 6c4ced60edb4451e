"""What a lying server, a lying node or a stranger may try, and what an honest party refuses; keys, shares and masks themselves."""

import os
import random
import subprocess

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_parties import BITS, HEADER, KEYS, VALUES, Party, refused, round_of, until

from drencoder.errors import SecureError, VoidRoundError
from drencoder.secure_aggregation import crypto, shamir
from drencoder.secure_aggregation.client import SecAggClient, digest_survivors
from drencoder.secure_aggregation.crypto import KeyAgreement, NodeKey, is_signed, public_key_bytes
from drencoder.secure_aggregation.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    ProtocolStep,
    RoundSettings,
    pack_rows,
    unpack_rows,
)
from drencoder.secure_aggregation.server import SecAggServer


@pytest.mark.parametrize("step", list(ProtocolStep))
def test_each_step_is_answered_once_and_in_order(step):
    party = Party(round_of(3, 2))
    _, requests = until(party, step)
    with pytest.raises(SecureError, match="each step has one answer"):
        party.nodes[1].answer(ProtocolStep(step % 5 + 1), requests[1])  # one too far, or back at the start
    party.nodes[1].answer(step, requests[1])
    with pytest.raises(SecureError, match="each step has one answer"):
        party.nodes[1].answer(step, requests[1])  # a replay


@pytest.mark.parametrize("step", list(ProtocolStep))
@pytest.mark.parametrize("change", ["slot", "attempt", "run", "threshold", "least", "clients", "roster"])
def test_messages_of_another_round_are_refused(step, change):
    other = {
        "slot": round_of(slot=2),
        "attempt": round_of(attempt=1),
        "run": round_of(run="another"),
        "threshold": round_of(threshold=4),
        "least": round_of(least=2),
        "clients": round_of(clients=[2, 2, 2, 2, 3]),
        "roster": RoundSettings("run", 1, 0, VALUES, BITS, 3, 1, (2,) * 5, tuple(k.public for k in KEYS[2:7])),
    }[change]
    party = Party(round_of())
    _, requests = until(party, step)
    refused(party, 0, step, other.frame_request(step, 0, requests[0][HEADER:]), "context")


@pytest.mark.parametrize("step", list(ProtocolStep))
def test_malformed_requests_are_refused_before_they_are_parsed(step):
    for damage, match in (
        (lambda data: data[:HEADER][:-1], "impossible size"),
        (lambda data: data + bytes(100_000), "impossible size"),
        (lambda data: b"DREC" + data[4:], "magic"),
        (lambda data: data[:5] + bytes([data[5] % 5 + 1]) + data[6:], "step"),
        (lambda data: data[:6] + b"\2" + data[7:], "direction"),
        (lambda data: data[:8] + b"\1" + data[9:], "node"),
    ):
        party = Party(round_of())
        _, requests = until(party, step)
        refused(party, 0, step, damage(requests[0]), match)


def test_keys_that_their_owner_did_not_sign_are_refused():
    # A server in the middle puts in its own X25519 keys, signed by a node key that is not in the roster.
    party = Party(round_of())
    _, requests = until(party, ProtocolStep.SHARE)
    rows = unpack_rows(requests[0][HEADER:], KEYS_BYTES, range(5))
    mine = KeyAgreement().public + KeyAgreement().public
    rows[3] = mine + NodeKey.generate().sign(mine)
    refused(
        party, 0, ProtocolStep.SHARE, party.settings.frame_request(ProtocolStep.SHARE, 0, pack_rows(rows)), "not signed"
    )
    # So are the right keys under another node's number, and one's own entry left out or exchanged.
    party = Party(round_of())
    _, requests = until(party, ProtocolStep.SHARE)
    rows = unpack_rows(requests[0][HEADER:], KEYS_BYTES, range(5))
    swapped = rows | {1: rows[2], 2: rows[1]}
    refused(
        party,
        0,
        ProtocolStep.SHARE,
        party.settings.frame_request(ProtocolStep.SHARE, 0, pack_rows(swapped)),
        "not signed",
    )
    alone = {node: row for node, row in rows.items() if node != 1}
    refused(
        party,
        1,
        ProtocolStep.SHARE,
        party.settings.frame_request(ProtocolStep.SHARE, 1, pack_rows(alone)),
        "with its own",
    )


def test_keys_of_an_earlier_round_are_refused():
    earlier, now = Party(round_of(slot=1)), Party(round_of(slot=2))
    old = unpack_rows(until(earlier, ProtocolStep.SHARE)[1][0][HEADER:], KEYS_BYTES, range(5))
    _, requests = until(now, ProtocolStep.SHARE)
    rows = unpack_rows(requests[0][HEADER:], KEYS_BYTES, range(5)) | {4: old[4]}
    refused(
        now, 0, ProtocolStep.SHARE, now.settings.frame_request(ProtocolStep.SHARE, 0, pack_rows(rows)), "not signed"
    )


@pytest.mark.parametrize("step", [ProtocolStep.SHARE, ProtocolStep.MASK, ProtocolStep.CONFIRM, ProtocolStep.UNMASK])
def test_lists_below_the_threshold_are_refused(step):
    width = {
        ProtocolStep.SHARE: KEYS_BYTES,
        ProtocolStep.MASK: SEALED_BYTES,
        ProtocolStep.CONFIRM: 0,
        ProtocolStep.UNMASK: 96,
    }[step]
    party = Party(round_of(5, 3))
    _, requests = until(party, step)
    rows = unpack_rows(requests[0][HEADER:], width, range(5))
    keep = 1 if step == ProtocolStep.MASK else 2  # a node counts itself beside its peers' sealed shares
    few = pack_rows(dict(list(rows.items())[:keep]))
    refused(party, 0, step, party.settings.frame_request(step, 0, few), "Only 2 nodes are left")


def test_changed_or_misdirected_shares_are_refused():
    for change in ("flip", "swap"):
        party = Party(round_of())
        _, requests = until(party, ProtocolStep.MASK)
        rows = unpack_rows(requests[0][HEADER:], SEALED_BYTES, range(5))
        if change == "flip":
            rows[2] = rows[2][:5] + bytes([rows[2][5] ^ 1]) + rows[2][6:]
        else:
            rows[2], rows[3] = rows[3], rows[2]
        refused(
            party,
            0,
            ProtocolStep.MASK,
            party.settings.frame_request(ProtocolStep.MASK, 0, pack_rows(rows)),
            "does not open",
        )


def test_nobody_reveals_both_shares_of_a_node():
    """The attack on plain Bonawitz: tell some nodes that 4 dropped out, and the others that it did not."""
    party = Party(round_of(5, 3))
    server, requests = until(party, ProtocolStep.CONFIRM)
    settings = party.settings
    all_five, without = pack_rows(dict.fromkeys(range(5), b"")), pack_rows(dict.fromkeys(range(4), b""))
    signed = {node: party.nodes[node].answer(ProtocolStep.CONFIRM, settings.frame_request(ProtocolStep.CONFIRM, node, body))[HEADER:]
              for node, body in ((0, all_five), (1, all_five), (2, without), (3, without), (4, all_five))}  # fmt: skip
    # Three signatures exist for the first story, and only nodes that signed it take them.
    story = pack_rows({node: signed[node] for node in (0, 1, 4)})
    reply = party.nodes[0].answer(ProtocolStep.UNMASK, settings.frame_request(ProtocolStep.UNMASK, 0, story))
    kinds = {node: row[0] for node, row in unpack_rows(reply[HEADER:], 67, range(5)).items()}
    assert kinds == dict.fromkeys(range(5), 2)  # seeds only
    refused(
        party, 2, ProtocolStep.UNMASK, settings.frame_request(ProtocolStep.UNMASK, 2, story), "not in the sum"
    )  # 4 is not, for node 2
    mixed = pack_rows({node: signed[node] for node in (0, 1, 2)})
    refused(party, 3, ProtocolStep.UNMASK, settings.frame_request(ProtocolStep.UNMASK, 3, mixed), "two stories")
    refused(
        party, 0, ProtocolStep.UNMASK, settings.frame_request(ProtocolStep.UNMASK, 0, story), "one answer"
    )  # never a second time
    del server, requests


def splits(nodes, threshold, colluding, tries=20_000, seed=0):
    """Searches for lists a lying server could tell so that the sum over honest nodes falls apart.

    Nodes 0.. are honest, the last `colluding` are not. A server tells each honest node whom it shares masks with (U2, at
    least the threshold, itself among them) and has `threshold` nodes sign a list U3 of sums, which an honest signer does only if
    it is among its U2. Masks between two honest nodes of U3 that both have each other hold; the others can be taken off.
    """
    chance, honest, found = random.Random(seed), range(nodes - colluding), 0
    for _ in range(tries):
        everyone = range(nodes)
        listed = {}
        for node in honest:
            others = [other for other in everyone if other != node]
            listed[node] = {node, *chance.sample(others, chance.randint(threshold - 1, nodes - 1))}
        summed = set(chance.sample(everyone, chance.randint(threshold, nodes)))
        willing = [n for n in summed if n not in honest or summed <= listed[n]]
        if len(willing) < threshold:
            continue
        inside = [node for node in honest if node in summed]
        reached, new = set(), {inside[0]} if inside else set()
        while new:
            reached |= new
            new = {b for a in new for b in inside if b in listed[a] and a in listed[b]} - reached
        found += 1
        if reached != set(inside):
            return True
    assert found > 20  # enough of the lists could be signed for the search to mean something
    return False


@pytest.mark.parametrize(("nodes", "threshold"), [(2, 2), (3, 2), (4, 3), (5, 3), (5, 4), (6, 5), (7, 5)])
def test_the_bound_on_colluding_nodes_keeps_the_honest_sum_in_one_piece(nodes, threshold):
    allowed = 2 * threshold - nodes - 1
    assert not splits(nodes, threshold, allowed)
    if nodes - allowed > 2:  # at least two honest nodes are left to be told apart with one more
        assert splits(nodes, threshold, allowed + 1)


def test_a_signature_by_a_stranger_does_not_count():
    party = Party(round_of(5, 3))
    _, requests = until(party, ProtocolStep.UNMASK)
    rows = unpack_rows(requests[0][HEADER:], 96, range(5))
    text = digest_survivors(party.settings, pack_rows(dict.fromkeys(range(5), b"")))
    rows[2] = NodeKey.generate().sign(text)
    refused(
        party,
        0,
        ProtocolStep.UNMASK,
        party.settings.frame_request(ProtocolStep.UNMASK, 0, pack_rows(rows)),
        "two stories",
    )


def test_a_dropped_node_reveals_its_key_and_never_its_seed():
    party = Party(round_of(5, 3))
    party.dropped = {4: ProtocolStep.MASK}
    party.run()
    kinds = {
        node: row[0] for node, row in unpack_rows(party.sent[ProtocolStep.UNMASK, 0][HEADER:], 67, range(5)).items()
    }
    assert kinds == {0: 2, 1: 2, 2: 2, 3: 2, 4: 1}


def test_a_node_with_another_key_or_a_wrong_vector_does_not_start():
    settings = round_of(3, 2)
    with pytest.raises(SecureError, match="another key"):
        SecAggClient(settings, 0, KEYS[1], lambda: np.zeros(VALUES, dtype=np.uint32))
    for wrong in (np.zeros(VALUES + 1, dtype=np.uint32), np.full(VALUES, 2**BITS, dtype=np.uint32)):
        party = Party(settings, vectors=np.stack([wrong] * 3))
        _, requests = until(party, ProtocolStep.MASK)
        refused(party, 0, ProtocolStep.MASK, requests[0], "has a vector")


# What a node may try


@pytest.mark.parametrize("step", list(ProtocolStep))
@pytest.mark.parametrize("lie", ["empty", "short", "long", "random", "other round", "other node"])
def test_a_lying_node_is_left_out_and_counted(step, lie):
    party = Party(round_of(5, 3))
    other = round_of(5, 3, slot=9)

    def tap(at, node, data):
        if (at, node) != (step, 2):
            return data
        return {
            "empty": b"",
            "short": data[:-1],
            "long": data + b"\0",
            "random": os.urandom(len(data)),
            "other round": other.frame_answer(step, 2, data[HEADER:]),
            "other node": party.settings.frame_answer(step, 1, data[HEADER:]),
        }[lie]

    party.tap = tap
    found = party.run()
    there = tuple(node for node in range(5) if node != 2 or step > ProtocolStep.MASK)
    assert found.nodes == there
    assert np.array_equal(found.sum_V, party.plain(there))
    assert found.rejected == 1


def test_wrong_revealed_shares_void_the_round_instead_of_spoiling_the_sum():
    party = Party(round_of(3, 2))

    def tap(step, node, data):
        if step != ProtocolStep.UNMASK or node != 0:
            return data
        rows = unpack_rows(data[HEADER:], 67, range(3))
        rows[1] = rows[1][:-1] + bytes([rows[1][-1] ^ 1])
        return party.settings.frame_answer(step, node, pack_rows(rows))

    party.tap = tap
    with pytest.raises(VoidRoundError, match=r"wrong|fit together"):
        party.run()


def test_answers_of_nodes_that_were_not_asked_do_not_count():
    party = Party(round_of(3, 2))
    party.dropped = {2: ProtocolStep.ADVERTISE}
    server, requests = until(party, ProtocolStep.SHARE)
    answers = party.exchange(ProtocolStep.SHARE, requests)
    server.accept(ProtocolStep.SHARE, answers | {2: answers[0], 17: b"x"})
    assert server.rejected == 2


@settings(max_examples=150, deadline=None)
@given(step=st.sampled_from(list(ProtocolStep)), data=st.binary(max_size=400), keep=st.integers(0, 60))
def test_random_bytes_never_do_more_than_be_refused(step, data, keep):
    facts = round_of(3, 2)
    good = facts.frame_request(step, 0, b"")
    node = SecAggClient(facts, 0, KEYS[0], lambda: np.zeros(VALUES, dtype=np.uint32))
    node._next = step
    message = good[:keep] + data
    if step == ProtocolStep.ADVERTISE and message == good:
        return
    with pytest.raises(SecureError):
        node.answer(step, message)
    server = SecAggServer(facts)
    with pytest.raises(VoidRoundError):
        server.accept(ProtocolStep.ADVERTISE, {0: facts.frame_answer(ProtocolStep.ADVERTISE, 0, data), 1: message})
    assert server.rejected == 2


# Pieces


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": 2}, "more than half"),
        ({"threshold": 6}, "no more than all"),
        ({"nodes": 1, "threshold": 1}, "at least 2"),
        ({"clients": [1, 2]}, "number of clients"),
        ({"bits": 12}, "16, 24 or 32"),
        ({"values": 0}, "cannot travel"),
        ({"least": 0}, "at least 1 client"),
    ],
)
def test_impossible_rounds_are_refused(change, match):
    with pytest.raises(SecureError, match=match):
        round_of(**change)


@settings(max_examples=40, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), count=st.integers(1, 9), data=st.data())
def test_any_threshold_shares_give_the_secret_and_fewer_do_not(secret, count, data):
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secret, threshold, range(1, count + 1))
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    assert shamir.combine({place: shares[place] for place in chosen}) == secret
    if threshold > 1:
        with pytest.raises(SecureError, match="fit together"):  # but for a chance of 2^-265
            shamir.combine({place: shares[place] for place in chosen[:-1]})


def test_masks_are_the_cipher_stream_in_any_chunks(monkeypatch):
    key = bytes(range(32))
    whole, parts = np.zeros(1000, dtype=np.uint32), np.zeros(1000, dtype=np.uint32)
    crypto.apply_mask(whole, key, 1)
    monkeypatch.setattr(crypto, "_MASK_VALUES", 64)
    crypto.apply_mask(parts, key, 1)
    assert np.array_equal(whole, parts)
    crypto.apply_mask(parts, key, -1)
    assert not parts.any()
    # RFC 8439's first block for the zero key and nonce.
    zero = np.zeros(4, dtype=np.uint32)
    crypto.apply_mask(zero, bytes(32), 1)
    assert zero.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_node_keys_are_the_ones_that_ssh_keygen_makes(tmp_path):
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    node = NodeKey.load(private)
    assert node.public == public_key_bytes(public)
    assert is_signed(node.public, node.sign(b"text"), b"text")
    assert not is_signed(node.public, node.sign(b"text"), b"other")
    assert not is_signed(node.public, bytes(96), b"text")
    assert not is_signed(bytes(49), node.sign(b"text"), b"text")
    small = ec.generate_private_key(ec.SECP256R1())
    wrong = small.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for data in (wrong, b"nonsense", public):
        with pytest.raises(SecureError, match="P-384"):
            NodeKey.load(data)
    with pytest.raises(SecureError, match="P-384"):
        public_key_bytes(b"ssh-ed25519 AAAA")
    assert private.decode().split("\n")[1] not in repr(node)


def test_a_degenerate_peer_key_is_refused():
    with pytest.raises(SecureError, match="degenerate"):
        KeyAgreement().derive_secret(bytes(32), b"context", b"purpose")


def test_the_package_uses_no_pickle():
    root = os.path.join(os.path.dirname(__file__), "..", "..", "src", "drencoder", "secure_aggregation")
    found = subprocess.run(
        ["grep", "-rliE", "pickle|marshal|eval\\(", root], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""
