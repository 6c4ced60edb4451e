"""The head of a GGUF file: its facts and the shapes of its tensors, without its weights. No torch.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 2 and 3, little-endian).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from drencoder.errors import ModelError
from drencoder.reading import cut

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 26  # bytes of a text, items of an array: more is no file of a model


@dataclass(frozen=True)
class GgufHeader:
    """`facts`: single values by name, lists left out. `shapes`: tensor name -> dimensions, the fastest first."""

    facts: dict[str, Any]
    shapes: dict[str, list[int]]


def read_gguf_header(file: Path) -> GgufHeader:
    """Reads the head of a GGUF file.

    Raises:
      ModelError: it is no GGUF file, or is cut.
    """
    try:
        with file.open("rb") as stream:
            magic, version, tensors, entries = struct.unpack("<4sIQQ", _take(stream, 24))
            if magic != b"GGUF" or version not in (2, 3) or max(tensors, entries) > _MOST:
                raise ValueError("its first bytes are not those of GGUF 2 or 3")
            facts = {}
            for _ in range(entries):
                key = _text(stream)
                facts[key] = _value(stream, _number(stream, "I"))
            shapes = {}
            for _ in range(tensors):
                name = _text(stream)
                shapes[name] = [_number(stream, "Q") for _ in range(_number(stream, "I"))]
                _take(stream, 12)  # type and place
        return GgufHeader({key: value for key, value in facts.items() if value is not None}, shapes)
    except (OSError, ValueError, KeyError, struct.error, MemoryError) as error:
        raise ModelError(f"{file} is not a readable GGUF file ({cut(error)}): copy the model again.") from None


def _take(stream: BinaryIO, count: int) -> bytes:
    if count > _MOST:
        raise ValueError("a length is out of range")
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("it is cut")
    return data


def _number(stream: BinaryIO, letter: str) -> Any:
    return struct.unpack(f"<{letter}", _take(stream, struct.calcsize(f"<{letter}")))[0]


def _text(stream: BinaryIO) -> str:
    return _take(stream, _number(stream, "Q")).decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    """A value, or None for a list, which is read over."""
    if kind == _STRING:
        return _text(stream)
    if kind != _ARRAY:
        return _number(stream, _SCALARS[kind])
    inner, count = _number(stream, "I"), _number(stream, "Q")
    if inner in _SCALARS:
        _take(stream, count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return None
    if inner != _STRING or count > _MOST:
        raise ValueError("a list that no model has")
    for _ in range(count):
        _text(stream)
    return None
