"""The hybrid encoder: what it builds, what it carries exactly, and that its random block sees everything in the long run.

Legend: N updates, D adapter values, K code values, J directions, H values of the head.
"""

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from drencoder.encoders.hybrid import HybridEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.encoders.registry import build_encoder
from drencoder.encoders.request import EncoderRequest
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from encoder_contract import some_codes, some_updates
from encoder_toys import SEGMENTS, SIZE, tile

HEAD_SIZE, SKETCH_SIZE = 60, 40


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


PUBLIC = PublicUpdates(rows(6, 0), "noise")
HEAD = KroneckerEncoder.build(PUBLIC.prior(SEGMENTS, 8), HEAD_SIZE)
SKETCH = RandomSketch.build(SEGMENTS, SKETCH_SIZE)


def hybrid(directions: Tensor) -> HybridEncoder:
    return HybridEncoder.build(HEAD, directions, SKETCH)


def test_directions_are_made_orthogonal_to_the_head_and_to_each_other() -> None:
    given = rows(3, 1)
    encoder = hybrid(given)
    direction_JD = encoder.direction_JD
    assert torch.allclose(direction_JD @ direction_JD.T, torch.eye(3), atol=1e-5)
    assert HEAD.encode(direction_JD, 0).abs().max() < 1e-5
    assert encoder.code_size == HEAD_SIZE + 3 + SKETCH_SIZE
    # Head and directions together span what was given.
    inside = HEAD.decode(HEAD.encode(given, 0), 0) + given @ direction_JD.T @ direction_JD
    assert torch.allclose(inside, given, atol=1e-4)


def test_what_says_nothing_new_is_left_out() -> None:
    row = rows(1, 1)
    known = HEAD.decode(torch.ones(1, HEAD_SIZE), 0)
    assert len(hybrid(torch.zeros(2, SIZE)).direction_JD) == 0
    assert len(hybrid(known).direction_JD) == 0
    assert len(hybrid(torch.cat([row, -3.0 * row, torch.zeros_like(row), known + row])).direction_JD) == 1
    assert len(hybrid(row * 1e-12).direction_JD) == 1  # a small momentum is a direction all the same


def test_what_lies_in_head_and_directions_is_carried_exactly() -> None:
    encoder = hybrid(rows(2, 1))
    inside_ND = HEAD.decode(some_codes(HEAD, 3), 0) + rows(3, 2)[:, :2] @ encoder.direction_JD
    code_NK = encoder.encode(inside_ND, 5)
    assert code_NK[:, HEAD_SIZE + 2 :].abs().max() < 1e-4  # nothing is left for the sketch
    assert torch.allclose(encoder.decode(code_NK, 5), inside_ND, atol=1e-4)
    assert torch.allclose(code_NK.norm(dim=1), inside_ND.norm(dim=1), rtol=1e-4)


def test_no_code_is_longer_than_its_update() -> None:
    encoder = hybrid(rows(2, 1))
    for update_ND in (some_updates(encoder, 20), HEAD.decode(some_codes(HEAD, 5), 0), encoder.direction_JD):
        length_N = encoder.encode(update_ND, 5).norm(dim=1)
        assert (length_N <= update_ND.norm(dim=1) * (1 + 1e-5)).all()


def test_decode_is_the_transpose() -> None:
    encoder = hybrid(rows(2, 1))
    update_ND, code_NK = some_updates(encoder, 4), some_codes(encoder, 4)
    left = (encoder.encode(update_ND, 5) * code_NK).sum(1)
    assert torch.allclose(left, (update_ND * encoder.decode(code_NK, 5)).sum(1), rtol=1e-3, atol=1e-3)


def test_the_random_block_sees_what_is_left_over_in_the_long_run() -> None:
    encoder = hybrid(rows(2, 1))
    update_ND = some_updates(encoder, 1)
    rest_ND = update_ND - HEAD.decode(HEAD.encode(update_ND, 0), 0)
    rest_ND = rest_ND - rest_ND @ encoder.direction_JD.T @ encoder.direction_JD
    count = 400
    mean_ND = sum(encoder.decode(encoder.encode(rest_ND, seed), seed) for seed in range(count)) / count
    share = float((mean_ND * rest_ND).sum() / rest_ND.square().sum())
    energy_S = torch.stack([rest_ND[:, s.start : s.stop].double().square().sum() for s in SEGMENTS])
    assert share == pytest.approx(SKETCH.expected_capture(energy_S), rel=0.15)
    # And along nothing else: what remains is the spread of 400 rounds.
    rate_D = torch.cat([torch.full((s.size,), k / s.size) for s, k in zip(SEGMENTS, SKETCH.code_S, strict=True)])
    assert float(torch.cosine_similarity(mean_ND, rate_D * rest_ND)) > 0.8


def lora(*, outs: tuple[int, ...] = (24, 40)) -> tuple[Segment, ...]:
    """Pairs of rank 4 over 32 inputs, as PEFT names them."""
    segments, start = [], 0
    for number, out in enumerate(outs):
        for side, shape in (("A", (4, 32)), ("B", (out, 4))):
            segments.append(Segment(f"layers.{number}.q_proj.lora_{side}.weight", start, shape))
            start = segments[-1].stop
    return tuple(segments)


def test_a_plan_is_kept_whatever_the_momentum_is() -> None:
    segments = lora()
    total = segments[-1].stop
    drawn_ND = torch.randn(13, total, generator=torch.Generator().manual_seed(7))
    public, one_1D = PublicUpdates(drawn_ND[1:], "noise"), drawn_ND[:1]
    head = build_encoder("hybrid", EncoderRequest(segments, 60, public=public, rank=8))
    known_1D = head.decode(torch.ones(1, 60), 0)
    for history_JD in (None, torch.zeros(1, total), one_1D, known_1D):
        for size in (1, 2, 100):
            request = EncoderRequest(segments, size, public=public, rank=8, history_JD=history_JD)
            assert build_encoder("hybrid", request).code_size == size
    request = EncoderRequest(segments, 100, public=public, rank=8, explore=0.4, history_JD=one_1D)
    facts = build_encoder("hybrid", request).describe()
    assert (facts["head"], facts["directions"], facts["random"]) == (59, 1, 40)


@pytest.mark.parametrize("size", [1, 2, 40, 255, 256])
def test_a_code_of_b_alone_says_nothing_about_a(size: int) -> None:
    segments = lora()
    total = segments[-1].stop
    generator = torch.Generator().manual_seed(0)
    public_ND, history_JD = torch.randn(2, total, generator=generator), torch.randn(2, total, generator=generator)
    public_ND[:, segments[3].start : segments[3].stop] = 0  # of one B the public text says nothing: still before any A
    is_b = torch.cat([torch.full((s.size,), "lora_B" in s.name) for s in segments])
    request = EncoderRequest(segments, size, public=PublicUpdates(public_ND, "noise"), rank=4, history_JD=history_JD)
    encoder = build_encoder("hybrid", request)
    assert encoder.code_size == size
    update_ND, code_NK = torch.randn(3, total, generator=generator), torch.randn(3, size, generator=generator)
    a_only_ND = update_ND.masked_fill(is_b, 0.0)
    assert encoder.encode(a_only_ND, 5).abs().max() < 1e-5
    decoded_ND = encoder.decode(code_NK, 5)
    assert decoded_ND[:, ~is_b].abs().max() < 1e-5
    assert decoded_ND[:, is_b].abs().max() > 0.01
    if size == 256:  # all of B: carried exactly
        back_ND = encoder.decode(encoder.encode(update_ND, 5), 5)
        assert torch.allclose(back_ND[:, is_b], update_ND[:, is_b], atol=1e-5)


def test_b_alone_is_refused_where_it_cannot_be() -> None:
    request = EncoderRequest(lora(), 257, public=PublicUpdates(torch.ones(2, 512), "noise"), rank=4)
    with pytest.raises(EncoderError, match="have 256 values"):
        build_encoder("hybrid", request)
    with pytest.raises(EncoderError, match=r"set encoder\.name = 'kronecker'"):
        build_encoder("hybrid", EncoderRequest(SEGMENTS, 10, public=PUBLIC, rank=8))


@pytest.mark.parametrize("sketch", [SKETCH, None])
def test_state_restores_the_same_map(sketch: RandomSketch | None) -> None:
    encoder = HybridEncoder.build(HEAD, rows(2, 1), sketch)
    again = HybridEncoder.from_state(SEGMENTS, load(save(encoder.state())))
    update_ND, code_NK = some_updates(encoder, 3), some_codes(encoder, 3)
    assert torch.equal(again.encode(update_ND, 7), encoder.encode(update_ND, 7))
    assert torch.equal(again.decode(code_NK, 7), encoder.decode(code_NK, 7))
    assert again.describe() == encoder.describe()
    state = encoder.state()
    del state["directions"]
    with pytest.raises(EncoderError, match=r"saved hybrid encoder does not fit .*'directions'"):
        HybridEncoder.from_state(SEGMENTS, state)


def test_what_does_not_fit_is_refused() -> None:
    for directions in (torch.zeros(2, SIZE + 1), torch.zeros(SIZE), torch.full((1, SIZE), torch.nan)):
        with pytest.raises(EncoderError, match="give the run's own momentum"):
            hybrid(directions)
    with pytest.raises(EncoderError, match="another adapter"):
        HybridEncoder.build(HEAD, rows(1, 1), RandomSketch.build(tile((64, 64)), 5))


def test_the_fingerprint_is_of_everything_that_no_seed_gives() -> None:
    one = hybrid(rows(2, 1))
    assert one.fingerprint == hybrid(rows(2, 1)).fingerprint
    others = [hybrid(rows(2, 2)), HybridEncoder.build(HEAD, rows(2, 1), None), hybrid(rows(1, 1))]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
