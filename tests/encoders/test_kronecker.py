"""The kronecker encoder: the contract, that it is the optimum of its prior, and what it costs.

Legend: N updates, D adapter values, K code values, S segments.
"""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from test_matrix_normal_prior import Largest, dense_covariances, draws, random_prior
from torch import Tensor

from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, Origin, SecondMoment
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.errors import EncoderError
from encoder_contract import CONTRACT, Check, check_orthogonal_projection, some_codes, some_updates
from encoder_toys import SEGMENTS, SIZE, tile

SMALL = tile((3, 7), (9, 4), (5,), (2, 3, 2))
SMALL_SIZE = SMALL[-1].stop


@cache
def built(rank: int, code_size: int) -> KroneckerEncoder:
    update_ND = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(0))
    return KroneckerEncoder.build(
        MatrixNormalPrior.from_updates(update_ND, SEGMENTS, declared="noise", rank=rank), code_size
    )


# Rank 3 of sides of 8 and more: most coordinates lie beyond the known directions.
ALL = {
    "1/64": (16, SIZE // 64),
    "one value": (16, 1),
    "beyond the known directions": (3, 2000),
    "everything": (3, SIZE),
    "everything, large rank": (700, SIZE),
}


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ALL)
def test_contract(name: str, check: Check) -> None:
    check(built(*ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_it_is_an_orthogonal_projection(name: str) -> None:
    check_orthogonal_projection(built(*ALL[name]), 1.0)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4),
    known=st.integers(1, 9),
    floor=st.floats(0.0, 1.0),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**40),
)
def test_any_layout_and_size(shapes: list[tuple[int, int]], known: int, floor: float, share: float, seed: int) -> None:
    prior = random_prior(tile(*shapes), known, floor, seed)
    encoder = KroneckerEncoder.build(prior, max(1, round(share * prior.segments[-1].stop)))
    code_NK = some_codes(encoder, 2)
    back_ND = encoder.decode(code_NK, 0)
    assert torch.allclose(encoder.encode(back_ND, 0), code_NK, atol=2e-5)
    assert torch.allclose(back_ND.norm(dim=1), code_NK.norm(dim=1), rtol=1e-4)


# --- the optimum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [2, 9])
def test_every_code_size_captures_the_largest_eigenvalues(known: int) -> None:
    """Against the dense eigenvalues of the whole adapter's covariance, which the encoder never sees."""
    prior = random_prior(SMALL, known, seed=4)
    covariance = torch.block_diag(*dense_covariances(prior))
    best = torch.linalg.eigvalsh(covariance).flip(0).cumsum(0)
    for size in range(1, SMALL_SIZE + 1):
        encoder = KroneckerEncoder.build(prior, size)
        basis_KD = encoder.decode(torch.eye(size), 0).double()
        inside = (basis_KD @ covariance @ basis_KD.T).diag()
        # The promised variance of each code value, and no more to be had by any other code.
        assert torch.allclose(inside, encoder.variance_K, rtol=1e-4, atol=1e-7)
        assert float(inside.sum()) == pytest.approx(float(best[size - 1]), rel=1e-5)
        assert encoder.energy == pytest.approx(float(best[-1]), rel=1e-6)
        assert encoder.distortion == pytest.approx(float(best[-1] - best[size - 1]), abs=1e-6 * encoder.energy)


def test_distortion_on_the_priors_own_samples_is_the_water_filling_value() -> None:
    segments = tile((8, 96), (96, 8), (8, 64))
    prior, count = random_prior(segments, known=24, floor=0.3, seed=1), 3000
    code_size = segments[-1].stop // 16
    encoder = KroneckerEncoder.build(prior, code_size)
    update_ND = draws(prior, count, 7)
    lost = (update_ND - encoder.decode(encoder.encode(update_ND, 0), 0)).double().square().sum(1)
    # Variance of one loss: twice the sum of the squared eigenvalues that are left out.
    squares = sum(float(part.square().sum()) for part in dense_covariances(prior))
    error = math.sqrt(2.0 * (squares - float(encoder.variance_K.square().sum())) / count)
    assert 6.0 * error < 0.01 * encoder.distortion, "too few samples to see one percent"
    assert float(lost.mean()) == pytest.approx(encoder.distortion, rel=0.01)
    # As many values by an allocation to tensors alone lose far more: the test would notice a wrong basis.
    sketch = RandomSketch.build(segments, code_size)
    missed = update_ND.double().square().sum(1).mean() * (1.0 - code_size / sketch.update_size)
    assert encoder.distortion < 0.9 * float(missed)


def test_coordinates_are_chosen_across_tensors_by_variance() -> None:
    prior = random_prior(tile((4, 16), (16, 4)), known=16, energies=torch.tensor([1.0, 1.0]))
    both = [len(part.index_k) for part in KroneckerEncoder.build(prior, 24).parts]
    assert len(both) == 2
    assert min(both) >= 6
    tilted = prior.with_energies(torch.tensor([1.0, 1e-9]))
    encoder = KroneckerEncoder.build(tilted, 24)
    assert [part.segment.name for part in encoder.parts] == ["tensor0"]
    update_ND = some_updates(encoder, 2)
    update_ND[:, :64] = 0.0
    assert not encoder.encode(update_ND, 0).any()
    # Only once the strong tensor is whole does the other get a value.
    assert len(KroneckerEncoder.build(tilted, 65).parts) == 2


def test_ties_go_to_the_earlier_tensor_row_and_direction() -> None:
    three, four, energy_S = SecondMoment.isotropic(3), SecondMoment.isotropic(4), torch.ones(2, dtype=torch.float64)
    flat = MatrixNormalPrior(tile((3, 4), (4, 3)), (three, four), (four, three), energy_S, Origin("made up", 1, 1))
    encoder = KroneckerEncoder.build(flat, 17)
    assert [part.count_A.tolist() for part in encoder.parts] == [[4, 4, 4], [4, 1, 0]]


def test_a_turned_tensor_has_the_same_code() -> None:
    update_ND = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    turned_ND = update_ND.view(5, 6, 16).transpose(1, 2).reshape(5, 96)
    encoded = []
    for values_ND, shape in ((update_ND, (6, 16)), (turned_ND, (16, 6))):
        prior = MatrixNormalPrior.from_updates(values_ND, tile(shape), declared="noise", rank=4)
        encoder = KroneckerEncoder.build(prior, 50)
        code_NK = encoder.encode(values_ND, 0)
        encoded.append((code_NK, encoder.decode(code_NK, 0)))
    (code_NK, back_ND), (turned_NK, turned_back_ND) = encoded
    assert torch.allclose(code_NK.abs(), turned_NK.abs(), atol=1e-4)  # signs of eigenvectors are free
    assert torch.allclose(back_ND, turned_back_ND.view(5, 16, 6).transpose(1, 2).reshape(5, 96), atol=1e-4)


def test_learned_bases_carry_updates_of_the_same_kind_and_random_ones_do_not() -> None:
    """Low-rank updates in a common subspace, as gradients of one model are: 12 shared directions of 640."""
    generator = torch.Generator().manual_seed(0)
    segments = tile((8, 640))
    shared = torch.linalg.qr(torch.randn(640, 12, generator=generator))[0]
    update_ND = (torch.randn(40, 8, 12, generator=generator) @ shared.T).reshape(40, -1)
    update_ND += 0.01 * torch.randn(update_ND.shape, generator=generator)
    prior = MatrixNormalPrior.from_updates(update_ND[:20], segments, declared="half of them", rank=16)
    encoder, unseen_ND = KroneckerEncoder.build(prior, 96), update_ND[20:]
    kept = encoder.encode(unseen_ND, 0).square().sum() / unseen_ND.square().sum()
    assert kept > 0.98
    sketch = RandomSketch.build(segments, 96)
    assert (sketch.encode(unseen_ND, 0) / sketch.scale).square().sum() / unseen_ND.square().sum() < 0.05


# --- cost, keeping, refusing ------------------------------------------------------------------------------


def test_no_dense_basis_and_no_square_of_the_long_side() -> None:
    segments = tile((8, 4096), (4096, 8))
    update_ND = torch.randn(2, 65536, generator=torch.Generator().manual_seed(0))
    prior = MatrixNormalPrior.from_updates(update_ND, segments, declared="noise", rank=32)
    with Largest() as largest:
        encoder = KroneckerEncoder.build(prior, 1024)
        encoder.decode(encoder.encode(update_ND, 0), 0)
        beyond = KroneckerEncoder.build(prior, 4096)
        beyond.decode(beyond.encode(update_ND, 0), 0)
    assert update_ND.numel() <= largest.values < 4096 * 4096 / 16
    # 32 directions of 4,096 float32 values per tensor, and what is small.
    assert encoder.basis_bytes < 2 * 4 * 32 * 4096 * 1.1
    assert encoder.basis_bytes < encoder.describe()["memory_bytes"] < 4 * encoder.basis_bytes


def test_facts() -> None:
    encoder = built(16, SIZE // 64)
    facts = encoder.describe()
    assert facts["provenance"] == "public: noise (6 updates)"
    assert facts["expected_capture"] == pytest.approx(float(encoder.variance_K.sum()) / encoder.energy)
    assert facts["fingerprint"] == encoder.fingerprint != built(16, SIZE // 64 + 1).fingerprint
    assert facts["tensors_reached"] == len({part.segment.name for part in encoder.parts})


@pytest.mark.parametrize("name", ALL)
def test_state_restores_the_same_map(name: str) -> None:
    encoder = built(*ALL[name])
    again = KroneckerEncoder.from_state(SEGMENTS, load(save(encoder.state())))
    update_ND, code_NK = some_updates(encoder, 3), some_codes(encoder, 3)
    assert torch.equal(again.encode(update_ND, 0), encoder.encode(update_ND, 1))
    assert torch.equal(again.decode(code_NK, 0), encoder.decode(code_NK, 1))
    assert again.describe() == encoder.describe()
    assert torch.equal(again.variance_K, encoder.variance_K)


def test_states_of_others_are_refused() -> None:
    state = built(3, 2000).state()
    broken: list[dict[str, Tensor]] = [
        {},
        {key: tensor for key, tensor in state.items() if key != "0.long.vectors"},
        state | {"variance": state["variance"][:-1]},
        state | {"0.long.vectors": state["0.long.vectors"][:-1]},
        state | {"0.counts": state["0.counts"] * 0},
        state | {"tensors": state["tensors"] + 100},
    ]
    for kept in broken:
        with pytest.raises(EncoderError, match="saved kronecker encoder does not fit this adapter of 5 tensors"):
            KroneckerEncoder.from_state(SEGMENTS, kept)
    with pytest.raises(EncoderError, match="does not fit"):
        KroneckerEncoder.from_state(tile((8, 640)), state)


@pytest.mark.parametrize("code_size", [0, SMALL_SIZE + 1])
def test_impossible_code_sizes_are_refused(code_size: int) -> None:
    with pytest.raises(EncoderError, match=f"code_size is {code_size}, expected 1 to {SMALL_SIZE}"):
        KroneckerEncoder.build(random_prior(SMALL), code_size)


def test_rounding_of_the_public_updates_moves_no_coordinate() -> None:
    """Two updates know 2 directions of a tensor's sides; a longer code goes on with coordinates of which nothing is known.

    Which ones those are must not be decided by the last bit, which differs from processor to processor.
    """
    update_ND = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(5))
    counts = []
    for seed in range(8):
        noise_ND = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed))
        rounded_ND = update_ND * (1 + 1e-7 * noise_ND)
        prior = MatrixNormalPrior.from_updates(rounded_ND, SEGMENTS, declared="noise", rank=700)
        encoder = KroneckerEncoder.build(prior, SIZE // 2)
        counts.append([(part.segment.name, part.count_A.tolist()) for part in encoder.parts])
    assert all(count == counts[0] for count in counts)
