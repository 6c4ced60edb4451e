"""Codes as bytes: exact round trips, no message that lengthens a code, no crash for any bytes.

Legend: N messages, K code values.
"""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.sketch import RandomSketch
from drencoder.encoders.wire import WireDtype, WireFormat, pack, pack_rows, unpack, unpack_rows
from drencoder.errors import CodeError
from drencoder.layout import Segment

SEGMENTS = (Segment("a", 0, (8, 16)),)
SKETCH = RandomSketch.build(SEGMENTS, 6)
FORMATS = [WireFormat.of(SKETCH, "float16"), WireFormat.of(SKETCH, "float32")]
CODE = torch.tensor([0.0, -1.5, 3.25, 1e-3, 0.1, -1234.5])

finite_float32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize("wire_format", FORMATS, ids=lambda f: f.dtype)
def test_message_layout(wire_format: WireFormat) -> None:
    data = pack(CODE, wire_format, 7)
    assert len(data) == wire_format.message_size == 20 + 6 * (2 if wire_format.dtype == "float16" else 4)
    kind = 1 if wire_format.dtype == "float16" else 2
    assert struct.unpack_from("<4sBBHIII", data) == (b"DREC", 1, kind, 0, wire_format.encoder_tag, 7, 6)
    values = np.frombuffer(data, dtype="<f2" if kind == 1 else "<f4", offset=20)
    assert values[1] == -1.5


@settings(max_examples=150)
@given(values=st.lists(finite_float32, min_size=6, max_size=6), round_index=st.integers(0, 2**32 - 1))
def test_float32_is_exact(values: list[float], round_index: int) -> None:
    code_K = torch.tensor(values)
    assert torch.equal(unpack(pack(code_K, FORMATS[1], round_index), FORMATS[1], round_index), code_K)


@settings(max_examples=300)
@given(values=st.lists(finite_float32 | st.floats(-1, 1, width=32), min_size=6, max_size=6))
def test_float16_never_lengthens_a_code(values: list[float]) -> None:
    code_K = torch.tensor(values)
    got_K = unpack(pack(code_K, FORMATS[0], 0), FORMATS[0], 0)
    assert (got_K.abs() <= code_K.abs()).all(), "the clip must survive the wire"
    assert (got_K * code_K >= 0).all()
    # Nothing larger in float16 would have fitted: the error is less than one unit in the last place.
    room_K = torch.maximum(code_K.abs().clamp(max=65504.0) * 2**-10, torch.tensor(2.0**-24))
    assert ((code_K.clamp(-65504.0, 65504.0) - got_K).abs() <= room_K).all()


def test_float16_saturates_instead_of_overflowing() -> None:
    code_K = torch.tensor([65504.0, 65505.0, 65520.0, 1e30, -3e38, -65520.0])
    got_K = unpack(pack(code_K, FORMATS[0], 0), FORMATS[0], 0)
    assert got_K.tolist() == [65504.0, 65504.0, 65504.0, 65504.0, -65504.0, -65504.0]


def test_float16_keeps_a_clip_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    wire_format = WireFormat(1000, 1, "float16")
    code_NK = torch.nn.functional.normalize(torch.randn(50, 1000, generator=generator))
    got_NK = unpack_rows(pack_rows(code_NK, wire_format, 0), wire_format, 0).code_NK
    assert (got_NK.double().norm(dim=1) <= code_NK.double().norm(dim=1)).all()
    assert (got_NK.norm(dim=1) > 0.999).all()
    nearest_NK = code_NK.half().double()
    assert (nearest_NK.norm(dim=1) > code_NK.double().norm(dim=1)).any()  # rounding to nearest would not do


@pytest.mark.parametrize("wire_format", FORMATS, ids=lambda f: f.dtype)
@pytest.mark.parametrize(
    ("position", "field"),
    [
        (0, "magic"),
        (4, "version"),
        (5, "value type"),
        (6, "reserved"),
        (8, "encoder tag"),
        (12, "round"),
        (16, "length"),
    ],
)
def test_each_header_field_is_checked(wire_format: WireFormat, position: int, field: str) -> None:
    data = bytearray(pack(CODE, wire_format, 7))
    data[position] ^= 0x03
    with pytest.raises(CodeError, match=f"foreign code: {field}"):
        unpack(bytes(data), wire_format, 7)
    assert unpack_rows([bytes(data)], wire_format, 7).rejected == 1


@pytest.mark.parametrize("wire_format", FORMATS, ids=lambda f: f.dtype)
def test_sizes_are_checked_first(wire_format: WireFormat) -> None:
    data = pack(CODE, wire_format, 7)
    for short in (b"", data[:3], data[:20], data[:-1]):
        with pytest.raises(CodeError, match=f"truncated code of {len(short)} bytes, expected {len(data)}"):
            unpack(short, wire_format, 7)
    for long in (data + b"\0", data * 1000):
        with pytest.raises(CodeError, match="oversized"):
            unpack(long, wire_format, 7)


def test_a_huge_claimed_length_allocates_nothing() -> None:
    data = bytearray(pack(CODE, FORMATS[1], 7))
    struct.pack_into("<I", data, 16, 2**32 - 1)
    with pytest.raises(CodeError, match="length 4294967295 instead of 6"):
        unpack(bytes(data), FORMATS[1], 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_rejected_on_both_sides(bad: float) -> None:
    code_K = CODE.clone()
    code_K[3] = bad
    for wire_format, dtype in zip(FORMATS, ("<f2", "<f4"), strict=True):
        with pytest.raises(CodeError, match="1 of 1 codes are not finite"):
            pack(code_K, wire_format, 0)
        forged = wire_format.header(0) + code_K.numpy().astype(dtype).tobytes()
        with pytest.raises(CodeError, match="1 values of a code are not finite"):
            unpack(forged, wire_format, 0)
        good = pack(CODE, wire_format, 0)
        rows = unpack_rows([good, forged, good], wire_format, 0)
        assert (rows.accepted, rows.rejected) == ([0, 2], 1)
        assert rows.code_NK.isfinite().all()


def test_rows_keep_their_order_and_count_the_rejected() -> None:
    code_NK = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    messages = pack_rows(code_NK, FORMATS[1], 3)
    messages[1] = messages[1][:-1]
    messages[3] = pack(code_NK[3], FORMATS[1], 4)  # of another round
    rows = unpack_rows(messages, FORMATS[1], 3)
    assert (rows.accepted, rows.rejected) == ([0, 2, 4], 2)
    assert torch.equal(rows.code_NK, code_NK[[0, 2, 4]])


@pytest.mark.parametrize("wire_format", FORMATS, ids=lambda f: f.dtype)
def test_no_messages(wire_format: WireFormat) -> None:
    assert pack_rows(torch.zeros(0, 6), wire_format, 0) == []
    rows = unpack_rows([], wire_format, 0)
    assert rows.code_NK.shape == (0, 6)
    assert (rows.accepted, rows.rejected) == ([], 0)
    assert unpack_rows([b"x"], wire_format, 0).rejected == 1


@settings(max_examples=300)
@given(data=st.binary(max_size=64), dtype=st.sampled_from(["float16", "float32"]))
def test_arbitrary_bytes_never_crash(data: bytes, dtype: WireDtype) -> None:
    wire_format = WireFormat.of(SKETCH, dtype)
    with pytest.raises(CodeError, match="rejected"):
        unpack(data, wire_format, 7)
    assert unpack_rows([data], wire_format, 7).rejected == 1


@settings(max_examples=300)
@given(body=st.binary(min_size=24, max_size=24))
def test_arbitrary_values_are_finite_or_rejected(body: bytes) -> None:
    data = FORMATS[1].header(7) + body
    rows = unpack_rows([data], FORMATS[1], 7)
    try:
        code_K = unpack(data, FORMATS[1], 7)
    except CodeError:
        assert rows.rejected == 1
    else:
        assert code_K.isfinite().all()
        assert torch.equal(rows.code_NK[0], code_K)


@settings(max_examples=200)
@given(bit=st.integers(0, (20 + 12) * 8 - 1))
def test_one_flipped_bit(bit: int) -> None:
    data = bytearray(pack(CODE, FORMATS[0], 7))
    data[bit // 8] ^= 1 << (bit % 8)
    rows = unpack_rows([bytes(data)], FORMATS[0], 7)
    if bit < 20 * 8:
        assert rows.rejected == 1
    assert rows.code_NK.isfinite().all()


def test_tags_tell_encoders_apart() -> None:
    others = [
        IdentityEncoder(SEGMENTS),
        RandomSketch.build(SEGMENTS, 7),
        RandomSketch.build((Segment("a", 0, (16, 8)),), 6),
        RandomSketch.build((Segment("b", 0, (8, 16)),), 6),
    ]
    tags = {WireFormat.of(encoder).encoder_tag for encoder in [SKETCH, *others]}
    assert len(tags) == 5


def test_impossible_formats_and_rounds() -> None:
    with pytest.raises(CodeError, match="float16 or float32, not 'float64'"):
        WireFormat(6, 1, "float64")  # type: ignore[arg-type]
    with pytest.raises(CodeError, match="code_size is 0, expected 1"):
        WireFormat(0, 1)
    for round_index in (-1, 2**32):
        with pytest.raises(CodeError, match="round is"):
            pack(CODE, FORMATS[0], round_index)
    with pytest.raises(CodeError, match="do not fit a format of 6 values"):
        pack(torch.zeros(5), FORMATS[0], 0)
    with pytest.raises(CodeError, match="use pack_rows"):
        pack(torch.zeros(2, 6), FORMATS[0], 0)
