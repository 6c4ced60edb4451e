"""Codes as bytes: exact round trips and no crash for any bytes (rotated codes: test_rotated).

Legend: N messages, K code values.
"""

import struct
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.encoders.wire import (
    WireDtype,
    WireFormat,
    pack_rows,
    unpack_rows,
)
from drencoder.errors import CodeError
from drencoder.models.adapter_layout import Segment
from encoder_toys import pack, unpack

SEGMENTS = (Segment("a", 0, (8, 16)),)
SKETCH = RandomSketch.build(SEGMENTS, 6)
FLOAT32 = WireFormat.of(SKETCH, "float32")
ROTATED = [WireFormat.of(SKETCH, dtype) for dtype in ("rotated4", "rotated2", "rotated1")]
EVERY_FORMAT = pytest.mark.parametrize("wire_format", [FLOAT32, *ROTATED], ids=lambda f: f.dtype)
INTEGERS = [WireFormat.of(SKETCH, dtype) for dtype in ("integer16", "integer24", "integer32")]
CODE = torch.tensor([0.0, -1.5, 3.25, 1e-3, 0.1, -1234.5])

finite_float32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


def test_message_layout() -> None:
    data = pack(CODE, FLOAT32, 7)
    assert len(data) == FLOAT32.message_size == 20 + 6 * 4
    assert struct.unpack_from("<4sBBHIII", data) == (b"DREC", 1, 2, 0, FLOAT32.encoder_tag, 7, 6)
    assert np.frombuffer(data, dtype="<f4", offset=20)[1] == -1.5


@settings(max_examples=150)
@given(values=st.lists(finite_float32, min_size=6, max_size=6), round_index=st.integers(0, 2**32 - 1))
def test_float32_is_exact(values: list[float], round_index: int) -> None:
    code_K = torch.tensor(values)
    received_K = unpack(pack(code_K, FLOAT32, round_index), FLOAT32, round_index)
    assert received_K is not None
    assert torch.equal(received_K, code_K)


@pytest.mark.parametrize("wire_format", INTEGERS, ids=lambda f: f.dtype)
def test_integers_are_exact_in_all_their_bits(wire_format: WireFormat) -> None:
    half = 1 << (wire_format.bits - 1)
    steps_K = torch.tensor([0, 1, -1, half - 1, -half, 258])
    data = pack(steps_K, wire_format, 7)
    assert len(data) == wire_format.message_size == 20 + 6 * wire_format.bits // 8
    assert data[-wire_format.bits // 8 :][:3] == bytes([2, 1, 0])[: wire_format.bits // 8]  # the low byte first
    received_K = unpack(data, wire_format, 7)
    assert received_K is not None
    assert received_K.dtype == torch.int64
    assert torch.equal(received_K, steps_K)
    for wrong in (torch.tensor([half, 0, 0, 0, 0, 0]), torch.tensor([-half - 1, 0, 0, 0, 0, 0]), CODE):
        with pytest.raises(CodeError, match="whole numbers from"):
            pack(wrong, wire_format, 7)


@pytest.mark.parametrize("wire_format", [FLOAT32, *ROTATED, *INTEGERS], ids=lambda f: f.dtype)
def test_each_header_field_is_checked(wire_format: WireFormat) -> None:
    good = pack(CODE.to(torch.int64) if wire_format.integers else CODE, wire_format, 7)
    assert unpack(good, wire_format, 7) is not None
    for position in (0, 4, 5, 6, 8, 12, 16):  # magic, version, value type, reserved, encoder tag, round, length
        data = bytearray(good)
        data[position] ^= 0x03
        assert unpack(bytes(data), wire_format, 7) is None


@EVERY_FORMAT
def test_sizes_are_checked_first(wire_format: WireFormat) -> None:
    data = pack(CODE, wire_format, 7)
    for other in (b"", data[:3], data[:20], data[:-1], data + b"\0", data * 1000):
        assert unpack(other, wire_format, 7) is None


def test_a_huge_claimed_length_allocates_nothing() -> None:
    data = bytearray(pack(CODE, FLOAT32, 7))
    struct.pack_into("<I", data, 16, 2**32 - 1)
    assert unpack(bytes(data), FLOAT32, 7) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_rejected_on_both_sides(bad: float) -> None:
    code_K = CODE.clone()
    code_K[3] = bad
    for wire_format in (FLOAT32, *ROTATED):
        with pytest.raises(CodeError, match="1 of 1 codes are not finite"):
            pack(code_K, wire_format, 0)
    forged = FLOAT32.header(0) + code_K.numpy().astype("<f4").tobytes()
    good = pack(CODE, FLOAT32, 0)
    rows = unpack_rows([good, forged, good], FLOAT32, 0)
    assert (rows.accepted, rows.rejected) == ([0, 2], 1)
    assert rows.code_NK.isfinite().all()


def test_rows_keep_their_order_and_count_the_rejected() -> None:
    code_NK = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    messages = pack_rows(code_NK, FLOAT32, 3)
    messages[1] = messages[1][:-1]
    messages[3] = pack(code_NK[3], FLOAT32, 4)  # of another round
    rows = unpack_rows(messages, FLOAT32, 3)
    assert (rows.accepted, rows.rejected) == ([0, 2, 4], 2)
    assert torch.equal(rows.code_NK, code_NK[[0, 2, 4]])


@EVERY_FORMAT
def test_no_messages(wire_format: WireFormat) -> None:
    assert pack_rows(torch.zeros(0, 6), wire_format, 0) == []
    rows = unpack_rows([], wire_format, 0)
    assert rows.code_NK.shape == (0, 6)
    assert (rows.accepted, rows.rejected) == ([], 0)
    assert unpack_rows([b"x"], wire_format, 0).rejected == 1


@settings(max_examples=300)
@given(data=st.binary(max_size=64), dtype=st.sampled_from(get_args(WireDtype)))
def test_arbitrary_bytes_never_crash(data: bytes, dtype: WireDtype) -> None:
    wire_format = WireFormat.of(SKETCH, dtype)
    assert unpack(data, wire_format, 7) is None


@settings(max_examples=300)
@given(body=st.binary(min_size=24, max_size=24))
def test_arbitrary_values_are_finite_or_rejected(body: bytes) -> None:
    code_K = unpack(FLOAT32.header(7) + body, FLOAT32, 7)
    sent_K = np.frombuffer(body, dtype="<f4")
    assert (code_K is not None) == bool(np.isfinite(sent_K).all())
    if code_K is not None:
        assert code_K.numpy().tobytes() == sent_K.tobytes()


@EVERY_FORMAT
def test_one_flipped_bit(wire_format: WireFormat) -> None:
    for bit in range(wire_format.message_size * 8):
        _flip(wire_format, bit)


def _flip(wire_format: WireFormat, bit: int) -> None:
    data = bytearray(pack(CODE, wire_format, 7))
    data[bit // 8] ^= 1 << (bit % 8)
    rows = unpack_rows([bytes(data)], wire_format, 7)
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
    with pytest.raises(CodeError, match="integer16, integer24 or integer32, not 'float64'"):
        WireFormat(6, 1, "float64")  # type: ignore[arg-type]
    with pytest.raises(CodeError, match="code_size is 0, expected 1"):
        WireFormat(0, 1)
    for round_index in (-1, 2**32):
        with pytest.raises(CodeError, match="round is"):
            pack(CODE, FLOAT32, round_index)
    with pytest.raises(CodeError, match="do not fit a format of 6 values"):
        pack(torch.zeros(5), FLOAT32, 0)


@pytest.mark.parametrize("wire_format", ROTATED, ids=lambda f: f.dtype)
@settings(max_examples=300)
@given(data=st.data())
def test_arbitrary_levels_are_finite_or_rejected(wire_format: WireFormat, data: st.DataObject) -> None:
    size = wire_format.message_size - 20
    message = wire_format.header(7) + data.draw(st.binary(min_size=size, max_size=size))
    code_K, length = unpack(message, wire_format, 7), struct.unpack_from("<f", message, 20)[0]
    if code_K is None:
        assert not 0 <= length <= 3.4028e38 / 4096 or message[-1]
    else:
        assert code_K.isfinite().all()
        assert float(code_K.double().norm()) == pytest.approx(length, rel=1e-3, abs=6 * 1.5e-45)
