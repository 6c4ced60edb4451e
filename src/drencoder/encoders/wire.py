"""Codes as bytes: a versioned header of 20 bytes, then raw floats, or a scale and levels of a few bits.

Legend: N messages, K code values, b bits of an integer.

::

    offset  bytes  field
    0       4      magic b"DREC"
    4       1      version, 1
    5       1      value type: 1 float16, 2 float32, 3 int8, 4 int4, 5 int2, 6 rotated4, 7 rotated2, 8 rotated1
    6       2      zero
    8       4      encoder tag (which encoder and shape the code is of), unsigned little-endian like all below
    12      4      round
    16      4      K, the number of values
    20      ...    floats: K values
    20      4      others: the scale, float32
    24      ...    others: K levels of b bits in two's complement, the first in a byte's low bits; zero bits at the end

There is no client name in a message; who sent it is the transport's business.

*Floats* never lengthen a code: float32 is exact, and float16 rounds *towards zero* and saturates at +-65504. So every
value keeps |sent| <= |code|, a clip norm that held before packing holds after it, and a finite code never
becomes infinite. (Rounding to nearest could exceed the clip, which is the sensitivity, by one part in 2048.)

*Integers* mean level * scale, with levels -L..L, L = 2^(b-1) - 1 (int2: -1, 0, 1), and scale = max |value| / L of that
message. Rounding is stochastic (as in QSGD, Alistarh et al. 2017, https://arxiv.org/abs/1610.02132): v / scale goes to
one of its two neighbours so that E[sent] = v up to float32 rounding. Rounding to nearest would send a small value as
zero in every round and from every client; this error is independent between clients and averages out.
So an integer code can be longer than it was: by at most K scale^2 / 4 in mean square. The bound does not rest on it:

- Central trust: only the trusted server sees a message, and it clips what it unpacked before it sums (`steps.py`).
- Local trust: the noise was added before, so the scale, which shows the largest value, and the levels are functions
  of a noised release and of public random numbers: post-processing. But the sum is no sum of the releases any more,
  so nobody hides behind the others' noise (`decodes_each` of the plan).

*Rotated* codes (`encoders.rotated`) were turned at random, in each round anew and for all clients alike; the scale is the
code's length and the levels are numbers of the best values of a standard normal. They keep their length, so that
no clip cuts them again, and the more of their direction the more bits they have: a cosine of 0.995, 0.94 and 0.80 with 4, 2 and 1.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.encoders.code_sizes import BITS_PER_VALUE
from drencoder.encoders.contract import Encoder
from drencoder.encoders.rotated import Rotation, quantise, unit
from drencoder.errors import CodeError
from drencoder.rng import derive_seed

__all__ = [
    "UnpackedRows",
    "WireDtype",
    "WireFormat",
    "code_entropy",
    "noise_entropy",
    "pack",
    "pack_rows",
    "unpack",
    "unpack_levels",
    "unpack_rows",
]

WireDtype = Literal["float32", "float16", "int8", "int4", "int2", "rotated4", "rotated2", "rotated1"]

_MAGIC = b"DREC"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHIII")
_VALUE_TYPE = {
    "float16": 1, "float32": 2, "int8": 3, "int4": 4, "int2": 5, "rotated4": 6, "rotated2": 7, "rotated1": 8,
}  # fmt: skip
_FLOATS: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_BITS = {dtype: bits for dtype, bits in BITS_PER_VALUE.items() if dtype not in _FLOATS}  # of those that have levels
_SCALE = np.dtype("<f4")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_LARGEST_LENGTH = _MAX_FLOAT32 / 2**12  # of a rotated code: turning it back adds up as many values
_MAX_UINT32 = 2**32 - 1
_ENTROPY_VALUES = 1 << 16  # enough for two decimals of the entropy of 255 levels

_Floats = npt.NDArray[np.float32]
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
        """The format of this encoder's codes; the tag tells apart names, architectures, bases, layouts and code sizes."""
        shapes = [(segment.name, segment.shape) for segment in encoder.segments]
        facts = encoder.describe()
        kind = (encoder.name, facts.get("architecture", ""), facts.get("fingerprint", ""))
        text = repr((kind, encoder.update_size, encoder.code_size, shapes))
        tag = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        return cls(encoder.code_size, tag, dtype)

    @cached_property
    def message_size(self) -> int:
        """Bytes of one message, header included."""
        if self.dtype in _FLOATS:
            return _HEADER.size + self.code_size * _FLOATS[self.dtype].itemsize
        return _HEADER.size + _SCALE.itemsize + -(-self.code_size * self.bits // 8)

    @property
    def bits(self) -> int:
        """Bits of one value, without its share of header and scale."""
        return BITS_PER_VALUE[self.dtype]

    @property
    def top(self) -> int:
        """The largest level; CodeError for floats, which have none."""
        if self.dtype not in _BITS:
            raise CodeError(f"{self.dtype} codes have no levels; choose one of {', '.join(_BITS)}")
        return int(2 ** (self.bits - 1) - 1)

    @property
    def bottom(self) -> int:
        """The smallest level: integers leave out the one that has no counterpart above zero."""
        return -self.top - 1 if self.rotated else -self.top

    @property
    def rotated(self) -> bool:
        """Whether codes are turned before they are rounded."""
        return self.dtype.startswith("rotated")

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
    """The good messages' codes, in order: code_NK float32, their positions, and how many were rejected."""

    code_NK: Tensor
    accepted: list[int]
    rejected: int


def pack(code_K: Tensor, wire_format: WireFormat, round_index: int, stream: int = 0) -> bytes:
    """One code as a message; CodeError if it has another size or is not finite. See `pack_rows` for `stream`."""
    if code_K.dim() != 1:
        raise CodeError(f"a code is one row of values, got shape {tuple(code_K.shape)}; use pack_rows for more")
    return pack_rows(code_K.unsqueeze(0), wire_format, round_index, [stream])[0]


def pack_rows(
    code_NK: Tensor, wire_format: WireFormat, round_index: int, streams: Sequence[int] | None = None
) -> list[bytes]:
    """One message per row; CodeError if the rows have another size or any value is not finite.

    `streams`: a number for each row that no other row of the round has (the client's; default: the row's position). It
    names the public random numbers that an integer format rounds with, so that rows round independently of each other
    and a replayed run sends the same bytes. Floats do not use it. CodeError unless there is one for each row.
    """
    if code_NK.dim() != 2 or code_NK.shape[1] != wire_format.code_size:
        raise CodeError(f"codes of shape {tuple(code_NK.shape)} do not fit a format of {wire_format.code_size} values")
    streams = range(len(code_NK)) if streams is None else streams
    if len(streams) != len(code_NK):
        raise CodeError(f"{len(code_NK)} codes came with {len(streams)} rounding streams; give one for each code")
    values_NK = code_NK.detach().to("cpu", torch.float32)
    bad = int((~values_NK.isfinite()).any(dim=1).sum())
    if bad:
        raise CodeError(f"{bad} of {len(values_NK)} codes are not finite; clip before packing")
    header = wire_format.header(round_index)
    if wire_format.rotated:
        bits = wire_format.bits
        length_N, level_NK = quantise(values_NK, bits, wire_format.rotation(round_index))
        lengths = map(_towards_zero, length_N.tolist())
        return [header + _scaled(*row, bits) for row in zip(lengths, level_NK.numpy(), strict=True)]
    if wire_format.dtype in _BITS:
        rows = zip(values_NK.numpy(), streams, strict=True)
        return [header + _integers(row_K, wire_format, round_index, stream) for row_K, stream in rows]
    if wire_format.dtype == "float16":
        values_NK = _half_towards_zero(values_NK)
    array = values_NK.contiguous().numpy().astype(_FLOATS[wire_format.dtype], copy=False)
    return [header + row.tobytes() for row in array]


def _half_towards_zero(values_NK: Tensor) -> Tensor:
    """float16 with |result| <= |value|. One less in the bit pattern is the neighbour nearer to zero for either
    sign, and 65504 for an infinity."""
    half_NK = values_NK.to(torch.float16)
    too_long_NK = half_NK.to(torch.float32).abs() > values_NK.abs()
    return (half_NK.view(torch.int16) - too_long_NK.to(torch.int16)).view(torch.float16)


def _integers(code_K: _Floats, wire_format: WireFormat, round_index: int, stream: int) -> bytes:
    """Scale and packed levels of one code, rounded with the public random numbers of (encoder, round, stream)."""
    top, bits = wire_format.top, wire_format.bits
    scale = _scale(float(np.abs(code_K).max()), top)
    level_K = np.zeros(code_K.size, dtype=np.int8)
    if scale:
        # Philox words are the same on every platform and in every version of numpy; 53 of their bits are in [0, 1).
        words = np.random.Philox(derive_seed(wire_format.encoder_tag, "rounding", round_index, stream))
        uniform_K = (np.atleast_1d(words.random_raw(code_K.size)) >> np.uint64(11)) * 2.0**-53
        exact_K = code_K / np.float64(scale)
        lower_K = np.floor(exact_K)
        level_K = np.clip(lower_K + (uniform_K < exact_K - lower_K), -top, top).astype(np.int8)
    return _scaled(scale, level_K, bits)


def _scaled(scale: float, level_K: _Levels, bits: int) -> bytes:
    """Scale and packed levels; the bits after the last one, to a whole byte, are zero."""
    cells = np.zeros(-(-level_K.size * bits // 8) * (8 // bits), dtype=np.uint8)
    cells[: level_K.size] = level_K.view(np.uint8) & np.uint8(2**bits - 1)
    packed = cells[:: 8 // bits].copy()
    for place in range(1, 8 // bits):
        packed |= cells[place :: 8 // bits] << np.uint8(place * bits)
    return np.array(scale, dtype=_SCALE).tobytes() + packed.tobytes()


def _scale(largest: float, top: int) -> float:
    """The smallest float32 s with s * top >= largest, so that no value lies beyond the last level; 0 for a zero code."""
    scale = np.float32(largest / top)
    if float(scale) * top < largest:
        scale = np.nextafter(scale, np.float32(np.inf))
    return min(float(scale), _largest_scale(top))


def _towards_zero(length: float) -> float:
    """The largest float32 that is no longer; very long codes are cut."""
    near = np.float32(min(length, _LARGEST_LENGTH))
    return float(near if float(near) <= length else np.nextafter(near, np.float32(0)))


def _largest_scale(top: int) -> float:
    """The largest float32 s with s * top finite in float32; at the very end of float32's range values saturate there."""
    scale = np.float32(_MAX_FLOAT32 / top)
    return float(scale if float(scale) * top <= _MAX_FLOAT32 else np.nextafter(scale, np.float32(0)))


def unpack(data: bytes, wire_format: WireFormat, round_index: int) -> Tensor:
    """code_K float32 of one message.

    CodeError unless size, magic, version, value type, encoder, round and length are the expected ones and all
    values are finite; for levels, unless the scale is in range, every level is one that `pack` uses and the bits
    after the last one are zero. The size is checked first; nothing in an unexpected message is parsed or allocated.
    """
    _check_frame(data, wire_format, round_index)
    code_K, trouble = _values(data, wire_format)
    if trouble:
        raise CodeError(f"{trouble}; message rejected")
    return _turned_back(torch.from_numpy(code_K)[None], wire_format, round_index)[0]


def unpack_levels(data: bytes, wire_format: WireFormat, round_index: int) -> Tensor:
    """level_K int8 of one message; CodeError where `unpack` raises, and for floats, which have none."""
    bounds = wire_format.bottom, wire_format.top
    _check_frame(data, wire_format, round_index)
    _, level_K, trouble = _levels(data, wire_format, *bounds)
    if trouble:
        raise CodeError(f"{trouble}; message rejected")
    return torch.from_numpy(level_K.copy())


def _check_frame(data: bytes, wire_format: WireFormat, round_index: int) -> None:
    if len(data) != wire_format.message_size:
        trouble = "truncated" if len(data) < wire_format.message_size else "oversized"
        raise CodeError(f"{trouble} code of {len(data)} bytes, expected {wire_format.message_size}; message rejected")
    expected = wire_format.header(round_index)
    if data[: _HEADER.size] != expected:
        names = ("magic", "version", "value type", "reserved field", "encoder tag", "round", "length")
        pairs = zip(names, _HEADER.unpack_from(data), _HEADER.unpack(expected), strict=True)
        wrong = [f"{name} {got!r} instead of {wanted!r}" for name, got, wanted in pairs if got != wanted]
        raise CodeError(f"foreign code: {', '.join(wrong)}; message rejected")


def unpack_rows(messages: Sequence[bytes], wire_format: WireFormat, round_index: int) -> UnpackedRows:
    """The codes of all messages that `unpack` would accept, and a count of the others; never raises for them."""
    expected = wire_format.header(round_index)
    candidates = [
        position
        for position, data in enumerate(messages)
        if len(data) == wire_format.message_size and data[: _HEADER.size] == expected
    ]
    code_NK = np.empty((len(candidates), wire_format.code_size), dtype=np.float32)
    accepted: list[int] = []
    for position in candidates:
        code_K, trouble = _values(messages[position], wire_format)
        if not trouble:
            code_NK[len(accepted)] = code_K
            accepted.append(position)
    good_NK = _turned_back(torch.from_numpy(code_NK[: len(accepted)]), wire_format, round_index)
    return UnpackedRows(good_NK, accepted, len(messages) - len(accepted))


def _turned_back(code_NK: Tensor, wire_format: WireFormat, round_index: int) -> Tensor:
    if not wire_format.rotated or not len(code_NK):
        return code_NK
    return wire_format.rotation(round_index).turn_back(code_NK)


def _values(data: bytes, wire_format: WireFormat) -> tuple[_Floats, str]:
    """code_K float32 of a message whose size and header were checked, and what is wrong with it ("": nothing).

    Rotated codes as they were sent, not yet turned back.
    """
    if wire_format.dtype in _BITS:
        scale, level_K, trouble = _levels(data, wire_format, wire_format.bottom, wire_format.top)
        value_K = unit(level_K, wire_format.bits) if wire_format.rotated else level_K.astype(np.float32)
        return value_K * (np.float32(0) if trouble else scale), trouble
    code_K = np.frombuffer(data, dtype=_FLOATS[wire_format.dtype], offset=_HEADER.size).astype(np.float32)
    bad = code_K.size - int(np.isfinite(code_K).sum())
    return code_K, f"{bad} values of a code are not finite" if bad else ""


def _levels(data: bytes, wire_format: WireFormat, bottom: int, top: int) -> tuple[np.float32, _Levels, str]:
    """Scale and level_K int8 of a message whose size and header were checked, and what is wrong with it."""
    bits, size = wire_format.bits, wire_format.code_size
    scale = np.frombuffer(data, dtype=_SCALE, count=1, offset=_HEADER.size)[0]
    packed = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size + _SCALE.itemsize)
    cells = np.empty((packed.size, 8 // bits), dtype=np.uint8)
    for place in range(8 // bits):
        cells[:, place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    sign = np.uint8(2 ** (bits - 1))
    level = ((cells ^ sign) - sign).view(np.int8).ravel()  # b-bit two's complement, wrapping around in uint8
    largest = _LARGEST_LENGTH if wire_format.rotated else _largest_scale(top)
    if not 0 <= scale <= largest:  # nan fails too
        return scale, level[:size], f"scale {scale} of a code is not between 0 and {largest:g}"
    if foreign := int((level[:size] < bottom).sum()):
        return scale, level[:size], f"{foreign} levels of a code are {bottom - 1}, expected {bottom} to {top}"
    if level[size:].any():
        return scale, level[:size], "bits after the last value of a code are not zero"
    return scale, level[:size], ""


def code_entropy(levels: Tensor) -> float:
    """Empirical entropy of integers (any shape) in bits per value, as if each were drawn by itself (order 0).

    What an ideal entropy coder that knows their frequencies would send. 0 for no values. It comes out too low by about
    (distinct levels - 1) / (2 ln 2 * values) bits (Miller 1955), so give it many values for each level.
    CodeError for floats.
    """
    if levels.is_floating_point():
        raise CodeError(f"entropy is of integer levels, got {levels.dtype}; take them from unpack_levels")
    _, counts = np.unique(levels.cpu().numpy(), return_counts=True)
    share = counts / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum()) + 0.0  # no minus zero


def noise_entropy(wire_format: WireFormat) -> float | None:
    """Bits per value that an ideal entropy coder needs for a code of Gaussian noise; None for floats.

    Nobody's data is looked at. Under local trust noise is nearly all of a code; an un-noised code of a random sketch
    is close to Gaussian too. Other un-noised codes have longer tails, hence larger scales and a smaller entropy.
    """
    if wire_format.dtype not in _BITS:
        return None
    rows = -(-_ENTROPY_VALUES // wire_format.code_size)
    generator = torch.Generator().manual_seed(0)
    noise_NK = torch.randn(rows, wire_format.code_size, generator=generator)
    messages = pack_rows(noise_NK, wire_format, 0)
    return code_entropy(torch.cat([unpack_levels(message, wire_format, 0) for message in messages]))
