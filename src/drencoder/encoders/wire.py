"""Codes as bytes: a versioned header of 20 bytes, then the raw little-endian values.

Legend: N messages, K code values.

::

    offset  bytes  field
    0       4      magic b"DREC"
    4       1      version, 1
    5       1      value type: 1 float16, 2 float32
    6       2      zero
    8       4      encoder tag (which encoder and shape the code is of), unsigned little-endian like all below
    12      4      round
    16      4      K, the number of values
    20      ...    values

There is no client name in a message; who sent it is the transport's business.

Packing never lengthens a code: float32 is exact, and float16 rounds *towards zero* and saturates at +-65504. So every
value keeps |sent| <= |code|, a clip norm that held before packing holds after it, and a finite code never
becomes infinite. (Rounding to nearest could exceed the clip, which is the sensitivity, by one part in 2048.)
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.errors import CodeError

__all__ = ["UnpackedRows", "WireDtype", "WireFormat", "pack", "pack_rows", "unpack", "unpack_rows"]

WireDtype = Literal["float16", "float32"]

_MAGIC = b"DREC"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHIII")
_DTYPES: dict[str, tuple[int, np.dtype]] = {"float16": (1, np.dtype("<f2")), "float32": (2, np.dtype("<f4"))}
_MAX_UINT32 = 2**32 - 1


@final
@dataclass(frozen=True)
class WireFormat:
    """What both sides agreed on for a run: value type, encoder tag, code size. Public."""

    code_size: int
    encoder_tag: int
    dtype: WireDtype = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise CodeError(f"codes travel as float16 or float32, not {self.dtype!r}")
        for name, bound in (("code_size", 1), ("encoder_tag", 0)):
            if not bound <= getattr(self, name) <= _MAX_UINT32:
                raise CodeError(f"{name} is {getattr(self, name)}, expected {bound} to {_MAX_UINT32}")

    @classmethod
    def of(cls, encoder: Encoder, dtype: WireDtype = "float32") -> "WireFormat":
        """The format of this encoder's codes; the tag tells apart names, architectures, layouts and code sizes."""
        shapes = [(segment.name, segment.shape) for segment in encoder.segments]
        kind = (encoder.name, encoder.describe().get("architecture", ""))
        text = repr((kind, encoder.update_size, encoder.code_size, shapes))
        tag = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        return cls(encoder.code_size, tag, dtype)

    @cached_property
    def message_size(self) -> int:
        """Bytes of one message, header included."""
        return _HEADER.size + self.code_size * _DTYPES[self.dtype][1].itemsize

    def header(self, round_index: int) -> bytes:
        """The one header that a message of this format and round can have; CodeError unless 0 <= round < 2^32."""
        if not 0 <= round_index <= _MAX_UINT32:
            raise CodeError(f"round is {round_index}, expected 0 to {_MAX_UINT32}")
        kind = _DTYPES[self.dtype][0]
        return _HEADER.pack(_MAGIC, _VERSION, kind, 0, self.encoder_tag, round_index, self.code_size)


class UnpackedRows(NamedTuple):
    """The good messages' codes, in order: code_NK float32, their positions, and how many were rejected."""

    code_NK: Tensor
    accepted: list[int]
    rejected: int


def pack(code_K: Tensor, wire_format: WireFormat, round_index: int) -> bytes:
    """One code as a message; CodeError if it has another size or is not finite."""
    if code_K.dim() != 1:
        raise CodeError(f"a code is one row of values, got shape {tuple(code_K.shape)}; use pack_rows for more")
    return pack_rows(code_K.unsqueeze(0), wire_format, round_index)[0]


def pack_rows(code_NK: Tensor, wire_format: WireFormat, round_index: int) -> list[bytes]:
    """One message per row; CodeError if the rows have another size or any value is not finite."""
    if code_NK.dim() != 2 or code_NK.shape[1] != wire_format.code_size:
        raise CodeError(f"codes of shape {tuple(code_NK.shape)} do not fit a format of {wire_format.code_size} values")
    values_NK = code_NK.detach().to("cpu", torch.float32)
    bad = int((~values_NK.isfinite()).any(dim=1).sum())
    if bad:
        raise CodeError(f"{bad} of {len(values_NK)} codes are not finite; clip before packing")
    if wire_format.dtype == "float16":
        values_NK = _half_towards_zero(values_NK)
    header = wire_format.header(round_index)
    array = values_NK.contiguous().numpy().astype(_DTYPES[wire_format.dtype][1], copy=False)
    return [header + row.tobytes() for row in array]


def _half_towards_zero(values_NK: Tensor) -> Tensor:
    """float16 with |result| <= |value|. One less in the bit pattern is the neighbour nearer to zero for either
    sign, and 65504 for an infinity."""
    half_NK = values_NK.to(torch.float16)
    too_long_NK = half_NK.to(torch.float32).abs() > values_NK.abs()
    return (half_NK.view(torch.int16) - too_long_NK.to(torch.int16)).view(torch.float16)


def unpack(data: bytes, wire_format: WireFormat, round_index: int) -> Tensor:
    """code_K float32 of one message.

    CodeError unless size, magic, version, value type, encoder, round and length are the expected ones and all
    values are finite. The size is checked first; nothing in an unexpected message is parsed or allocated.
    """
    if len(data) != wire_format.message_size:
        trouble = "truncated" if len(data) < wire_format.message_size else "oversized"
        raise CodeError(f"{trouble} code of {len(data)} bytes, expected {wire_format.message_size}; message rejected")
    expected = wire_format.header(round_index)
    if data[: _HEADER.size] != expected:
        names = ("magic", "version", "value type", "reserved field", "encoder tag", "round", "length")
        pairs = zip(names, _HEADER.unpack_from(data), _HEADER.unpack(expected), strict=True)
        wrong = [f"{name} {got!r} instead of {wanted!r}" for name, got, wanted in pairs if got != wanted]
        raise CodeError(f"foreign code: {', '.join(wrong)}; message rejected")
    code_K = _values([data], wire_format)[0]
    if not bool(code_K.isfinite().all()):
        raise CodeError(f"{int((~code_K.isfinite()).sum())} values of a code are not finite; message rejected")
    return code_K


def unpack_rows(messages: Sequence[bytes], wire_format: WireFormat, round_index: int) -> UnpackedRows:
    """The codes of all messages that `unpack` would accept, and a count of the others; never raises for them."""
    expected = wire_format.header(round_index)
    candidates = [
        position
        for position, data in enumerate(messages)
        if len(data) == wire_format.message_size and data[: _HEADER.size] == expected
    ]
    code_NK = _values([messages[position] for position in candidates], wire_format)
    finite_N = code_NK.isfinite().all(dim=1)
    accepted = [position for position, finite in zip(candidates, finite_N.tolist(), strict=True) if finite]
    if len(accepted) < len(candidates):
        code_NK = code_NK[finite_N]
    return UnpackedRows(code_NK, accepted, len(messages) - len(accepted))


def _values(messages: Sequence[bytes], wire_format: WireFormat) -> Tensor:
    """code_NK float32 from messages whose size and header were checked."""
    dtype = _DTYPES[wire_format.dtype][1]
    values_NK = np.empty((len(messages), wire_format.code_size), dtype=np.float32)
    for row, data in enumerate(messages):
        values_NK[row] = np.frombuffer(data, dtype=dtype, offset=_HEADER.size)
    return torch.from_numpy(values_NK)
