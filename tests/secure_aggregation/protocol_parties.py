"""Parties of secure aggregation in memory, for tests: nodes that drop out, and a tap on every message."""

import numpy as np
import pytest

from drencoder.errors import SecureError
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import (
    ProtocolStep,
    RoundSettings,
)
from drencoder.secure_aggregation.server import SecAggServer, aggregate

HEADER = 44
KEYS = [NodeKey.generate() for _ in range(7)]
VALUES, BITS = 50, 24


def round_of(nodes=5, threshold=3, *, values=VALUES, bits=BITS, clients=None, least=1, slot=1, attempt=0, run="run"):
    return RoundSettings(
        run, slot, attempt, values, bits, threshold, least, tuple(clients or [2] * nodes),
        tuple(key.public for key in KEYS[:nodes]),
    )  # fmt: skip


class Party:
    """All nodes of a round in memory, with drop-outs and a tap on every message."""

    def __init__(self, settings, seed=0, vectors=None):
        chance = np.random.default_rng(seed)
        size = (len(settings.roster), settings.values)
        self.settings = settings
        self.vectors = chance.integers(0, 2**settings.bits, size, dtype=np.uint32) if vectors is None else vectors
        self.nodes = [
            SecAggClient(settings, node, KEYS[node], lambda node=node: self.vectors[node]) for node in settings.nodes
        ]
        self.dropped: dict[int, ProtocolStep] = {}  # node -> first step that it does not answer
        self.sent: dict[tuple[ProtocolStep, int], bytes] = {}
        self.tap = lambda step, node, data: data

    def exchange(self, step, requests):
        answers = {}
        for node, request in requests.items():
            if step >= self.dropped.get(node, ProtocolStep.UNMASK + 1):
                continue
            answers[node] = self.tap(step, node, self.nodes[node].answer(step, request))
            self.sent[step, node] = answers[node]
        return answers

    def run(self):
        return aggregate(SecAggServer(self.settings), self.exchange)

    def plain(self, nodes):
        total = sum(self.vectors[node].astype(object) for node in nodes)
        return np.array(total % 2**self.settings.bits, dtype=np.uint32)


def until(party, step):
    """Runs a party up to `step` and gives the server and that step's requests."""
    server = SecAggServer(party.settings)
    for earlier in ProtocolStep:
        requests = server.make_requests(earlier)
        if earlier == step:
            return server, requests
        server.accept(earlier, party.exchange(earlier, requests))
    raise AssertionError


def refused(party, node, step, request, match):
    with pytest.raises(SecureError, match=match):
        party.nodes[node].answer(step, request)
    with pytest.raises(SecureError, match="each step has one answer"):  # and nothing more after that
        party.nodes[node].answer(step, request)
