"""This module holds what both sides agree on before a round, and how its messages look as bytes.

Legend: V values of a masked vector, b bits of a value, n nodes.

::

    offset  bytes  field
    0       4      magic b"DRSA"
    4       1      version, 1
    5       1      step, 1 to 5
    6       1      1 a server's request, 2 a node's answer
    7       1      zero
    8       4      the node's number, unsigned little-endian like all below
    12      32     context: SHA-256 of the round's settings
    44      ...    body

    step        request's body                     answer's body
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

_MAGIC, _VERSION = b"DRSA", 1
_HEADER = struct.Struct("<4sBBBBI32s")
_NUMBER = struct.Struct("<I")
_REQUEST, _ANSWER = 1, 2
_MOST_VALUES = 1 << 28
KEYS_BYTES = 2 * SECRET_BYTES + SIGNATURE_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES


class ProtocolStep(enum.IntEnum):
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
        """The 32 bytes that bind a message, a signature or a key to this round."""
        facts = [self.run_id, self.slot, self.attempt, self.values, self.bits, self.threshold, self.least_clients]
        text = json.dumps([*facts, self.clients, [key.hex() for key in self.roster]])
        return hashlib.sha256(b"drencoder secure aggregation 1\n" + text.encode()).digest()

    @property
    def nodes(self) -> range:
        return range(len(self.roster))

    def count_clients(self, nodes: Iterable[int]) -> int:
        """Returns how many clients these nodes host together in this round."""
        return sum(self.clients[node] for node in nodes)

    # Frames

    def frame_request(self, step: ProtocolStep, node: int, body: bytes) -> bytes:
        """Returns a server's message to a node, header first."""
        return self._header(step, node, _REQUEST) + body

    def frame_answer(self, step: ProtocolStep, node: int, body: bytes) -> bytes:
        """Returns a node's message to the server, header first."""
        return self._header(step, node, _ANSWER) + body

    def parse_request(self, data: bytes, step: ProtocolStep, node: int) -> bytes:
        """Checks a request's size and header and returns its body. Raises SecureError, which says what is wrong."""
        return self._body(data, step, node, _REQUEST)

    def parse_answer(self, data: bytes, step: ProtocolStep, node: int) -> bytes:
        """Checks an answer's size and header and returns its body. Raises SecureError, which says what is wrong."""
        return self._body(data, step, node, _ANSWER)

    def largest(self, step: ProtocolStep, *, answer: bool) -> int:
        """Returns how many bytes a message of this step has at most, which it has when no node has dropped out."""
        return _message_size(step, len(self.roster), self.values, self.bits, answer)

    def _header(self, step: ProtocolStep, node: int, kind: int) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, step, kind, 0, node, self.context)

    def _body(self, data: bytes, step: ProtocolStep, node: int, kind: int) -> bytes:
        if not _HEADER.size <= len(data) <= self.largest(step, answer=kind == _ANSWER):
            raise SecureError(f"A message of {len(data)} bytes has an impossible size for {step.name}: refused.")
        if data[: _HEADER.size] != self._header(step, node, kind):
            names = ("magic", "version", "step", "direction", "reserved field", "node", "context (another round)")
            pairs = zip(names, _HEADER.unpack_from(data), _HEADER.unpack(self._header(step, node, kind)), strict=True)
            wrong = ", ".join(name for name, got, expected in pairs if got != expected)
            raise SecureError(f"A message for {step.name} has a wrong {wrong}: refused.")
        return data[_HEADER.size :]


def _message_size(step: ProtocolStep, nodes: int, values: int, bits: int, answer: bool) -> int:
    rows = {ProtocolStep.SHARE: KEYS_BYTES, ProtocolStep.CONFIRM: 0, ProtocolStep.UNMASK: SIGNATURE_BYTES}
    requests = {other: rows_size(nodes, width) for other, width in rows.items()}
    requests[ProtocolStep.MASK] = rows_size(nodes - 1, SEALED_BYTES)
    answers = {
        ProtocolStep.ADVERTISE: KEYS_BYTES,
        ProtocolStep.SHARE: SECRET_BYTES + rows_size(nodes - 1, SEALED_BYTES),
        ProtocolStep.MASK: values * bits // 8,
        ProtocolStep.CONFIRM: SIGNATURE_BYTES,
        ProtocolStep.UNMASK: rows_size(nodes, 1 + SHARE_BYTES),
    }
    return _HEADER.size + (answers[step] if answer else requests.get(step, 0))


def round_bytes(nodes: int, values: int, bits: int) -> tuple[int, int]:
    """Returns the bytes (up, down) of one node in one round in which no node drops out."""
    up = sum(_message_size(step, nodes, values, bits, answer=True) for step in ProtocolStep)
    down = sum(_message_size(step, nodes, values, bits, answer=False) for step in ProtocolStep)
    return up, down


def rows_size(count: int, width: int) -> int:
    """Returns the bytes of a list of `count` rows with parts of `width` bytes."""
    return _NUMBER.size + count * (_NUMBER.size + width)


def pack_rows(rows: Mapping[int, bytes]) -> bytes:
    """Returns a list of rows (node -> part) as bytes, in ascending order of the nodes."""
    listed = (_NUMBER.pack(node) + rows[node] for node in sorted(rows))
    return _NUMBER.pack(len(rows)) + b"".join(listed)


def unpack_rows(body: bytes, width: int, nodes: range) -> dict[int, bytes]:
    """Reads what `pack_rows` wrote, for parts of `width` bytes.

    Raises SecureError unless the list holds ascending numbers of `nodes` and nothing else.
    """
    row_bytes = _NUMBER.size + width
    if len(body) < _NUMBER.size or len(body) != rows_size(_NUMBER.unpack_from(body)[0], width):
        raise SecureError(f"A list of {len(body)} bytes is not one of rows with {width} bytes: refused.")
    rows: dict[int, bytes] = {}
    last = -1
    for start in range(_NUMBER.size, len(body), row_bytes):
        node = _NUMBER.unpack_from(body, start)[0]
        if node <= last or node not in nodes:
            raise SecureError(f"A list names node {node} after {last}; numbers must ascend within the roster: refused.")
        rows[node] = body[start + _NUMBER.size : start + row_bytes]
        last = node
    return rows


def pack_values(values_V: npt.NDArray[np.uint32], bits: int) -> bytes:
    """Returns the low `bits` of every value, little-endian, `bits` / 8 bytes a value."""
    cells = np.ascontiguousarray(values_V, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return cells[:, : bits // 8].tobytes()


def unpack_values(data: bytes, values: int, bits: int) -> npt.NDArray[np.uint32]:
    """Reads what `pack_values` wrote: (values,) uint32. Raises SecureError for another length."""
    if len(data) * 8 != values * bits:
        raise SecureError(f"A masked vector has {len(data)} bytes instead of {values * bits // 8}: refused.")
    cells = np.zeros((values, 4), dtype=np.uint8)
    cells[:, : bits // 8] = np.frombuffer(data, dtype=np.uint8).reshape(values, bits // 8)
    return cells.view("<u4").ravel().astype(np.uint32, copy=False)
