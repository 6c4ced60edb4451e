"""Messages between server and sites as bytes: a fixed prefix, raw parts, then a small JSON head.

::

    offset  bytes  field
    0       4      magic b"DRFL"
    4       1      version, 2
    5       1      kind: 1 hello, 2 its answer, 3 query, 4 its answer and a stage's,
                     5 a later stage of secure aggregation
    6       2      zero
    8       32     digest of the recipe that both sides must have alike
    40      4      bytes of the head, unsigned little-endian like all below
    44      8      bytes of the first part
    52      8      bytes of the second part
    60      ...    first part, second part, head (UTF-8 JSON object)

The parts that all sites get alike come first, so that Flower, which stores what it carries by content, stores them once.
Sizes are checked against the receiver's bounds before anything is parsed; nothing is ever unpickled.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, final

from drencoder.errors import CodeError
from drencoder.reading import parse_json

_PREFIX = struct.Struct("<4sBBH32sIQQ")
_MAGIC = b"DRFL"
_VERSION = 2
_MAX_HEAD = 1 << 20


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    HELLO_ANSWER = 2
    QUERY = 3
    QUERY_ANSWER = 4
    STAGE = 5


@final
@dataclass(frozen=True)
class Frame:
    """A parsed message. Nothing in `head` has been checked but that it is a JSON object."""

    kind: int
    recipe: bytes
    head: Mapping[str, Any]
    first: bytes = b""
    second: bytes = b""


def pack_frame(frame: Frame) -> bytes:
    """The bytes of a frame; CodeError if its head is larger than 1 MiB."""
    head = json.dumps(frame.head, sort_keys=True, allow_nan=False).encode()
    if len(head) > _MAX_HEAD:
        raise CodeError(f"a frame's head has {len(head):,} bytes, more than {_MAX_HEAD:,}: ask fewer clients of a site")
    prefix = _PREFIX.pack(_MAGIC, _VERSION, frame.kind, 0, frame.recipe, len(head), len(frame.first), len(frame.second))
    return b"".join((prefix, frame.first, frame.second, head))


def unpack_frame(data: bytes, kind: int, *, first: int, second: int) -> Frame:
    """The frame in `data`; CodeError unless it is whole, of this kind, and its parts have at most these sizes.

    The recipe's digest is the caller's to compare.
    """
    if len(data) < _PREFIX.size:
        raise CodeError(f"truncated frame of {len(data)} bytes")
    magic, version, got, zero, recipe, head_size, first_size, second_size = _PREFIX.unpack_from(data)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0):
        raise CodeError("foreign frame: another protocol, or another version of it")
    if got != kind:
        raise CodeError(f"frame of kind {got} where {kind} was expected")
    if head_size > _MAX_HEAD or first_size > first or second_size > second:
        raise CodeError(f"frame with parts of {first_size:,} and {second_size:,} bytes: more than it may have")
    start = _PREFIX.size
    middle, end = start + first_size, start + first_size + second_size
    if len(data) != end + head_size:
        raise CodeError(f"frame of {len(data):,} bytes that says it has {end + head_size:,}")
    try:
        head = parse_json(data[end:], finite=True)
    except ValueError:
        raise CodeError("frame with a head that is not JSON") from None
    if not isinstance(head, dict):
        raise CodeError("frame with a head that is not a JSON object")
    return Frame(kind, recipe, head, data[start:middle], data[middle:end])
