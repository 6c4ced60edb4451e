"""What both sides agree on before a round, and how its messages look as bytes.

Legend: V values of a masked vector, b bits of a value, n nodes.

::

    offset  bytes  field
    0       4      magic b"DRSA"
    4       1      version, 1
    5       1      stage, 1 to 5
    6       1      1 a server's request, 2 a node's answer
    7       1      zero
    8       4      the node's number, unsigned little-endian like all below
    12      32     context: SHA-256 of the round's settings
    44      ...    body

    stage        request's body                     answer's body
    1 ADVERTISE  nothing                            two X25519 keys, signature
    2 SHARE      per node: keys and signature       digest of the own seed; per peer: two sealed shares
    3 MASK       per peer: two sealed shares        V values of b bits, masked
    4 CONFIRM    numbers of the nodes that answered signature of them
    5 UNMASK     per node: signature                per node: which of the two shares, the share

A list is a count of 4 bytes and rows of one length, each a node's number (4 bytes) and its part, in ascending order. All
lengths are known before a message comes, so none is parsed that is longer than it may be.
"""

import enum
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

from drencoder.errors import SecureError
from drencoder.secure_aggregation.crypto import PUBLIC_KEY_BYTES, SEAL_BYTES, SECRET_BYTES, SIGNATURE_BYTES
from drencoder.secure_aggregation.shamir import SHARE_BYTES

__all__ = [
    "KEYS_BYTES",
    "SEALED_BYTES",
    "RoundSettings",
    "Stage",
    "pack_values",
    "round_bytes",
    "rows_body",
    "unpack_rows",
    "unpack_values",
]

_MAGIC, _VERSION = b"DRSA", 1
_HEADER = struct.Struct("<4sBBBBI32s")
_NUMBER = struct.Struct("<I")
_REQUEST, _ANSWER = 1, 2
_MOST_VALUES = 1 << 28
KEYS_BYTES = 2 * SECRET_BYTES + SIGNATURE_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES


class Stage(enum.IntEnum):
    """The five exchanges of a round, in order."""

    ADVERTISE = 1
    SHARE = 2
    MASK = 3
    CONFIRM = 4
    UNMASK = 5


@final
@dataclass(frozen=True)
class RoundSettings:
    """The public facts of one round; every party has its own copy, and messages of another copy are refused.

    Args:
      run_id, slot, attempt: which round; no two rounds of a run have the same.
      values, bits: V and b; b is 16, 24 or 32.
      threshold: how many nodes must take part to the end. More than half of the roster, else two halves could be asked
        for different shares.
      least_clients: how many clients must be behind the nodes that sent a masked vector; honest nodes reveal nothing
        of a sum of fewer, whose noise would be too small.
      clients: how many clients each node hosts in this round.
      roster: each node's public key; a node's number is its position.

    Raises SecureError on impossible facts.
    """

    run_id: str
    slot: int
    attempt: int
    values: int
    bits: int
    threshold: int
    least_clients: int
    clients: tuple[int, ...]
    roster: tuple[bytes, ...]

    def __post_init__(self) -> None:
        count = len(self.roster)
        if len(self.clients) != count or len(set(self.roster)) != count or min(self.clients, default=0) < 0:
            raise SecureError(
                f"A roster of {count} nodes needs {count} different keys and a number of clients for each."
            )
        if any(len(key) != PUBLIC_KEY_BYTES for key in self.roster):
            raise SecureError(f"A roster's keys have {PUBLIC_KEY_BYTES} bytes each: use NodeKey.public.")
        if not (count < 2 * self.threshold and 2 <= self.threshold <= count):
            raise SecureError(
                f"The threshold is {self.threshold} of {count} nodes; it must be at least 2, more than half and no more "
                "than all: raise it, or add nodes."
            )
        if not 1 <= self.values <= _MOST_VALUES or self.bits not in (16, 24, 32):
            raise SecureError(f"{self.values} values of {self.bits} bits cannot travel; bits are 16, 24 or 32.")
        if self.least_clients < 1:
            raise SecureError("A round needs at least 1 client, whose noise hides it.")

    @cached_property
    def context(self) -> bytes:
        """What binds a message, a signature or a key to this round: 32 bytes."""
        facts = [self.run_id, self.slot, self.attempt, self.values, self.bits, self.threshold, self.least_clients]
        text = json.dumps([*facts, self.clients, [key.hex() for key in self.roster]])
        return hashlib.sha256(b"drencoder secure aggregation 1\n" + text.encode()).digest()

    @property
    def nodes(self) -> range:
        return range(len(self.roster))

    def clients_of(self, nodes: Iterable[int]) -> int:
        """How many clients are behind these nodes."""
        return sum(self.clients[node] for node in nodes)

    # Frames

    def request(self, stage: Stage, node: int, body: bytes) -> bytes:
        """A server's message to a node."""
        return self._header(stage, node, _REQUEST) + body

    def answer(self, stage: Stage, node: int, body: bytes) -> bytes:
        """A node's message to the server."""
        return self._header(stage, node, _ANSWER) + body

    def request_body(self, data: bytes, stage: Stage, node: int) -> bytes:
        """Checks a message's size and header and returns its body; SecureError says what is wrong."""
        return self._body(data, stage, node, _REQUEST)

    def answer_body(self, data: bytes, stage: Stage, node: int) -> bytes:
        return self._body(data, stage, node, _ANSWER)

    def largest(self, stage: Stage, *, answer: bool) -> int:
        """Bytes that a message of this stage has at most: when no node has dropped out."""
        return _message_size(stage, len(self.roster), self.values, self.bits, answer)

    def _header(self, stage: Stage, node: int, kind: int) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, stage, kind, 0, node, self.context)

    def _body(self, data: bytes, stage: Stage, node: int, kind: int) -> bytes:
        if not _HEADER.size <= len(data) <= self.largest(stage, answer=kind == _ANSWER):
            raise SecureError(f"A message of {len(data)} bytes has an impossible size for {stage.name}: refused.")
        if data[: _HEADER.size] != self._header(stage, node, kind):
            names = ("magic", "version", "stage", "direction", "reserved field", "node", "context (another round)")
            pairs = zip(names, _HEADER.unpack_from(data), _HEADER.unpack(self._header(stage, node, kind)), strict=True)
            wrong = ", ".join(name for name, got, wanted in pairs if got != wanted)
            raise SecureError(f"A message for {stage.name} has a wrong {wrong}: refused.")
        return data[_HEADER.size :]


def _message_size(stage: Stage, nodes: int, values: int, bits: int, answer: bool) -> int:
    rows = {Stage.SHARE: KEYS_BYTES, Stage.CONFIRM: 0, Stage.UNMASK: SIGNATURE_BYTES}
    requests = {other: rows_size(nodes, width) for other, width in rows.items()}
    requests[Stage.MASK] = rows_size(nodes - 1, SEALED_BYTES)
    answers = {
        Stage.ADVERTISE: KEYS_BYTES,
        Stage.SHARE: SECRET_BYTES + rows_size(nodes - 1, SEALED_BYTES),
        Stage.MASK: values * bits // 8,
        Stage.CONFIRM: SIGNATURE_BYTES,
        Stage.UNMASK: rows_size(nodes, 1 + SHARE_BYTES),
    }
    return _HEADER.size + (answers[stage] if answer else requests.get(stage, 0))


def round_bytes(nodes: int, values: int, bits: int) -> tuple[int, int]:
    """Bytes (up, down) of one node in one round in which nobody drops out."""
    up = sum(_message_size(stage, nodes, values, bits, answer=True) for stage in Stage)
    down = sum(_message_size(stage, nodes, values, bits, answer=False) for stage in Stage)
    return up, down


def rows_size(count: int, width: int) -> int:
    """Bytes of a list of `count` rows with parts of `width` bytes."""
    return _NUMBER.size + count * (_NUMBER.size + width)


def rows_body(rows: Mapping[int, bytes]) -> bytes:
    """node -> part as bytes, ascending."""
    listed = (_NUMBER.pack(node) + rows[node] for node in sorted(rows))
    return _NUMBER.pack(len(rows)) + b"".join(listed)


def unpack_rows(body: bytes, width: int, nodes: range) -> dict[int, bytes]:
    """Inverse of `rows_body` for parts of `width` bytes. SecureError unless ascending numbers of `nodes` and nothing else."""
    step = _NUMBER.size + width
    if len(body) < _NUMBER.size or len(body) != rows_size(_NUMBER.unpack_from(body)[0], width):
        raise SecureError(f"A list of {len(body)} bytes is not one of rows with {width} bytes: refused.")
    rows: dict[int, bytes] = {}
    last = -1
    for start in range(_NUMBER.size, len(body), step):
        node = _NUMBER.unpack_from(body, start)[0]
        if node <= last or node not in nodes:
            raise SecureError(f"A list names node {node} after {last}; numbers must ascend within the roster: refused.")
        rows[node] = body[start + _NUMBER.size : start + step]
        last = node
    return rows


def pack_values(values_V: npt.NDArray[np.uint32], bits: int) -> bytes:
    """The low `bits` of every value."""
    cells = np.ascontiguousarray(values_V, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return cells[:, : bits // 8].tobytes()


def unpack_values(data: bytes, values: int, bits: int) -> npt.NDArray[np.uint32]:
    """Inverse of `pack_values`. SecureError for another length."""
    if len(data) * 8 != values * bits:
        raise SecureError(f"A masked vector has {len(data)} bytes instead of {values * bits // 8}: refused.")
    cells = np.zeros((values, 4), dtype=np.uint8)
    cells[:, : bits // 8] = np.frombuffer(data, dtype=np.uint8).reshape(values, bits // 8)
    return cells.view("<u4").ravel().astype(np.uint32, copy=False)
