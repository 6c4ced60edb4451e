"""The published encoder: its networks, their training, normalisation, and what is saved.

Legend: N updates, D adapter values, S segments.
"""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drencoder.encoders.code_sizes import code_shape, image_shape, input_shape
from drencoder.encoders.gaussian_prior import GaussianPrior, SyntheticGradients
from drencoder.encoders.viability import measure_viability
from drencoder.errors import EncoderError
from drencoder.published.architectures import ARCHITECTURES, fresh_network
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions
from drencoder.published.fitting import Frame
from encoder_contract import some_updates
from encoder_toys import FLAT, SEGMENTS, SIZE, as_synthetic, levels, tile

ALL = tuple(ARCHITECTURES)


@cache
def trained(name: str = "autoencoder") -> Autoencoder:
    drawn = GaussianPrior.isotropic(SEGMENTS)
    options = AutoencoderOptions(steps=4, batch=4, check_every=2, name=name)
    return Autoencoder.fit(SEGMENTS, drawn.sample(8, 1), drawn.sample(4, 2), seed=0, options=options)


# --- networks ---------------------------------------------------------------------------------------------


def test_published_geometry_and_size() -> None:
    assert image_shape(8_388_608) == (4096, 2048)
    assert image_shape(32_768) == (256, 128)
    assert image_shape(1) == (64, 64)
    network = trained().network
    # CG-FedLLM, Table 3: 0.94 MB for each half.
    for half in (network.encoder, network.decoder):
        assert sum(p.numel() for p in half.parameters()) * 4 / 2**20 == pytest.approx(0.94, abs=0.005)
    assert trained().code_shape == (64, 2, 1)


@pytest.mark.parametrize(
    ("name", "shape", "code", "share"),
    [
        ("autoencoder", (1, 4096, 2048), (64, 64, 32), 64),
        ("autoencoder-unet", (1, 4096, 2048), (64, 64, 32), 64),
        ("autoencoder-cnn1d", (1, 8_388_608), (8, 32_768), 32),
    ],
)
def test_llama_7b_fits_without_padding(name: str, shape: tuple[int, ...], code: tuple[int, ...], share: int) -> None:
    assert input_shape(name, 8_388_608) == shape
    assert code_shape(name, 8_388_608) == code
    assert math.prod(shape) == 8_388_608 == share * math.prod(code)


@given(size=st.integers(1, 10**8))
def test_image_holds_the_update_with_little_padding(size: int) -> None:
    height, width = image_shape(size)
    assert height % 64 == width % 64 == 0
    assert size <= height * width < size + 4096 + 64 * max(height, width)
    assert width <= height <= 4 * width + 64
    _, length = input_shape("autoencoder-cnn1d", size)
    assert length % 256 == 0
    assert size <= length < size + 256


@pytest.mark.parametrize("name", ALL)
def test_only_the_code_crosses_the_wire(name: str) -> None:
    """The halves share no tensor and no feature: the decoder alone, fed a code, gives a whole update within Tanh's range."""
    network = fresh_network(name, torch.Generator().manual_seed(0)).eval()
    code = torch.randn(2, *code_shape(name, 5000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = network.decoder(100.0 * code)
        assert network.encoder(answer).shape == code.shape
    assert answer.shape == (2, *input_shape(name, 5000))
    assert float(answer.abs().max()) <= 1.0
    halves = [{id(parameter) for parameter in half.parameters()} for half in (network.encoder, network.decoder)]
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("name", ALL)
def test_fresh_networks_answer_close_to_zero_and_are_alive(name: str) -> None:
    """Kaiming's start alone answers with noise of Tanh's whole range; then most of training is unlearning it."""
    network = fresh_network(name, torch.Generator().manual_seed(3))
    values = 0.25 * torch.randn(4, *input_shape(name, 4096), generator=torch.Generator().manual_seed(4))
    answer = network(values)
    assert answer.square().mean().item() < 0.1
    answer.square().sum().backward()
    dead = [key for key, parameter in network.named_parameters() if not parameter.grad.any()]
    # Residual blocks start as the identity: what is inside them moves from the second step on.
    assert all(".inner." in key for key in dead), dead


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_training_is_deterministic_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first = trained(name).state()
    trained.cache_clear()
    second = trained(name).state()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_early_stopping_keeps_the_best_weights() -> None:
    drawn = GaussianPrior.isotropic(FLAT)
    looks: list[float] = []
    options = AutoencoderOptions(
        steps=40, batch=4, check_every=2, patience=2, learning_rate=0.1, name="autoencoder-cnn1d"
    )
    encoder = Autoencoder.fit(
        FLAT,
        drawn.sample(8, 1),
        drawn.sample(4, 2),
        seed=0,
        options=options,
        on_step=lambda step, loss, checked: looks.append(checked) if checked is not None else None,
    )
    assert len(looks) < 20, "the learning rate is absurd; it should have stopped early"
    assert min(looks) < looks[-1]
    validation_ND = drawn.sample(4, 2).values_ND
    error_ND = encoder.decode(encoder.encode(validation_ND, 0), 0) - validation_ND
    scale = float(encoder.scale_S[0])
    assert float(error_ND.square().mean()) / scale**2 == pytest.approx(min(looks), rel=1e-3)


def test_training_draws_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager rows would take 32 MiB each for LLaMA-7B; nothing may ask for all of them."""
    asked: list[int] = []
    plain = SyntheticGradients.rows
    monkeypatch.setattr(SyntheticGradients, "rows", lambda self, rows: (asked.append(len(rows)), plain(self, rows))[1])
    drawn = GaussianPrior.isotropic(FLAT)
    options = AutoencoderOptions(steps=4, batch=2, check_every=2, name="autoencoder-cnn1d")
    Autoencoder.fit(FLAT, drawn.sample(50, 1), drawn.sample(5, 2), seed=0, options=options)
    assert max(asked) == 2
    assert len(asked) == 4 + 3 * 3  # training steps; two looks and the count of saturated values


@pytest.mark.parametrize(
    ("name", "seed", "steps", "batch"),
    [("autoencoder", 1, 45, 16), ("autoencoder-cnn1d", 0, 30, 16), ("autoencoder-unet", 0, 40, 8)],
)
def test_each_architecture_learns_levels_and_an_untrained_one_does_not(
    name: str, seed: int, steps: int, batch: int
) -> None:
    options = AutoencoderOptions(steps=steps, batch=batch, learning_rate=4e-3, check_every=10, name=name)
    rows = as_synthetic(levels(64, 1), FLAT), as_synthetic(levels(16, 2), FLAT)
    learned = Autoencoder.fit(FLAT, *rows, seed=seed, options=options)
    result = measure_viability(learned, levels(32, 3), 0)
    assert result.viable, result.sentence
    assert result.captured_energy > 0.6

    untrained = fresh_network(name, torch.Generator().manual_seed(seed))
    result = measure_viability(Autoencoder(FLAT, untrained, learned.scale_S, name), levels(32, 3), 0)
    assert not result.viable
    assert result.captured_energy < 0.3


def test_there_is_nothing_to_learn_in_the_published_prior() -> None:
    """METHOD 2.1: i.i.d. values keep K / D of their energy at best, and training on them finds less."""
    drawn = GaussianPrior.isotropic(FLAT)
    options = AutoencoderOptions(steps=30, batch=8, learning_rate=2e-3, name="autoencoder-cnn1d")
    encoder = Autoencoder.fit(FLAT, drawn.sample(64, 1), drawn.sample(16, 2), seed=0, options=options)
    result = measure_viability(encoder, drawn.sample(32, 4).values_ND, 0)
    assert not result.viable
    assert result.captured_energy < 1 / 32


def test_fit_takes_synthetic_gradients_only() -> None:
    drawn = GaussianPrior.isotropic(FLAT).sample(4, 0)
    for arguments in ((drawn.values_ND, drawn), (drawn, drawn.values_ND)):
        with pytest.raises(TypeError, match="SyntheticGradients only"):
            Autoencoder.fit(FLAT, *arguments, seed=0)  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match="4 gradients of 4096 values do not fit an adapter of 6944"):
        Autoencoder.fit(SEGMENTS, drawn, drawn, seed=0)
    with pytest.raises(EncoderError, match="0 gradients of 4096 values do not fit"):
        Autoencoder.fit(FLAT, drawn, GaussianPrior.isotropic(FLAT).sample(0, 0), seed=0)
    nothing = as_synthetic(torch.zeros(4, 4096), FLAT)
    with pytest.raises(EncoderError, match=r"root mean square is 0\.0; run stage 1 again"):
        Autoencoder.fit(FLAT, nothing, nothing, seed=0)
    endless = as_synthetic(torch.full((4, 4096), torch.inf), FLAT)
    with pytest.raises(EncoderError, match="root mean square is inf"):
        Autoencoder.fit(FLAT, endless, endless, seed=0)


def test_a_loss_that_blows_up_is_one_sentence() -> None:
    drawn = GaussianPrior.isotropic(FLAT).sample(8, 0)
    broken = as_synthetic(torch.full((2, 4096), torch.nan), FLAT)
    options = AutoencoderOptions(steps=1, batch=2, name="autoencoder-cnn1d")
    with pytest.raises(EncoderError, match=r"at step 1; lower its learning_rate, now 0\.0002"):
        Autoencoder.fit(FLAT, drawn, broken, seed=0, options=options)


# --- normalisation ----------------------------------------------------------------------------------------

PAIR = tile((32, 64), (64, 32))


def two_levels(count: int, seed: int) -> Tensor:
    """Two tensors with a random level each, the second's a hundred times smaller and independent of the first's."""
    generator = torch.Generator().manual_seed(seed)
    level_N2 = 2.0 * torch.rand(count, 2, generator=generator) - 1.0
    return (level_N2 * torch.tensor([1.0, 0.01])).repeat_interleave(2048, dim=1)


def fitted(name: str) -> Autoencoder:
    rows = as_synthetic(two_levels(64, 1), PAIR), as_synthetic(two_levels(16, 2), PAIR)
    options = AutoencoderOptions(steps=1, batch=16, name=name)
    return Autoencoder.fit(PAIR, *rows, seed=0, options=options)


def test_scales_are_those_of_the_training_gradients_or_none() -> None:
    both = 4.0 * two_levels(64, 1).double().square().mean().sqrt()
    for name in ("autoencoder", "autoencoder-cnn1d", "autoencoder-unet"):
        assert torch.allclose(fitted(name).scale_S, both.expand(2))
    assert fitted("autoencoder-published").scale_S.tolist() == [1.0, 1.0]


def test_values_beyond_tanh_are_cut_off_and_counted() -> None:
    prior = GaussianPrior(PAIR, torch.zeros(2), torch.tensor([0.5, 0.01]))
    # As published: values of the first half beyond 1 are beyond 2 sigma. Scaled: half of the values carry all the energy, so 4 root
    # mean squares are 2.83 sigma of theirs.
    for name, share in (("autoencoder-published", 0.04550 / 2), ("autoencoder", 0.004678 / 2)):
        options = AutoencoderOptions(steps=1, batch=2, name=name)
        encoder = Autoencoder.fit(PAIR, prior.sample(4, 1), prior.sample(32, 2), seed=0, options=options)
        back_ND = encoder.decode(torch.full((1, encoder.code_size), 1e4), 0)
        assert (back_ND[0, :2048].abs() <= encoder.scale_S[0] * (1 + 1e-6)).all()
        assert (back_ND[0, 2048:].abs() <= encoder.scale_S[1] * (1 + 1e-6)).all()
        measured = float(encoder.describe()["saturated_share"])
        assert abs(measured - share) < 6 * math.sqrt(share / (32 * 4096)), name


def test_frames_are_undone_exactly() -> None:
    shape = (1, 128, 64)
    frame = Frame(SEGMENTS, [0.5, 2.0, 4.0, 8.0, 0.25], shape)
    update_ND = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    framed = frame.wrap(update_ND)
    assert framed.shape == (2, *shape)
    assert torch.equal(framed.flatten(1)[:, :5120], update_ND[:, :5120] / 0.5)
    assert not framed.flatten(1)[:, SIZE:].any()
    back_ND = torch.empty_like(update_ND)
    frame.unwrap(framed, back_ND)
    assert torch.equal(back_ND, update_ND)


# --- state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_state_round_trip(name: str) -> None:
    encoder = trained(name)
    state = encoder.state()
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    again = Autoencoder.from_state(SEGMENTS, state)
    update_ND = some_updates(encoder, 3)
    assert torch.equal(encoder.encode(update_ND, 0), again.encode(update_ND, 0))
    assert torch.equal(encoder.decode(encoder.encode(update_ND, 0), 0), again.decode(again.encode(update_ND, 0), 0))
    assert again.describe() == encoder.describe()
    assert again.describe()["name"] == name
    assert again.describe()["scale_min"] == float(encoder.scale_S.min())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", None),
        ("name", torch.tensor(list(b"os.system"), dtype=torch.uint8)),
        ("name", torch.tensor(list(b"autoencoder-unet"), dtype=torch.uint8)),
        ("name", torch.tensor([255, 255], dtype=torch.uint8)),
        ("name", torch.tensor([1.5])),
        ("trained_on", torch.tensor(list(b"nobody"), dtype=torch.uint8)),
        ("scale_S", torch.tensor([1.0])),
        ("scale_S", torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])),
        ("saturated_share", torch.zeros(2)),
        ("encoder.0.weight", None),
        ("decoder.0.weight", torch.zeros(1)),
    ],
)
def test_broken_states_are_one_sentence(key: str, value: Tensor | None) -> None:
    state = {name: tensor for name, tensor in trained().state().items() if name != key}
    if value is not None:
        state[key] = value
    with pytest.raises(EncoderError):
        Autoencoder.from_state(SEGMENTS, state)
