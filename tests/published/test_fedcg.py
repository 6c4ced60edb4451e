"""FedCG's door: real gradients only with a permit that says non-private, and the same training for both kinds.

Legend: N gradients, D adapter values.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.errors import EncoderError, PrivacyError
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions
from drencoder.published.fedcg import RealGradients
from encoder_toys import FLAT, SEGMENTS, as_synthetic, levels, permit_of

OPTIONS = AutoencoderOptions(steps=6, batch=4, check_every=3, name="autoencoder-cnn1d")


@pytest.fixture
def real(tmp_path: Path) -> RealGradients:
    return RealGradients.collected(levels(10, 1), permit_of(tmp_path))


@pytest.mark.parametrize(
    ("slot", "non_private"),
    [(0, ()), (0, ("round",)), (1, ("stage1", "round")), (1, ("stage1",)), (1, ())],
)
def test_refused_without_a_permit_for_a_non_private_stage_1(
    tmp_path: Path, slot: int, non_private: tuple[str, ...]
) -> None:
    permit = permit_of(tmp_path, slot, non_private)
    with pytest.raises(PrivacyError, match=f"cannot be collected under the charge of slot {slot}"):
        RealGradients.collected(levels(4, 1), permit)


def test_allowed_when_only_stage_1_is_non_private(tmp_path: Path) -> None:
    assert len(RealGradients.collected(levels(4, 1), permit_of(tmp_path, 0, ("stage1",)))) == 4


def test_there_is_no_other_way_in() -> None:
    for make in (
        lambda: RealGradients(levels(4, 1)),
        lambda: RealGradients(levels(4, 1), token=object()),
        lambda: RealGradients.collected(levels(4, 1), None),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"[Pp]ermit"):
            make()


def test_real_gradients_never_leave_memory(real: RealGradients) -> None:
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            leave(real)
    assert "tensor" not in repr(real)


def test_broken_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    values_ND = levels(5, 1)
    values_ND[1, 7], values_ND[3, 9] = torch.nan, torch.inf
    permit = permit_of(tmp_path)
    real = RealGradients.collected(values_ND, permit)
    assert (len(real), real.dropped) == (3, 2)
    assert torch.equal(real.values_ND, values_ND[[0, 2, 4]])
    values_ND[[0, 2]] = torch.nan
    with pytest.raises(EncoderError, match="1 of 5 real gradients are finite, at least 2"):
        RealGradients.collected(values_ND, permit)
    for wrong in (torch.zeros(4096), torch.zeros(3, 4096, dtype=torch.int64)):
        with pytest.raises(EncoderError, match=r"are no \(N, D\) floats"):
            RealGradients.collected(wrong, permit)


def test_split_is_a_partition(real: RealGradients) -> None:
    def sorted_rows(*parts: Tensor) -> Tensor:
        return torch.cat(parts)[:, 0].sort().values

    training, validation = real.split(0.2, 7)
    assert (len(training), len(validation)) == (8, 2)
    assert torch.equal(sorted_rows(training.values_ND, validation.values_ND), sorted_rows(real.values_ND))
    assert torch.equal(real.split(0.2, 7)[1].values_ND, validation.values_ND)
    assert any(not torch.equal(real.split(0.2, seed)[1].values_ND, validation.values_ND) for seed in range(4))
    assert [len(part) for part in real.split(0.999, 0)] == [1, 9]
    assert [len(part) for part in real.split(0.001, 0)] == [9, 1]
    for share in (0.0, 1.0):
        with pytest.raises(EncoderError, match="cannot be split"):
            real.split(share, 0)
    with pytest.raises(EncoderError, match="1 real gradients cannot be split"):
        validation.split(0.5, 0)[0].split(0.5, 0)


def test_rows_and_energies(real: RealGradients) -> None:
    assert torch.equal(real.rows([3, 0]), real.values_ND[[3, 0]])
    with pytest.raises(IndexError, match="of 10 real gradients"):
        real.rows([10])
    with pytest.raises(IndexError):
        real.rows([-1])
    assert float(real.energy_S(FLAT)) == pytest.approx(float(real.values_ND.double().square().sum(1).mean()))
    with pytest.raises(EncoderError, match="do not fit an adapter of 6944"):
        real.energy_S(SEGMENTS)


def test_the_two_doors_lead_to_one_training(real: RealGradients) -> None:
    """The same numbers give the same network whatever they are called; only the label differs."""
    training, validation = real.split(0.2, 0)
    published = Autoencoder.fit_non_private(FLAT, training, validation, seed=3, options=OPTIONS)
    synthetic = [as_synthetic(part.values_ND, FLAT) for part in (training, validation)]
    private = Autoencoder.fit(FLAT, *synthetic, seed=3, options=OPTIONS)
    left, right = published.state(), private.state()
    assert all(torch.equal(left[key], right[key]) for key in left if key != "trained_on")
    assert published.describe() == private.describe() | {"trained_on": "real", "public": False}
    assert published.name == OPTIONS.name
    restored = Autoencoder.from_state(FLAT, left)
    assert restored.describe()["trained_on"] == "real"
    assert restored.describe()["public"] is False


def test_neither_door_takes_the_other_kind(real: RealGradients) -> None:
    drawn = GaussianPrior.isotropic(FLAT).sample(4, 0)
    for pair in ((real, real), (real, drawn), (drawn, real)):
        with pytest.raises(TypeError, match="SyntheticGradients only"):
            Autoencoder.fit(FLAT, *pair, seed=0)  # type: ignore[arg-type]
    for pair in ((drawn, drawn), (real, drawn), (drawn, real), (real, real.values_ND)):
        with pytest.raises(TypeError, match="RealGradients only"):
            Autoencoder.fit_non_private(FLAT, *pair, seed=0)  # type: ignore[arg-type]
