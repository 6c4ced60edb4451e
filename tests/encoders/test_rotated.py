"""Codes that are turned at random and sent in 4, 2 or 1 bits: known levels, kept length, no direction of error in the long run.

Legend: N messages, K code values.
"""

import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drencoder.encoders.random_sketch import RandomSketch
from drencoder.encoders.rotated import Rotation, levels, quantise
from drencoder.encoders.wire import (
    WireDtype,
    WireFormat,
    pack_rows,
    unpack_rows,
)
from drencoder.federated.query import update_query
from drencoder.federated.round import client_message, server_release
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.noise_source import ReplayNoise
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import privacy_plan
from encoder_toys import pack, unpack

BITS: dict[WireDtype, int] = {"rotated4": 4, "rotated2": 2, "rotated1": 1}


def cosine(bits: int) -> float:
    """Between a long code and what arrives of it, by quadrature: the root of the levels' mean square under a standard normal."""
    grid, table = torch.linspace(-12, 12, 400_001, dtype=torch.float64), torch.tensor(levels(bits), dtype=torch.float64)
    level = table[torch.bucketize(grid, (table[1:] + table[:-1]) / 2)]
    density = torch.exp(-grid.square() / 2)
    return math.sqrt(float((density * level.square()).sum() / density.sum()))


EVERY = pytest.mark.parametrize("dtype", list(BITS))


def _codes(kind: str, count: int, size: int) -> torch.Tensor:
    normal_NK = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    if kind == "heavy":  # as a code's leading coordinates are
        return normal_NK * torch.logspace(0, -4, size)
    if kind == "single":
        return torch.nn.functional.one_hot(torch.arange(count) % size, size).float() * 3
    return normal_NK


def _arrived(code_NK: torch.Tensor, dtype: WireDtype, round_index: int = 0, tag: int = 9) -> torch.Tensor:
    wire_format = WireFormat(code_NK.shape[1], tag, dtype)
    return unpack_rows(pack_rows(code_NK, wire_format, round_index), wire_format, round_index).code_NK


@pytest.mark.parametrize(
    ("bits", "positive", "distortion"),
    [
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_levels_are_the_published_ones(bits: int, positive: list[float], distortion: float) -> None:
    """Max 1960, table I, of as many digits; and his mean squared errors, 1 - cosine^2."""
    values = levels(bits)
    assert list(values) == sorted(values)
    assert values[: 2 ** (bits - 1)] == tuple(-value for value in reversed(values[2 ** (bits - 1) :]))
    assert list(values[2 ** (bits - 1) :]) == pytest.approx(positive, abs=6e-4)
    assert 1 - cosine(bits) ** 2 == pytest.approx(distortion, rel=1e-3)


@EVERY
@pytest.mark.parametrize("kind", ["normal", "heavy", "single"])
@pytest.mark.parametrize("size", [4096, 1000, 9001])
def test_any_code_keeps_its_length_and_a_known_share_of_its_direction(dtype: WireDtype, kind: str, size: int) -> None:
    code_NK = _codes(kind, 40, size)
    got_NK = _arrived(code_NK, dtype)
    assert (got_NK.double().norm(dim=1) / code_NK.double().norm(dim=1) - 1).abs().max() < 1e-5
    along_N = torch.cosine_similarity(got_NK.double(), code_NK.double())
    assert along_N.mean() == pytest.approx(cosine(BITS[dtype]), abs=2e-3)
    assert (along_N - along_N.mean()).abs().max() < 0.03


@EVERY
def test_over_rounds_the_mean_points_where_the_code_does(dtype: WireDtype) -> None:
    """cosine * code within the standard error, value by value; without the rotation small values would be lost for ever."""
    code_K, rounds = _codes("heavy", 1, 512)[0], 1500
    got_RK = torch.stack([_arrived(code_K[None], dtype, round_index)[0] for round_index in range(rounds)]).double()
    apart_K = (got_RK.mean(0) - cosine(BITS[dtype]) * code_K.double()) / (got_RK.std(0) / math.sqrt(rounds))
    assert apart_K.abs().max() < 4.5
    assert apart_K.square().mean() < 1.4
    plain = torch.tensor(levels(BITS[dtype]))
    rms = float(code_K.square().mean().sqrt())
    lost_K = plain[torch.bucketize(code_K / rms, (plain[1:] + plain[:-1]) / 2)] * rms
    assert (
        (lost_K - cosine(BITS[dtype]) * code_K).norm() / code_K.norm()
    ) > 0.2  # what an unturned code would lose each time
    assert ((got_RK.mean(0) - cosine(BITS[dtype]) * code_K).norm() / code_K.norm()) < 0.03


@EVERY
def test_errors_of_unlike_codes_are_independent(dtype: WireDtype) -> None:
    code_NK = _codes("normal", 6, 8192)
    error_NK = _arrived(code_NK, dtype).double() - cosine(BITS[dtype]) * code_NK.double()
    assert (torch.corrcoef(error_NK) - torch.eye(6)).abs().max() < 4.5 / math.sqrt(8192)
    same = _arrived(code_NK[:1].expand(2, -1), dtype)
    assert torch.equal(same[0], same[1])  # nothing but the code and the round decides


def test_a_rotation_is_orthonormal_and_another_in_each_round() -> None:
    for size in (1, 5, 512, 4097):
        rotation = Rotation(size, 3)
        rows_NK = torch.randn(3, size, generator=torch.Generator().manual_seed(1))
        turned_NK = rotation.turn(rows_NK)
        assert torch.allclose(rotation.turn_back(turned_NK), rows_NK, atol=1e-5)
        assert torch.allclose(turned_NK @ turned_NK.T, rows_NK @ rows_NK.T, rtol=1e-4, atol=1e-3)
    code_NK = _codes("normal", 1, 4096)
    first, second = (_arrived(code_NK, "rotated1", round_index) - code_NK for round_index in (0, 1))
    assert abs(float(torch.cosine_similarity(first, second))) < 0.4  # both have -(1 - cosine) of the code itself
    assert not torch.equal(_arrived(code_NK, "rotated1", tag=10), _arrived(code_NK, "rotated1"))


@EVERY
def test_layout(dtype: WireDtype) -> None:
    bits, wire_format = BITS[dtype], WireFormat(13, 9, dtype)
    code_K = _codes("normal", 1, 13)[0]
    data = pack(code_K, wire_format, 7)
    assert len(data) == wire_format.message_size == 24 + math.ceil(13 * bits / 8)
    kind = {"rotated4": 6, "rotated2": 7, "rotated1": 8}[dtype]
    assert struct.unpack_from("<4sBBHIII", data) == (b"DREC", 1, kind, 0, 9, 7, 13)
    length = struct.unpack_from("<f", data, 20)[0]
    assert float(code_K.double().norm()) * (1 - 1e-6) < length <= float(code_K.double().norm())
    level_K = quantise(code_K[None], bits, wire_format.rotation(7))[1][0]
    assert level_K.min() >= -(2 ** (bits - 1))
    assert level_K.max() < 2 ** (bits - 1)
    turned_K = wire_format.rotation(7).turn(code_K[None])[0]
    assert torch.equal(level_K >= 0, turned_K >= 0)
    packed = sum((int(level) & (2**bits - 1)) << (bits * place) for place, level in enumerate(level_K))
    assert int.from_bytes(data[24:], "little") == packed


@EVERY
@settings(max_examples=200)
@given(
    values=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32) | st.floats(-1, 1, width=32), min_size=6, max_size=6
    )
)
def test_every_finite_code_arrives_with_its_length(dtype: WireDtype, values: list[float]) -> None:
    """From the smallest float32 on; the largest are cut. A zero code is zero bytes."""
    code_K, wire_format = torch.tensor(values), WireFormat(6, 9, dtype)
    data = pack(code_K, wire_format, 0)
    received_K = unpack(data, wire_format, 0)
    assert received_K is not None
    got_K = received_K.double()
    length = min(float(code_K.double().norm()), 3.4028e38 / 4096)
    assert got_K.isfinite().all()
    assert float(got_K.norm()) == pytest.approx(length, rel=1e-3, abs=6 * 1.5e-45)
    if not code_K.any():
        assert data[20:] == bytes(len(data) - 20)


@EVERY
@pytest.mark.parametrize("length", [math.nan, math.inf, -1.0, 1e35])
def test_impossible_lengths_and_padding_are_rejected(dtype: WireDtype, length: float) -> None:
    wire_format = WireFormat(13, 9, dtype)
    good = pack(_codes("normal", 1, 13)[0], wire_format, 7)
    assert unpack(good[:20] + struct.pack("<f", length) + good[24:], wire_format, 7) is None
    assert unpack(good[:-1] + bytes([good[-1] | 0x80]), wire_format, 7) is None
    assert unpack(good, wire_format, 7) is not None


@EVERY
def test_no_message_is_longer_than_the_clip(tmp_path: Path, dtype: WireDtype) -> None:
    """So that a server that adds noise and clips again takes nothing away."""
    recipe = load_recipe(
        "quickstart",
        ["privacy.trust=non-private", "privacy.noise=replay", "privacy.clip_l2=0.5", f"encoder.wire_dtype={dtype}"],
    )
    query = update_query(RandomSketch.build((Segment("a", 0, (8, 16)),), 64), recipe, 1)
    rows = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    with Ledger.create(tmp_path / "ledger.jsonl", privacy_plan(recipe), key=bytes(32)) as ledger:
        permit = ledger.charge(1)
        upload = client_message(query, rows, range(40), permit, ReplayNoise(0))
        released = server_release(query, [upload], permit, ReplayNoise(0)).release.value
    sent_NK = unpack_rows(upload.messages, query.spec.wire, 1).code_NK
    assert sent_NK.norm(dim=1).double() == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(released.float(), sent_NK.sum(0), atol=1e-4)
