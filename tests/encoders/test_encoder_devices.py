"""Encoders, clip and bits on the device of the updates: a graphics card where there is one, and `meta` always.

Legend: N clients.
"""

from collections.abc import Iterator

import pytest
import torch

from drencoder.encoders.contract import Encoder, fingerprint_of
from drencoder.encoders.hybrid import HybridEncoder
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.federated.adaptive_clip import AdaptiveClipEncoder
from drencoder.federated.query_encoders import MomentsEncoder, RelativeEncoder
from drencoder.federated.row_encoding import encode_rows
from drencoder.privacy.mechanism import clip_rows
from drencoder.published.lowrank import LowRankEncoder
from drencoder.published.subset import SubsetEncoder
from encoder_toys import LORA, SEGMENTS, SIZE, noise_updates
from one_device import CUDA, OneDevice


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with OneDevice():
        yield


NOISE = noise_updates(SEGMENTS)
HEAD = KroneckerEncoder.build(NOISE.prior(SEGMENTS, 16), 100)
SKETCH = RandomSketch.build(SEGMENTS, 60)
ENCODERS: dict[str, Encoder] = {
    "identity": IdentityEncoder(SEGMENTS),
    "random": SKETCH,
    "kronecker": HEAD,
    "hybrid": HybridEncoder.build(HEAD, NOISE.update_ND[:2], SKETCH),
    "ffa": SubsetEncoder.lora_b(LORA),
    "top-k": SubsetEncoder.top(NOISE, SEGMENTS, SIZE // 64),
    "core": LowRankEncoder.core(noise_updates(LORA).prior(LORA, 4)),
    "power": LowRankEncoder.power(SEGMENTS, SIZE // 16, NOISE.update_ND[0], 0.25),
    "adaptive clip": AdaptiveClipEncoder(SKETCH, 0.5),
    "moments": MomentsEncoder(SEGMENTS),
    "relative": RelativeEncoder(SKETCH),
}


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_code_is_made_where_the_update_is(device: str, rows: int, name: str) -> None:
    encoder = ENCODERS[name]
    update_ND = torch.randn(5, encoder.update_size, generator=torch.Generator().manual_seed(4))
    expected = encode_rows(encoder, update_ND, 3, 1)
    code_NK = encode_rows(encoder, update_ND.to(device), 3, rows)
    assert code_NK.device.type == device
    assert code_NK.shape == expected.shape
    decoded = encoder.decode(code_NK, 3)
    assert decoded.device.type == device
    if device == "meta":
        return
    assert torch.allclose(code_NK.cpu(), expected, atol=1e-4)
    assert torch.allclose(decoded.cpu(), encoder.decode(expected, 3), atol=1e-4)
    bounded = clip_rows(code_NK, 0.5)
    assert torch.allclose(bounded.values_NV.cpu(), clip_rows(expected, 0.5).values_NV, atol=1e-4)
    assert bounded.values_NV.double().norm(dim=1).max() <= 0.5


def test_the_relative_code_of_nothing_is_nothing_to_the_last_bit() -> None:
    encoder = RelativeEncoder(ENCODERS["hybrid"])
    assert not encoder.encode(torch.zeros(1, encoder.update_size), 3).any()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_fingerprint_is_the_same_on_every_device(device: str) -> None:
    state = ENCODERS["kronecker"].state()
    assert fingerprint_of({name: tensor.to(device) for name, tensor in state.items()}) == fingerprint_of(state)
