"""Codes as bytes: exact round trips, floats that never lengthen a code, unbiased integers, no crash for any bytes.

Legend: N messages, K code values.
"""

import math
import struct
from pathlib import Path
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
    code_entropy,
    noise_entropy,
    pack,
    pack_rows,
    unpack,
    unpack_levels,
    unpack_rows,
)
from drencoder.errors import CodeError
from drencoder.federated.query import update_query
from drencoder.federated.round import client_message, server_release
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.mechanism import ReplayNoise
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import privacy_plan

SEGMENTS = (Segment("a", 0, (8, 16)),)
SKETCH = RandomSketch.build(SEGMENTS, 6)
FORMATS = [WireFormat.of(SKETCH, "float16"), WireFormat.of(SKETCH, "float32")]
INTEGERS = [WireFormat.of(SKETCH, "int8"), WireFormat.of(SKETCH, "int4"), WireFormat.of(SKETCH, "int2")]
ROTATED = [WireFormat.of(SKETCH, dtype) for dtype in ("rotated4", "rotated2", "rotated1")]
EVERY_FORMAT = pytest.mark.parametrize("wire_format", [*FORMATS, *INTEGERS, *ROTATED], ids=lambda f: f.dtype)
EVERY_INTEGER = pytest.mark.parametrize("wire_format", INTEGERS, ids=lambda f: f.dtype)
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


@EVERY_FORMAT
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


@EVERY_FORMAT
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
    with pytest.raises(
        CodeError, match="float32, float16, int8, int4, int2, rotated4, rotated2 or rotated1, not 'float64'"
    ):
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


# --- integers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind", "code", "body"),
    [
        ("int8", 3, [63.5, -63.5, 0.5, 0.0, -1.5], "7f8101 00fd"),
        (
            "int4",
            4,
            [3.5, -3.5, 0.5, 0.0, -1.5],
            "97 01 0d",
        ),  # the first of two in the low four bits; four bits to spare
        ("int2", 5, [0.5, -0.5, 0.0, 0.5, -0.5], "4d 03"),
    ],
)
def test_integer_layout(dtype: WireDtype, kind: int, code: list[float], body: str) -> None:
    """Multiples of the scale 1/2 are not rounded, so every byte is known."""
    wire_format = WireFormat(5, 9, dtype)
    data = pack(torch.tensor(code), wire_format, 7)
    assert struct.unpack_from("<4sBBHIIIf", data) == (b"DREC", 1, kind, 0, 9, 7, 5, 0.5)
    assert data[24:] == bytes.fromhex(body)
    assert unpack(data, wire_format, 7).tolist() == code
    assert unpack_levels(data, wire_format, 7).tolist() == [2 * value for value in code]


@EVERY_INTEGER
def test_a_zero_code_stays_zero(wire_format: WireFormat) -> None:
    data = pack(torch.tensor([0.0, -0.0, 0.0, 0.0, 0.0, 0.0]), wire_format, 0)
    assert data[20:] == bytes(len(data) - 20)
    assert not unpack(data, wire_format, 0).any()


@EVERY_INTEGER
@settings(max_examples=300)
@given(
    values=st.lists(finite_float32 | st.floats(-1, 1, width=32), min_size=6, max_size=6), stream=st.integers(0, 2**40)
)
def test_every_finite_code_arrives_within_one_level(wire_format: WireFormat, values: list[float], stream: int) -> None:
    """From the smallest float32 to the largest; what is 0 or the largest stays (saturating, like the very largest)."""
    code_K = torch.tensor(values)
    data = pack(code_K, wire_format, 0, stream)
    got_K = unpack(data, wire_format, 0).double()
    scale = struct.unpack_from("<f", data, 20)[0]
    largest = float(code_K.abs().max())
    assert scale * wire_format.top >= min(largest, 3.40282e38)  # exact in float64: no value lies beyond the last level
    slack = 1e-6 * largest
    assert ((got_K - code_K.double()).abs() <= scale + slack).all()
    assert (got_K.abs() <= largest + slack + wire_format.top * 1.5e-45).all()  # below 2^-126 a scale has few bits
    assert (got_K * code_K.double() >= 0).all()
    assert not got_K[code_K == 0].any()


@EVERY_INTEGER
def test_rounding_is_unbiased_with_the_variance_of_a_coin(wire_format: WireFormat) -> None:
    """Over 4,000 streams each value's mean is the value, its variance s^2 f (1 - f). Nearest rounding fails both."""
    code_K = torch.tensor([1.0, -0.83, 0.37, -0.061, 0.004, 0.51])
    count = 4000
    messages = pack_rows(code_K.expand(count, 6), wire_format, 3)
    scale = struct.unpack_from("<f", messages[0], 20)[0]
    got_NK = unpack_rows(messages, wire_format, 3).code_NK.double()
    level_K = code_K.double() / scale
    chance_K = level_K - level_K.floor()
    variance_K = scale**2 * chance_K * (1 - chance_K)

    def deviations(rows_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance against what they should be, the mean in standard errors, the variance as a ratio."""
        mean_K = (rows_NK.mean(0) - code_K.double()) / (variance_K / count).sqrt()
        return mean_K[1:].abs(), rows_NK.var(0)[1:] / variance_K[1:]  # the largest value is a level itself

    mean_K, ratio_K = deviations(got_NK)
    assert mean_K.max() < 4.5
    loose_K = 5 * ((1 - 3 * chance_K * (1 - chance_K)) / (chance_K * (1 - chance_K)) / count).sqrt()[1:]
    assert ((ratio_K - 1).abs() < loose_K).all()
    assert (got_NK[:, 0] - 1.0).abs().max() < 1e-6
    nearest_K, still_K = deviations((level_K.round() * scale).expand(count, 6))
    assert nearest_K.max() > 20
    assert (still_K == 0).all()
    # Half a level too coarse, or a coin with the wrong side up, would be seen as well.
    wrong_NK = (
        level_K.floor() + (torch.rand(count, 6, generator=torch.Generator().manual_seed(0)) < 1 - chance_K)
    ) * scale
    assert deviations(wrong_NK)[0].max() > 20


@EVERY_INTEGER
def test_rounding_errors_of_clients_are_independent_and_replayable(wire_format: WireFormat) -> None:
    wide = WireFormat(5000, 4, wire_format.dtype)
    code_K = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    code_NK = code_K.expand(3, 5000)

    def errors(streams: list[int], round_index: int = 2, which: WireFormat = wide) -> torch.Tensor:
        rows = unpack_rows(pack_rows(code_NK, which, round_index, streams), which, round_index)
        return rows.code_NK.double() - code_NK.double()

    first = errors([0, 1, 77])
    others = torch.cat([first, errors([0, 1, 77], 3), errors([0, 1, 77], 2, WireFormat(5000, 5, wire_format.dtype))])
    correlations = torch.corrcoef(others) - torch.eye(9)
    assert correlations.abs().max() < 4.5 / math.sqrt(5000)
    assert torch.corrcoef(errors([5, 5, 6]))[0, 1] > 0.999  # one stream for two clients would be seen
    assert pack_rows(code_NK, wide, 2, [0, 1, 77]) == pack_rows(code_NK, wide, 2, [0, 1, 77])
    assert pack_rows(code_NK, wide, 2) == pack_rows(code_NK, wide, 2, [0, 1, 2])
    assert pack(code_K, wide, 2, 77) == pack_rows(code_NK, wide, 2, [0, 1, 77])[2]


def test_one_stream_for_each_code() -> None:
    for streams in ([], [0], [0, 1, 2]):
        with pytest.raises(CodeError, match=f"2 codes came with {len(streams)} rounding streams"):
            pack_rows(torch.zeros(2, 6), INTEGERS[0], 0, streams)


@EVERY_INTEGER
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, -1e-45, "largest"])
def test_impossible_scales_are_rejected(wire_format: WireFormat, scale: float | str) -> None:
    """The largest scale that is taken is the largest whose top level is finite."""
    body = pack(CODE, wire_format, 7)[24:]
    limit = struct.unpack_from("<f", pack(torch.full((6,), 3.4028234e38), wire_format, 7), 20)[0]
    assert unpack_rows([wire_format.header(7) + struct.pack("<f", limit) + body], wire_format, 7).rejected == 0
    # For int2 the next float32 is infinity.
    bits = struct.pack("<I", struct.unpack("<I", struct.pack("<f", limit))[0] + 1) if scale == "largest" else b""
    forged = wire_format.header(7) + (bits or struct.pack("<f", scale)) + body
    for read in (unpack, unpack_levels):
        with pytest.raises(CodeError, match=r"scale .* of a code is not between 0 and .* message rejected"):
            read(forged, wire_format, 7)
    assert unpack_rows([forged], wire_format, 7).rejected == 1


@pytest.mark.parametrize(
    ("dtype", "body", "trouble"),
    [
        ("int8", "8000000000", "1 levels of a code are -128, expected -127 to 127"),
        ("int4", "088008", "3 levels of a code are -8, expected -7 to 7"),
        ("int4", "000010", "bits after the last value of a code are not zero"),
        ("int2", "0200", "1 levels of a code are -2, expected -1 to 1"),
        ("int2", "0004", "bits after the last value of a code are not zero"),
        ("int2", "0080", "bits after the last value of a code are not zero"),
    ],
)
def test_foreign_levels_and_padding_are_rejected(dtype: WireDtype, body: str, trouble: str) -> None:
    wire_format = WireFormat(5, 9, dtype)
    forged = wire_format.header(7) + struct.pack("<f", 0.5) + bytes.fromhex(body)
    with pytest.raises(CodeError, match=f"{trouble}; message rejected"):
        unpack(forged, wire_format, 7)
    good = pack(CODE[:5], wire_format, 7)
    rows = unpack_rows([forged, good, forged, good], wire_format, 7)
    assert (rows.accepted, rows.rejected) == ([1, 3], 2)
    assert torch.equal(rows.code_NK, unpack(good, wire_format, 7).expand(2, 5))


@pytest.mark.parametrize("wire_format", [*INTEGERS, *ROTATED], ids=lambda f: f.dtype)
@settings(max_examples=300)
@given(data=st.data())
def test_arbitrary_levels_are_finite_or_rejected(wire_format: WireFormat, data: st.DataObject) -> None:
    size = wire_format.message_size - 20
    message = wire_format.header(7) + data.draw(st.binary(min_size=size, max_size=size))
    rows = unpack_rows([message], wire_format, 7)
    try:
        code_K = unpack(message, wire_format, 7)
    except CodeError:
        assert rows.rejected == 1
    else:
        assert code_K.isfinite().all()
        assert torch.equal(rows.code_NK[0], code_K)
        if not wire_format.rotated:  # what is accepted is what the sender's side would make of it
            assert torch.equal(unpack(pack(code_K, wire_format, 7), wire_format, 7).sign(), code_K.sign())


@EVERY_INTEGER
def test_a_server_that_adds_noise_clips_what_rounding_lengthened(tmp_path: Path, wire_format: WireFormat) -> None:
    recipe = load_recipe(
        None,
        [
            "privacy.trust=non-private",
            "privacy.noise=replay",
            "privacy.clip_l2=0.5",
            f"encoder.wire_dtype={wire_format.dtype}",
        ],
    )
    noise = ReplayNoise(0)
    query = update_query(RandomSketch.build(SEGMENTS, 64), recipe, 1)
    rows = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    with Ledger.create(tmp_path / "ledger.jsonl", privacy_plan(recipe), key=bytes(32)) as ledger:
        permit = ledger.charge(1)
        upload = client_message(query, rows[:1], [3], permit, noise)
        alone = client_message(query, rows, range(40), permit, noise)
        parts = [client_message(query, rows[i : i + 7], range(40)[i : i + 7], permit, noise) for i in range(0, 40, 7)]
        released = server_release(query, [upload], permit, noise).release.value
    assert [message for part in parts for message in part.messages] == alone.messages  # whoever trains together
    assert alone.messages[0] != upload.messages[0]  # another client's random numbers
    sent = unpack_rows(alone.messages, query.spec.wire, 1).code_NK.double().norm(dim=1)
    assert (sent > 0.5).any(), "nothing to see: rounding lengthened no code"
    assert released.double().norm() <= 0.5


def test_entropy_of_known_frequencies() -> None:
    assert code_entropy(torch.arange(-2, 2, dtype=torch.int8).repeat(5, 3)) == 2.0
    assert code_entropy(torch.tensor([1, -1])) == 1.0
    assert code_entropy(torch.tensor([0, 0, 0, 7])) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    for nothing in (torch.zeros(9, dtype=torch.int8), torch.zeros(0, dtype=torch.int8)):
        assert code_entropy(nothing) == 0.0
        assert math.copysign(1, code_entropy(nothing)) == 1
    with pytest.raises(CodeError, match=r"integer levels, got torch\.float32"):
        code_entropy(CODE)
    with pytest.raises(CodeError, match="float32 codes have no levels"):
        unpack_levels(pack(CODE, FORMATS[1], 0), FORMATS[1], 0)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_entropy_of_noise_is_that_of_the_rounded_gaussian(dtype: WireDtype) -> None:
    """A second method: chance of each level by quadrature over the Gaussian, for the scale that the message has."""
    wire_format = WireFormat(1 << 16, 1, dtype)
    noise_K = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(0))
    scale = struct.unpack_from("<f", pack_rows(noise_K, wire_format, 0)[0], 20)[0]
    grid = np.linspace(-8, 8, 20_001)
    density = np.exp(-(grid**2) / 2)
    hat = np.clip(1 - np.abs(grid / scale - np.arange(-wire_format.top, wire_format.top + 1)[:, None]), 0, None)
    share = hat @ density / density.sum()
    share = share[share > 0] / share.sum()
    entropy = noise_entropy(wire_format)
    assert entropy == pytest.approx(-(share * np.log2(share)).sum(), abs=0.01)
    assert 0 < entropy < wire_format.bits
    assert noise_entropy(FORMATS[0]) is None
