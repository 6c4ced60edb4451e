"""Codes as bytes: a versioned header of 20 bytes, then float32 values, integers, or a length and levels of a few bits.

Legend: N messages, K code values, b bits of a level.

::

    offset  bytes  field
    0       4      magic b"DREC"
    4       1      version, 1
    5       1      value type: 2 float32, 6 rotated4, 7 rotated2, 8 rotated1, 9 integer16, 10 integer24, 11 integer32
    6       2      zero
    8       4      encoder tag (which encoder and shape the code is of), unsigned little-endian like all below
    12      4      round
    16      4      K, the number of values
    20      ...    float32: K values; integers: K values of b bits in two's complement
    20      4      rotated: the code's length, float32
    24      ...    rotated: K levels of b bits in two's complement, the first in a byte's low bits; zero bits at the end

There is no client name in a message; who sent it is the transport's business.

*float32* is exact, so that a clip norm that held before packing holds after it.

*Integers* are a code with all of its noise, as local trust sends them: numbers of steps modulo 2^b. What a step is, and b, follow from
the plan (`secure_aggregation.quantise`), and are in no message.

*Rotated* codes (`encoders.rotated`) are turned at random, in each round anew and for all clients alike; the levels are numbers of
the best values of a standard normal. They keep their length, so that no clip cuts them again, and the more of their direction
the more bits they have: a cosine of 0.995, 0.94 and 0.80 with 4, 2 and 1. Under local trust the noise was added before, so that
rounding is post-processing of a noised release. But the sum is no sum of the releases any more, so nobody hides behind the
noise of others, and the public's epsilon is the server's.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.encoders.code_sizes import BITS_PER_VALUE, message_bytes
from drencoder.encoders.contract import Encoder
from drencoder.encoders.rotated import Rotation, quantise, unit
from drencoder.errors import CodeError
from drencoder.rng import derive_seed

WireDtype = Literal["float32", "rotated4", "rotated2", "rotated1", "integer16", "integer24", "integer32"]

_MAGIC = b"DREC"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHIII")
_VALUE_TYPE = {
    "float32": 2, "rotated4": 6, "rotated2": 7, "rotated1": 8, "integer16": 9, "integer24": 10, "integer32": 11
}  # fmt: skip
_FLOAT = np.dtype("<f4")
_LARGEST_LENGTH = float(np.finfo(np.float32).max) / 2**12  # of a rotated code: turning it back adds up as many values
_MAX_UINT32 = 2**32 - 1

_Floats = npt.NDArray[np.float32]
_Steps = npt.NDArray[np.int64]
_Levels = npt.NDArray[np.int8]


@final
@dataclass(frozen=True)
class WireFormat:
    """What both sides agreed on for a run: value type, encoder tag, code size. Public."""

    code_size: int
    encoder_tag: int
    dtype: WireDtype = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _VALUE_TYPE:
            *most, last = get_args(WireDtype)
            raise CodeError(f"codes travel as {', '.join(most)} or {last}, not {self.dtype!r}")
        for name, bound in (("code_size", 1), ("encoder_tag", 0)):
            if not bound <= getattr(self, name) <= _MAX_UINT32:
                raise CodeError(f"{name} is {getattr(self, name)}, expected {bound} to {_MAX_UINT32}")

    @classmethod
    def of(cls, encoder: Encoder, dtype: WireDtype = "float32") -> "WireFormat":
        """The format of this encoder's codes; the tag tells apart names, bases, layouts and code sizes."""
        shapes = [(segment.name, segment.shape) for segment in encoder.segments]
        facts = encoder.describe()
        kind = (encoder.name, facts.get("fingerprint", ""))
        text = repr((kind, encoder.update_size, encoder.code_size, shapes))
        tag = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        return cls(encoder.code_size, tag, dtype)

    @cached_property
    def message_size(self) -> int:
        """Bytes of one message, header included."""
        return message_bytes(self.code_size, self.dtype)

    @property
    def bits(self) -> int:
        """Bits of one value, without its share of header and scale."""
        return BITS_PER_VALUE[self.dtype]

    @property
    def rotated(self) -> bool:
        """Whether codes are turned before they are rounded."""
        return self.dtype.startswith("rotated")

    @property
    def integers(self) -> bool:
        """Whether values are numbers of steps, in int64 on both sides of the wire."""
        return self.dtype.startswith("integer")

    def rotation(self, round_index: int) -> Rotation:
        """How all codes of a round are turned. Public."""
        return _rotation(self.code_size, derive_seed(self.encoder_tag, "rotation", round_index))

    def header(self, round_index: int) -> bytes:
        """The one header that a message of this format and round can have; CodeError unless 0 <= round < 2^32."""
        if not 0 <= round_index <= _MAX_UINT32:
            raise CodeError(f"round is {round_index}, expected 0 to {_MAX_UINT32}")
        kind = _VALUE_TYPE[self.dtype]
        return _HEADER.pack(_MAGIC, _VERSION, kind, 0, self.encoder_tag, round_index, self.code_size)


@lru_cache(maxsize=1)
def _rotation(code_size: int, seed: int) -> Rotation:
    """Of the current round: a site packs its clients' codes one batch after another."""
    return Rotation(code_size, seed)


class UnpackedRows(NamedTuple):
    """The good messages' codes, in order: code_NK float32 (int64 of integers), their positions, and how many were rejected."""

    code_NK: Tensor
    accepted: list[int]
    rejected: int


def pack_rows(code_NK: Tensor, wire_format: WireFormat, round_index: int) -> list[bytes]:
    """One message per row; CodeError if the rows have another size or type, or any value is not finite or too large."""
    if code_NK.dim() != 2 or code_NK.shape[1] != wire_format.code_size:
        raise CodeError(f"codes of shape {tuple(code_NK.shape)} do not fit a format of {wire_format.code_size} values")
    if wire_format.integers:
        return _packed_integers(code_NK, wire_format, round_index)
    values_NK = code_NK.detach().to("cpu", torch.float32)
    bad = int((~values_NK.isfinite()).any(dim=1).sum())
    if bad:
        raise CodeError(f"{bad} of {len(values_NK)} codes are not finite; clip before packing")
    header = wire_format.header(round_index)
    if wire_format.rotated:
        bits = wire_format.bits
        length_N, level_NK = quantise(values_NK, bits, wire_format.rotation(round_index))
        lengths = map(_towards_zero, length_N.tolist())
        return [header + _packed(*row, bits) for row in zip(lengths, level_NK.numpy(), strict=True)]
    array = values_NK.contiguous().numpy().astype(_FLOAT, copy=False)
    return [header + row.tobytes() for row in array]


def _packed_integers(steps_NK: Tensor, wire_format: WireFormat, round_index: int) -> list[bytes]:
    """The low bytes of each value, the lowest first."""
    half = 1 << (wire_format.bits - 1)
    if steps_NK.dtype != torch.int64 or bool(((steps_NK < -half) | (steps_NK >= half)).any()):
        raise CodeError(f"codes of {wire_format.bits} bits are whole numbers from {-half} to {half - 1}")
    header, array = wire_format.header(round_index), steps_NK.cpu().contiguous().numpy().astype("<i8", copy=False)
    low_NKb = array.view(np.uint8).reshape(*array.shape, 8)[..., : wire_format.bits // 8]
    return [header + row.tobytes() for row in low_NKb]


def _packed(length: float, level_K: _Levels, bits: int) -> bytes:
    """Length and packed levels; the bits after the last one, to a whole byte, are zero."""
    cells = np.zeros(-(-level_K.size * bits // 8) * (8 // bits), dtype=np.uint8)
    cells[: level_K.size] = level_K.view(np.uint8) & np.uint8(2**bits - 1)
    packed = cells[:: 8 // bits].copy()
    for place in range(1, 8 // bits):
        packed |= cells[place :: 8 // bits] << np.uint8(place * bits)
    return np.array(length, dtype=_FLOAT).tobytes() + packed.tobytes()


def _towards_zero(length: float) -> float:
    """The largest float32 that is no longer; very long codes are cut."""
    near = np.float32(min(length, _LARGEST_LENGTH))
    return float(near if float(near) <= length else np.nextafter(near, np.float32(0)))


def unpack_rows(messages: Sequence[bytes], wire_format: WireFormat, round_index: int) -> UnpackedRows:
    """The codes of all good messages, and a count of the others; never raises for a message.

    A message is good if its size and every field of its header are the expected ones and all values are finite; a rotated one, if
    its length is in range and the bits after the last level are zero. The size is checked first; nothing in an unexpected
    message is parsed or allocated.
    """
    expected = wire_format.header(round_index)
    read: Callable[[bytes, WireFormat], _Floats | _Steps | None] = _float_values
    if wire_format.rotated or wire_format.integers:
        read = _rotated_values if wire_format.rotated else _integer_values
    candidates = [
        position
        for position, data in enumerate(messages)
        if len(data) == wire_format.message_size and data[: _HEADER.size] == expected
    ]
    dtype = np.int64 if wire_format.integers else np.float32
    code_NK = np.empty((len(candidates), wire_format.code_size), dtype=dtype)
    accepted: list[int] = []
    for position in candidates:
        code_K = read(messages[position], wire_format)
        if code_K is not None:
            code_NK[len(accepted)] = code_K
            accepted.append(position)
    good_NK = torch.from_numpy(code_NK[: len(accepted)])
    if wire_format.rotated and accepted:
        good_NK = wire_format.rotation(round_index).turn_back(good_NK)
    return UnpackedRows(good_NK, accepted, len(messages) - len(accepted))


def _float_values(data: bytes, wire_format: WireFormat) -> _Floats | None:
    """code_K of a message whose size and header were checked; None if a value is not finite."""
    code_K = np.frombuffer(data, dtype=_FLOAT, offset=_HEADER.size).astype(np.float32)
    return code_K if np.isfinite(code_K).all() else None


def _integer_values(data: bytes, wire_format: WireFormat) -> _Steps:
    """steps_K of a message whose size and header were checked: all are good."""
    width = wire_format.bits // 8
    cells = np.zeros((wire_format.code_size, 4), dtype=np.uint8)
    cells[:, 4 - width :] = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size).reshape(-1, width)
    return (cells.view("<i4").ravel() >> (32 - wire_format.bits)).astype(np.int64)  # the shift keeps the sign


def _rotated_values(data: bytes, wire_format: WireFormat) -> _Floats | None:
    """code_K, still turned, of a message whose size and header were checked; None if its length or padding is impossible."""
    bits, size = wire_format.bits, wire_format.code_size
    length = np.frombuffer(data, dtype=_FLOAT, count=1, offset=_HEADER.size)[0]
    packed = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size + _FLOAT.itemsize)
    cells = np.empty((packed.size, 8 // bits), dtype=np.uint8)
    for place in range(8 // bits):
        cells[:, place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    sign = np.uint8(2 ** (bits - 1))
    level = ((cells ^ sign) - sign).view(np.int8).ravel()  # b-bit two's complement, wrapping around in uint8
    if not 0 <= length <= _LARGEST_LENGTH or level[size:].any():  # nan fails too
        return None
    return unit(level[:size], bits) * length
