"""Encoders: the shared contract over all of them, then what each one promises by itself.

Legend: N clients, D adapter values, K code values, S segments.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.hybrid import HybridEncoder
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.random_sketch import RandomSketch, allocate_code
from drencoder.encoders.registry import ENCODERS, build_encoder
from drencoder.encoders.request import EncoderRequest
from drencoder.encoders.viability import GateResult, measure_viability, require_viable
from drencoder.errors import EncoderError, ViabilityError
from drencoder.models.adapter_layout import Segment
from drencoder.published.architectures import ARCHITECTURES
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions
from drencoder.published.fedcg import RealGradients
from drencoder.published.lowrank import LowRankEncoder
from drencoder.published.subset import SubsetEncoder
from encoder_contract import CONTRACT, Check, check_orthogonal_projection, some_updates
from encoder_toys import FLAT, LORA, LORA_SIZE, SEGMENTS, SIZE, levels, noise_updates, permit_of, tile


@cache
def trained(name: str = "autoencoder") -> Autoencoder:
    drawn = GaussianPrior.isotropic(SEGMENTS)
    options = AutoencoderOptions(steps=4, batch=4, check_every=2, name=name)
    return Autoencoder.fit(SEGMENTS, drawn.sample(8, 1), drawn.sample(4, 2), seed=0, options=options)


@cache
def trained_on_real() -> Autoencoder:
    blank = trained("autoencoder-cnn1d")
    return Autoencoder(SEGMENTS, blank.network, blank.scale_S, "autoencoder-cnn1d", "real")


NOISE = noise_updates(SEGMENTS)
HEAD = KroneckerEncoder.build(NOISE.prior(SEGMENTS, 16), 100)

ALL: dict[str, Encoder] = {
    "identity": IdentityEncoder(SEGMENTS),
    "random": RandomSketch.build(SEGMENTS, SIZE // 64),
    "random of one value": RandomSketch.build(SEGMENTS, 1),
    "random of everything": RandomSketch.build(SEGMENTS, SIZE),
    "random with a prior": RandomSketch(SEGMENTS, (700, 3, 111, 1, 40)),
    "kronecker": HEAD,
    "hybrid": HybridEncoder.build(HEAD, NOISE.update_ND[:2], RandomSketch.build(SEGMENTS, 60)),
    "hybrid of known directions": HybridEncoder.build(HEAD, NOISE.update_ND[:2], None),
    "ffa": SubsetEncoder.lora_b(LORA),
    "top-k": SubsetEncoder.top(NOISE, SEGMENTS, SIZE // 64),
    "top-k of everything": SubsetEncoder.top(NOISE, SEGMENTS, SIZE),
    "core": LowRankEncoder.core(noise_updates(LORA).prior(LORA, 4)),
    "power": LowRankEncoder.power(SEGMENTS, SIZE // 16, NOISE.update_ND[0], 0.25),
    "power at the start": LowRankEncoder.power(LORA, LORA_SIZE // 8, None, 0.25),
    "power of everything": LowRankEncoder.power(SEGMENTS, SIZE, NOISE.update_ND[0], 0.0),
}


TRAINED: dict[str, Callable[[], Autoencoder]] = {name: partial(trained, name) for name in ARCHITECTURES} | {
    "autoencoder of FedCG": trained_on_real
}


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [*ALL, *TRAINED])
def test_contract(name: str, check: Check) -> None:
    check(ALL[name] if name in ALL else TRAINED[name]())


def test_every_registered_encoder_is_in_the_contract_test() -> None:
    assert {encoder.name for encoder in ALL.values()} | {*ARCHITECTURES} == set(ENCODERS)


# --- random -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name != "hybrid"])  # a projection in expectation: test_hybrid
def test_linear_encoders_are_orthogonal_projections(name: str) -> None:
    encoder = ALL[name]
    if isinstance(encoder, RandomSketch):
        check_orthogonal_projection(encoder, math.sqrt(SIZE / encoder.code_size), encoder.decode_weight_K)
    else:
        check_orthogonal_projection(encoder, 1.0)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 700)), min_size=1, max_size=5),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**62),
)
def test_sketch_is_orthonormal_for_any_layout(shapes: list[tuple[int, int]], share: float, seed: int) -> None:
    segments = tile(*shapes)
    size = segments[-1].stop
    sketch = RandomSketch.build(segments, max(1, round(share * size)))
    generator = torch.Generator().manual_seed(seed)
    code_NK = torch.randn(2, sketch.code_size, generator=generator)
    back_ND = sketch.decode(code_NK / sketch.decode_weight_K, seed)
    assert torch.allclose(sketch.encode(back_ND, seed), code_NK, rtol=1e-4, atol=1e-5)
    norm_N = back_ND.norm(dim=1) * math.sqrt(size / sketch.code_size)
    assert torch.allclose(norm_N, code_NK.norm(dim=1), rtol=1e-4)


def test_small_sketch_against_its_dense_matrix() -> None:
    sketch = RandomSketch(tile((3, 7), (2, 5)), (9, 4))
    dense_KD = sketch.encode(torch.eye(31), 3).T
    assert torch.allclose(dense_KD @ dense_KD.T, torch.eye(13) * 31 / 13, atol=1e-5)
    weight_K = torch.tensor([21 / 9] * 9 + [10 / 4] * 4) * 13 / 31
    assert torch.allclose(sketch.decode(torch.eye(13), 3), weight_K[:, None] * dense_KD * 13 / 31, atol=1e-5)
    # Segments do not mix: the first 9 code values see the first 21 update values only.
    assert not dense_KD[:9, 21:].any()
    assert not dense_KD[9:, :21].any()


def test_different_seeds_give_different_sketches() -> None:
    sketch = ALL["random"]
    update_ND = some_updates(sketch, 1)
    codes = [sketch.encode(update_ND, seed) for seed in range(4)]
    for first in range(4):
        for second in range(first):
            cosine = torch.cosine_similarity(codes[first], codes[second])
            assert cosine.abs() < 5 / math.sqrt(sketch.code_size)


def capture(sketch: RandomSketch, update_ND: Tensor, num_seeds: int) -> Tensor:
    """|P u|^2 / |u|^2, (num_seeds,), averaged over rows."""
    shares = []
    for seed in range(num_seeds):
        energy_N = sketch.encode(update_ND, seed).square().sum(1) / sketch.scale**2
        shares.append((energy_N / update_ND.square().sum(1)).mean())
    return torch.stack(shares)


def spiky() -> Tensor:
    """An update whose energy sits in a few places: the transform has to spread it."""
    update_ND = torch.zeros(1, SIZE)
    update_ND[0, [5, 700, 4097, 5200, 6300]] = torch.tensor([5.0, -3.0, 1.0, 2.0, 1.0])
    return update_ND


@pytest.mark.parametrize("kind", ["dense", "spiky"])
def test_random_sketch_captures_its_share(kind: str) -> None:
    sketch = RandomSketch.build(SEGMENTS, SIZE // 16, floor=0.0)
    share_R = capture(sketch, some_updates(sketch, 1) if kind == "dense" else spiky(), 200)
    error = float(share_R.std()) / math.sqrt(len(share_R))
    expected = sketch.expected_capture(torch.tensor([float(s.size) for s in SEGMENTS]))
    assert abs(expected - 1 / 16) < 1e-3
    if kind == "spiky":
        energy = spiky().square()[0]
        expected = sketch.expected_capture(torch.stack([energy[s.start : s.stop].sum() for s in SEGMENTS]))
    assert abs(float(share_R.mean()) - expected) < 4 * error
    assert 4 * error < expected / 2  # a capture of half or one and a half times would be seen


def test_every_value_is_seen_at_the_same_rate() -> None:
    """Inclusion is uniform inside a segment for sizes that neither blocks nor strata divide."""
    sketch = RandomSketch(tile((1, 13)), (5,))
    rounds = 3000
    energy_D = torch.zeros(13)
    for seed in range(rounds):
        energy_D += (sketch.encode(torch.eye(13), seed) / sketch.scale).square().sum(1)
    # Variance of one round is below (5/13)(8/13) < 0.24.
    assert ((energy_D / rounds - 5 / 13).abs() < 4.5 * math.sqrt(0.24 / rounds)).all()


def test_prior_raises_captured_energy_as_predicted() -> None:
    segments = tile((8, 512), (8, 512), (8, 512))
    std_S = torch.tensor([1.0, 0.1, 1e-3])
    prior = GaussianPrior(segments, torch.zeros(3), std_S)
    uniform = RandomSketch.build(segments, 192)
    informed = RandomSketch.build(segments, 192, prior, floor=0.1)
    update_ND = prior.sample(16, 3).values_ND
    measured = float(capture(informed, update_ND, 8).mean())
    assert measured == pytest.approx(informed.expected_capture(prior.energy_S), rel=0.1)
    assert measured > 2.5 * float(capture(uniform, update_ND, 8).mean())
    assert min(informed.code_S) >= 6  # the floor's share: 10 % of 192 over three segments


def test_decoding_is_unbiased_up_to_one_factor_whatever_the_allocation() -> None:
    """Over seeds the decoding of u is (K / D) u: allocation must not turn the direction (docs/log.md)."""
    segments = tile((4, 16), (4, 16), (4, 16))
    prior = GaussianPrior(segments, torch.zeros(3), torch.tensor([1.0, 0.3, 0.05]))
    sketch = RandomSketch.build(segments, 48, prior, floor=0.4)
    assert max(sketch.code_S) > 2 * min(sketch.code_S)  # far from uniform
    update_ND = torch.randn(1, 192, generator=torch.Generator().manual_seed(0))
    rounds = 1500
    mean_D = sum(sketch.decode(sketch.encode(update_ND, seed), seed)[0] for seed in range(rounds)) / rounds
    for segment in segments:
        part = slice(segment.start, segment.stop)
        gain = float(mean_D[part] @ update_ND[0, part] / update_ND[0, part].square().sum())
        assert gain == pytest.approx(48 / 192, rel=0.05), segment.name


def test_expected_code_norm_is_the_updates() -> None:
    sketch = RandomSketch.build(SEGMENTS, SIZE // 16)
    update_ND = some_updates(sketch, 64)
    code_NK = sketch.encode(update_ND, 1)
    assert float(code_NK.square().sum()) == pytest.approx(float(update_ND.square().sum()), rel=0.03)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    share=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_allocation_is_exact(sizes: list[int], share: float, floor: float, data: st.DataObject) -> None:
    segments = tile(*[(size,) for size in sizes])
    code_size = max(1, round(share * sum(sizes)))
    energies = data.draw(st.lists(st.floats(0, 1e6), min_size=len(sizes), max_size=len(sizes)))
    energy_S = torch.tensor(energies, dtype=torch.float64) if sum(energies) > 0 else None
    code_S = allocate_code(segments, code_size, energy_S, floor)
    assert int(code_S.sum()) == code_size
    assert (code_S >= 0).all()
    assert (code_S <= torch.tensor(sizes)).all()
    if floor > 0 and code_size >= len(sizes):
        assert (code_S >= 1).all()


def test_allocation_follows_the_energy_up_to_the_cap() -> None:
    segments = tile((1000,), (1000,), (10,))
    code_S = allocate_code(segments, 100, torch.tensor([3.0, 1.0, 0.0]), 0.0)
    assert code_S.tolist() == [75, 25, 0]
    code_S = allocate_code(segments, 1100, torch.tensor([9.0, 1.0, 0.0]), 0.0)
    assert code_S.tolist() == [990, 110, 0]
    code_S = allocate_code(segments, 1200, torch.tensor([9.0, 1.0, 0.0]), 0.0)
    assert code_S.tolist() == [1000, 200, 0]
    assert allocate_code(segments, 2005, torch.tensor([9.0, 1.0, 0.0]), 0.0).tolist() == [1000, 1000, 5]
    assert allocate_code(segments, 201, None, 0.1).tolist() == [100, 100, 1]


@pytest.mark.parametrize("code_size", [0, SIZE + 1])
def test_impossible_code_sizes_are_refused(code_size: int) -> None:
    with pytest.raises(EncoderError, match=f"code_size is {code_size}, expected 1 to {SIZE}"):
        RandomSketch.build(SEGMENTS, code_size)


def test_segments_with_holes_are_refused() -> None:
    with pytest.raises(EncoderError, match="next free position"):
        IdentityEncoder((Segment("a", 0, (4,)), Segment("b", 5, (4,))))
    with pytest.raises(EncoderError, match="no adapter values"):
        IdentityEncoder(())


def test_sketch_scales_to_a_large_adapter_without_a_basis() -> None:
    segments = tile(*[(8, 4096)] * 32)  # a dense basis would take 64 GiB
    sketch = RandomSketch.build(segments, segments[-1].stop // 64)
    check_orthogonal_projection(sketch, 8.0)


# --- gate -------------------------------------------------------------------------------------------------


class Constant:
    """Ignores its input and answers the prior's mean: carries nothing, has a fine raw cosine."""

    name = "constant"
    linear = False
    segments = FLAT
    update_size = FLAT[-1].stop
    code_size = FLAT[-1].stop // 64

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return torch.zeros(update_ND.shape[0], self.code_size)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        return torch.ones(code_NK.shape[0], self.update_size)

    def describe(self) -> dict[str, str | int | float | bool]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}


def test_gate_passes_good_encoders_with_the_right_numbers() -> None:
    update_ND = GaussianPrior.isotropic(FLAT).sample(24, 0).values_ND
    result = measure_viability(IdentityEncoder(FLAT), update_ND, 0)
    assert result.viable
    assert result.cosine == pytest.approx(1.0)
    assert result.captured_energy == pytest.approx(1.0)
    result = measure_viability(RandomSketch.build(FLAT, 64), update_ND, 0)
    assert result.viable
    assert result.random_cosine == pytest.approx(1 / 8)
    assert result.cosine == pytest.approx(1 / 8, rel=0.1)
    assert result.captured_energy == pytest.approx(1 / 64, rel=0.2)
    assert result.cosine_low < result.cosine
    require_viable(result)


def test_gate_refuses_an_encoder_that_ignores_its_input() -> None:
    update_ND = GaussianPrior.isotropic(FLAT).sample(24, 0).values_ND + 0.1
    result = measure_viability(Constant(), update_ND, 0)
    assert result.raw_cosine > 0.9
    assert result.cosine == 0.0
    with pytest.raises(ViabilityError, match=r"update cosine 0\.000.*0\.062 needed.*set encoder\.name=random"):
        require_viable(result)
    require_viable(result, allow=True)


def test_gate_refuses_a_negligible_and_an_uncertain_cosine() -> None:
    def gate(rows_ND: Tensor) -> GateResult:
        # Only the first tensor reaches the server.
        return measure_viability(RandomSketch(tile((64,), (4032,)), (64, 0)), rows_ND, 0)

    rows_ND = torch.randn(24, 4096, generator=torch.Generator().manual_seed(0))
    assert gate(rows_ND).viable
    rows_ND[:, :64] *= 0.3
    assert not gate(rows_ND).viable
    # One update of two is carried entirely, the other not at all: far from certain.
    two_ND = torch.zeros(2, 4096)
    two_ND[0, 0] = two_ND[1, 100] = 1.0
    result = gate(two_ND)
    assert result.cosine == pytest.approx(0.5)
    assert result.cosine_low < 0
    assert not result.viable


def test_gate_needs_updates_that_say_something() -> None:
    with pytest.raises(EncoderError, match="at least 2 updates"):
        measure_viability(IdentityEncoder(FLAT), torch.zeros(5, 4096), 0)
    with pytest.raises(EncoderError, match="not finite"):
        measure_viability(IdentityEncoder(FLAT), torch.full((5, 4096), torch.nan), 0)


# --- registry ---------------------------------------------------------------------------------------------


def test_registry_builds_and_restores() -> None:
    prior = GaussianPrior.isotropic(FLAT)
    request = EncoderRequest(FLAT, 64, prior, seed=1)
    update_ND = some_updates(IdentityEncoder(FLAT), 2)
    for name in ("random", "autoencoder"):
        encoder = build_encoder(name, request)
        again = build_encoder(name, request, encoder.state())
        assert encoder.name == name
        assert torch.equal(encoder.encode(update_ND, 7), again.encode(update_ND, 7))
    assert build_encoder("identity", EncoderRequest(FLAT)).code_size == 4096


@pytest.mark.parametrize(
    ("name", "code_size", "message"),
    [
        ("os.system", None, "choose one of identity, random, autoencoder"),
        ("random", None, "needs a code_size"),
        ("identity", 64, "always sends 4096 values"),
        ("autoencoder", 65, "always sends 64 values"),
        ("autoencoder", 64, "needs a prior"),
    ],
)
def test_registry_refuses(name: str, code_size: int | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        build_encoder(name, EncoderRequest(FLAT, code_size))
    with pytest.raises(EncoderError, match="keeps no tensors"):
        build_encoder("identity", EncoderRequest(FLAT), {"weight": torch.zeros(1)})


def test_registry_builds_every_architecture_and_restores_no_other() -> None:
    prior = GaussianPrior.isotropic(FLAT)
    request = EncoderRequest(FLAT, prior=prior)
    built = {name: build_encoder(name, request) for name in ARCHITECTURES}
    assert {name: encoder.code_size for name, encoder in built.items()} == {
        "autoencoder": 64, "autoencoder-published": 64, "autoencoder-cnn1d": 128, "autoencoder-unet": 64
    }  # fmt: skip
    assert all(encoder.describe()["name"] == name for name, encoder in built.items())
    for name, other in (("autoencoder", "autoencoder-published"), ("autoencoder-unet", "autoencoder")):
        with pytest.raises(EncoderError, match=f"saved encoder is '{name}', the recipe wants '{other}'"):
            build_encoder(other, request, built[name].state())
    with pytest.raises(EncoderError, match="no auto-encoder 'os'; choose one of autoencoder, autoencoder-published"):
        AutoencoderOptions(name="os")


def test_registry_trains_fedcgs_encoder_on_real_gradients_only_if_it_can_be_trained(tmp_path: Path) -> None:
    real = RealGradients.collected(levels(20, 1), permit_of(tmp_path))
    # A prior that is there as well is not used.
    request = EncoderRequest(FLAT, prior=GaussianPrior.isotropic(FLAT), real=real)
    encoder = build_encoder("autoencoder", request)
    assert encoder.describe()["trained_on"] == "real"
    assert encoder.describe()["public"] is False
    scale = 4.0 * float(real.split(0.2, 0)[0].values_ND.square().mean().sqrt())
    assert encoder.describe()["scale_max"] == pytest.approx(scale, rel=1e-6)
    again = build_encoder("autoencoder", EncoderRequest(FLAT), encoder.state())
    assert again.describe() == encoder.describe()
    for name in ("identity", "random"):
        with pytest.raises(EncoderError, match=f"autoencoder only, not '{name}'"):
            build_encoder(name, EncoderRequest(FLAT, 64, real=real))
