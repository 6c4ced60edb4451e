"""The matrix-normal prior: what it estimates, what it draws, and what it refuses.

Legend: N updates, D adapter values, S segments; one side of a tensor has length L.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drencoder.encoders import matrix_normal_prior as structured
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, Origin, SecondMoment, matrix_shape
from drencoder.errors import EncoderError
from encoder_toys import tile

SEGMENTS = tile((3, 7), (9, 4), (5,))
SIZE = SEGMENTS[-1].stop
ORIGIN = Origin("a toy", 1, 64)


def random_moment(length: int, known: int, floor: float, generator: torch.Generator) -> SecondMoment:
    """`known` random directions; all others have `floor` times the least of their values."""
    vectors, _ = torch.linalg.qr(torch.randn(length, known, generator=generator, dtype=torch.float64))
    values = torch.rand(known, generator=generator, dtype=torch.float64).cumsum(0).flip(0)
    rest = floor * float(values[-1])
    trace = float(values.sum()) + (length - known) * rest
    return SecondMoment(vectors.float(), values / trace, rest / trace)


def random_prior(
    segments: tuple = SEGMENTS, known: int = 3, floor: float = 0.1, seed: int = 0, energies: Tensor | None = None
) -> MatrixNormalPrior:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [], []
    for segment in segments:
        height, width = matrix_shape(segment)
        rows.append(random_moment(height, min(known, height), floor, generator))
        columns.append(random_moment(width, min(known, width), floor, generator))
    energy_S = 0.5 + torch.rand(len(segments), generator=generator, dtype=torch.float64)
    return MatrixNormalPrior(
        segments, tuple(rows), tuple(columns), energy_S if energies is None else energies.double(), ORIGIN
    )


def dense(moment: SecondMoment) -> Tensor:
    """(L, L) float64, for small L."""
    vectors = moment.vectors_LQ.double()
    rest = torch.eye(moment.length, dtype=torch.float64) - vectors @ vectors.T
    return vectors @ torch.diag(moment.values_Q) @ vectors.T + moment.floor * rest


def dense_covariances(prior: MatrixNormalPrior) -> list[Tensor]:
    """spread * (U (x) V) of every tensor, in the order of the flat vector."""
    return [
        spread * torch.kron(dense(row), dense(column))
        for row, column, spread in zip(prior.rows, prior.columns, prior.energy_S.tolist(), strict=True)
    ]


def draws(prior: MatrixNormalPrior, count: int, seed: int) -> Tensor:
    return torch.stack([prior.draw_row(seed, index) for index in range(count)])


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor made inside has."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


# --- draws ------------------------------------------------------------------------------------------------


def test_draws_have_the_covariance_of_the_kronecker_product() -> None:
    prior, count = random_prior(), 5_000
    value_ND = draws(prior, count, 1).double()
    for segment, wanted in zip(SEGMENTS, dense_covariances(prior), strict=True):
        part_NV = value_ND[:, segment.start : segment.stop]
        got = part_NV.T @ part_NV / count
        # Variance of an entry: (w_ii w_jj + w_ij^2) / count.
        scale = (torch.outer(wanted.diag(), wanted.diag()) + wanted.square()).sqrt() / math.sqrt(count)
        assert ((got - wanted).abs() < 6 * scale).all()
        # A covariance half as large again, or without directions, would be seen.
        assert ((got - 1.5 * wanted).abs() >= 6 * scale).any()
        assert ((got - wanted.trace() / len(wanted) * torch.eye(len(wanted))).abs() >= 6 * scale).any()
    # Tensors are independent of one another.
    cross = value_ND[:, :21].T @ value_ND[:, 21:57] / count
    assert cross.abs().max() < 7 * value_ND.var(0).max() / math.sqrt(count)


def test_draws_depend_on_seed_and_index_alone() -> None:
    prior = random_prior()
    state = torch.random.get_rng_state()
    assert torch.equal(prior.draw_row(3, 5), prior.draw_row(3, 5))
    assert not torch.equal(prior.draw_row(3, 5), prior.draw_row(3, 6))
    assert not torch.equal(prior.draw_row(3, 5), prior.draw_row(4, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prior.draw_row(3, 5).shape == (SIZE,)
    assert prior.draw_row(3, 5).dtype == torch.float32


# --- estimation -------------------------------------------------------------------------------------------


def test_estimate_finds_the_prior_that_updates_were_drawn_from() -> None:
    true = random_prior(floor=0.05)
    found = MatrixNormalPrior.from_updates(draws(true, 3000, 2), SEGMENTS, declared="draws of a known prior")
    assert torch.allclose(found.energy_S, true.energy_S, rtol=0.1)
    for ours, theirs in zip((*found.rows, *found.columns), (*true.rows, *true.columns), strict=True):
        assert (dense(ours) - dense(theirs)).norm() < 0.06 * dense(theirs).norm()
        assert dense(ours).trace().item() == pytest.approx(1.0, abs=1e-6)


def test_estimate_is_the_modewise_second_moment_cut() -> None:
    update_ND = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))
    found = MatrixNormalPrior.from_updates(update_ND, SEGMENTS, declared="noise", rank=2)
    assert found.energy_S.tolist() == pytest.approx(
        [float(update_ND[:, s.start : s.stop].square().sum()) / 4 for s in SEGMENTS], rel=1e-5
    )
    part_NAB = update_ND[:, 21:57].view(4, 9, 4).double()
    for moment, wanted in (
        (found.rows[1], torch.einsum("nab,ncb->ac", part_NAB, part_NAB)),
        (found.columns[1], torch.einsum("nab,nac->bc", part_NAB, part_NAB)),
    ):
        exact = torch.linalg.eigvalsh(wanted / wanted.trace()).flip(0)
        assert moment.values_Q.tolist() == pytest.approx(exact[:2].tolist(), rel=1e-5)
        assert moment.floor == pytest.approx(float(exact[2:].mean()), rel=1e-5)
        vectors = moment.vectors_LQ.double()
        assert torch.allclose(vectors.T @ vectors, torch.eye(2, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(wanted @ vectors / wanted.trace(), vectors * exact[:2], atol=1e-6)


def test_blocks_change_nothing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    spectrum = 0.8 ** torch.arange(60.0)
    rows_XL = (torch.randn(900, 60, generator=generator) * spectrum) @ torch.linalg.qr(
        torch.randn(60, 60, generator=generator)
    )[0]
    whole = SecondMoment.estimate(rows_XL, 5)
    monkeypatch.setattr(structured, "_BLOCK_VALUES", 60 * 45)
    blocks = SecondMoment.estimate(rows_XL, 5)
    assert blocks.values_Q.tolist() == pytest.approx(whole.values_Q.tolist(), rel=1e-3)
    assert blocks.floor == pytest.approx(whole.floor, rel=1e-2)
    assert (blocks.vectors_LQ.T @ whole.vectors_LQ).square().sum() > 5 - 1e-3
    exact = SecondMoment.estimate(rows_XL, 15)  # 4 x 15 = 60: blocks lose nothing
    monkeypatch.undo()
    assert torch.allclose(exact.values_Q, SecondMoment.estimate(rows_XL, 15).values_Q, rtol=1e-4)


def test_few_rows_give_as_many_directions() -> None:
    moment = SecondMoment.estimate(torch.tensor([[3.0, 0, 0, 0], [0, 0, 4.0, 0], [0, 0, 4.0, 0]]), 4)
    assert moment.values_Q.tolist() == pytest.approx([32 / 41, 9 / 41])
    assert moment.floor == pytest.approx(0.0, abs=1e-7)
    assert moment.vectors_LQ.abs().T.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_a_tensor_without_gradient_is_isotropic_until_an_energy_is_known() -> None:
    update_ND = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0))
    update_ND[:, 21:57] = 0.0
    prior = MatrixNormalPrior.from_updates(update_ND, SEGMENTS, declared="B = 0")
    assert prior.energy_S[1] == 0.0
    assert not draws(prior, 2, 0)[:, 21:57].any()
    informed = prior.with_energies(torch.tensor([1.0, 2.0, 0.0]))
    assert informed.energy_S.tolist() == [1.0, 2.0, 0.0]
    value_ND = draws(informed, 1500, 0)
    # Relative deviation of a mean of chi-squares of 36 degrees: sqrt(2 / 36 / 1500) = 0.006.
    assert float(value_ND[:, 21:57].square().sum(1).mean()) == pytest.approx(2.0, rel=0.04)
    assert torch.allclose(value_ND[:, 21:57].var(0), torch.full((36,), 2 / 36), rtol=0.25)
    assert not value_ND[:, 57:].any()


def test_energies_come_from_the_charged_moments_and_say_so() -> None:
    moments = GaussianPrior(SEGMENTS, torch.zeros(3), torch.tensor([0.1, 0.2, 0.3]))
    prior = random_prior()
    informed = prior.with_energies(moments.energy_S)
    assert torch.allclose(informed.energy_S, torch.tensor([21 * 0.01, 36 * 0.04, 5 * 0.09]).double())
    assert informed.rows is prior.rows
    assert (prior.origin.sentence, informed.origin.sentence) == (
        "public: a toy (1 updates)",
        "public: a toy (1 updates); energies: moments",
    )


def test_no_square_of_the_long_side_is_ever_formed() -> None:
    segments = tile((8, 4096), (4096, 8))
    update_ND = torch.randn(3, 65536, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        MatrixNormalPrior.from_updates(update_ND, segments, declared="noise", rank=16).draw_row(0, 0)
    assert update_ND.numel() <= largest.values < 4096 * 4096 / 8


# --- refusing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"declared": "  "}, "needs the provenance"),
        ({"rank": 0}, "rank is 0"),
        ({"update_ND": torch.ones(2, SIZE + 1)}, rf"1 or more updates of {SIZE} values, got shape \(2, {SIZE + 1}\)"),
        ({"update_ND": torch.ones(0, SIZE)}, "1 or more updates"),
        ({"update_ND": torch.full((2, SIZE), math.nan)}, f"{2 * SIZE} values of the public updates are not finite"),
        ({"update_ND": torch.zeros(2, SIZE)}, "0 are not zero"),
    ],
)
def test_what_gives_no_prior_is_refused(change: dict, message: str) -> None:
    wanted = {"update_ND": torch.ones(2, SIZE), "segments": SEGMENTS, "declared": "ones"} | change
    with pytest.raises(EncoderError, match=message):
        MatrixNormalPrior.from_updates(**wanted)


@pytest.mark.parametrize("bad", [torch.ones(2), -torch.ones(3), torch.zeros(3), torch.tensor([1.0, math.nan, 1.0])])
def test_impossible_energies_are_refused(bad: Tensor) -> None:
    with pytest.raises(EncoderError, match="3 numbers >= 0 with a positive, finite sum"):
        random_prior().with_energies(bad)


def test_moments_of_another_adapter_are_refused() -> None:
    prior = random_prior()
    with pytest.raises(EncoderError, match="do not fit the adapter"):
        MatrixNormalPrior(SEGMENTS, prior.columns, prior.rows, prior.energy_S, ORIGIN)
    with pytest.raises(EncoderError, match="values must fall"):
        SecondMoment(torch.eye(3)[:, :2], torch.tensor([0.4, 0.6], dtype=torch.float64), 0.0)
