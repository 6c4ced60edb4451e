"""Comparators from the literature: each sends what its paper says, and nothing else moves.

Legend: N updates, D adapter values, K code values; of a tensor A is the short side, B the long one.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from conftest import tiny_base
from drencoder.encoders.code_sizes import AdapterShape, power_ranks
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.planning import declared, public_text
from drencoder.encoders.registry import build_encoder, declaration_of
from drencoder.encoders.request import EncoderRequest
from drencoder.encoders.wire import WireFormat
from drencoder.errors import EncoderError, ModelError
from drencoder.federated.server_optimizer import ServerState
from drencoder.models.adapter_layout import Segment
from drencoder.models.lora import LoraModel
from drencoder.published.lowrank import LowRankEncoder
from drencoder.published.subset import SubsetEncoder
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.checkpoint import Progress
from drencoder.runs.plan_overview import survey
from drencoder.runs.stage1 import refresh_encoder
from drencoder.study.methods import METHODS
from encoder_contract import some_codes, some_updates
from encoder_toys import LORA, LORA_SIZE, SEGMENTS, lora_tile, noise_updates, recipe_of, tile

MATRICES = ((40, 24), (3, 20), (4, 36))  # of LORA, rank 4


def of(update_ND: Tensor, segment: Segment) -> Tensor:
    """One tensor's values as (N, *shape)."""
    return update_ND[:, segment.start : segment.stop].reshape(-1, *segment.shape)


# --- ffa --------------------------------------------------------------------------------------------------


def test_ffa_sends_every_value_of_b_and_none_of_a() -> None:
    encoder = SubsetEncoder.lora_b(LORA)
    assert encoder.code_size == 4 * (40 + 3 + 4)
    update_ND = some_updates(encoder, 2)
    sent = torch.cat([of(update_ND, segment).flatten(1) for segment in LORA[1::2]], dim=1)
    assert torch.equal(encoder.encode(update_ND, 0), sent)
    for segment in LORA[1::2]:
        of(update_ND, segment).zero_()
    assert not encoder.encode(update_ND, 0).any()
    back_ND = encoder.decode(some_codes(encoder, 2), 0)
    assert not any(of(back_ND, segment).any() for segment in LORA[::2])
    with pytest.raises(EncoderError, match="none of the 5 adapter tensors is the B"):
        SubsetEncoder.lora_b(SEGMENTS)


@pytest.mark.parametrize("name", ["ffa", "core", "power", "top-k", "kronecker", "hybrid"])
def test_runs_send_what_the_plan_says(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tiny_folder, name)
    done = experiment.run(recipe, tmp_path / "run")
    facts, plan = done.certificate["encoder"], survey(recipe)
    assert (facts["name"], facts["code_size"]) == (name, plan.code_size)
    assert done.certificate["bytes"]["uploaded"] % (plan.message_bytes or 0) == 0
    if name in ("core", "top-k", "kronecker", "hybrid"):
        assert "general part of the embedded world" in facts["provenance"]
    assert done.certificate["adapter_start"].startswith("public" if name == "hybrid" else "peft")
    adapter, start = load_file(done.adapter / "adapter_model.safetensors"), build(recipe).lora
    initial = start.layout.unflatten(start.initial_D)
    assert all(not torch.equal(adapter[key], initial[key]) for key in initial if "lora_B" in key)
    frozen = [torch.equal(adapter[key], initial[key]) for key in initial if "lora_A" in key]
    assert all(frozen) if name in ("ffa", "core", "hybrid") else not all(frozen)


# --- top-k ------------------------------------------------------------------------------------------------


def test_the_mask_is_the_largest_mean_squares_of_updates_at_norm_1() -> None:
    segments = tile((2, 3), (4,))
    update_ND = torch.tensor([[0.0, 3, 0, 0, 4, 0, 0, 0, 0, 0], [0, 0, 6, 0, 0, 0, 0, 8, 0, 0]])
    # Of squared shares 0.36 and 0.64 each: place 4 before 7 and 1 before 2; that the second is longer changes nothing.
    for size, index in ((1, [4]), (2, [4, 7]), (3, [1, 4, 7]), (4, [1, 2, 4, 7]), (5, [0, 1, 2, 4, 7])):
        encoder = SubsetEncoder.top(PublicUpdates(update_ND, "two texts"), segments, size)
        assert encoder.index_K.tolist() == index
    assert encoder.describe()["provenance"] == "public: two texts (2 updates)"
    assert encoder.describe()["basis_bytes"] == 4 * 5
    assert "basis_bytes" not in SubsetEncoder.lora_b(LORA).describe()  # every client knows where B is
    loud = update_ND * torch.tensor([[1.0], [1e6]])
    assert SubsetEncoder.top(PublicUpdates(loud, "two texts"), segments, 2).index_K.tolist() == [4, 7]


def test_masks_that_cannot_be_are_refused() -> None:
    public = noise_updates(LORA)
    for size in (0, LORA_SIZE + 1):
        with pytest.raises(EncoderError, match=f"code_size is {size}, expected 1 to {LORA_SIZE}"):
            SubsetEncoder.top(public, LORA, size)
    with pytest.raises(EncoderError, match="compute them for this adapter"):
        SubsetEncoder.top(public, tile((2, 3)), 2)
    for value in (0.0, torch.nan):
        with pytest.raises(EncoderError, match="give finite ones, not all zero"):
            SubsetEncoder.top(PublicUpdates(torch.full((2, LORA_SIZE), value), "no text"), LORA, 2)
    for index in ([], [3, 3], [5, 4], [-1], [LORA_SIZE]):
        with pytest.raises(EncoderError, match="rising int64 places from 0 to"):
            SubsetEncoder(LORA, torch.tensor(index, dtype=torch.int64), "top-k")


# --- core -------------------------------------------------------------------------------------------------


def planted(count: int) -> tuple[PublicUpdates, dict[str, Tensor]]:
    """Updates whose B-gradients have their columns in a known r-dimensional space of each module's outputs."""
    generator = torch.Generator().manual_seed(5)
    update_ND, spaces = torch.zeros(count, LORA_SIZE), {}
    for segment in LORA[1::2]:
        out, rank = segment.shape
        space = torch.linalg.qr(torch.randn(out, min(out, rank), generator=generator)).Q
        core = torch.randn(count, space.shape[1], rank, generator=generator)
        update_ND[:, segment.start : segment.stop] = (space @ core).flatten(1)
        spaces[segment.name] = space
    return PublicUpdates(update_ND, "planted"), spaces


def test_core_sends_r_by_r_values_of_the_leading_left_directions() -> None:
    public, spaces = planted(8)
    encoder = LowRankEncoder.core(public.prior(LORA, 4))
    assert encoder.code_size == 4 * (4 + 3 + 4)
    back_ND = encoder.decode(some_codes(encoder, 3), 0)
    for segment in LORA[::2]:
        assert not of(back_ND, segment).any()
    for segment in LORA[1::2]:
        space, values = spaces[segment.name], of(back_ND, segment)
        assert torch.allclose(space @ (space.T @ values), values, atol=1e-5)
    # New updates of the same spaces are carried whole, others are not: in 40 dimensions a space of 4 holds a tenth.
    whole_ND = planted(3)[0].update_ND
    assert torch.allclose(encoder.decode(encoder.encode(whole_ND, 0), 0), whole_ND, atol=1e-4)
    first = LORA[1]
    other_ND = torch.zeros(50, LORA_SIZE)
    other_ND[:, first.start : first.stop] = torch.randn(50, first.size, generator=torch.Generator().manual_seed(2))
    share = encoder.encode(other_ND, 0).square().sum() / other_ND.square().sum()
    assert 0.05 < float(share) < 0.15


def test_core_fills_up_what_the_prior_does_not_know() -> None:
    public, _ = planted(8)
    public.update_ND[:, LORA[3].start :] = 0.0  # two modules without any gradient
    encoder, again = (LowRankEncoder.core(public.prior(LORA, 2)) for _ in range(2))
    assert encoder.code_size == 4 * (4 + 3 + 4)
    assert encoder.fingerprint == again.fingerprint
    for known_BQ in encoder.known:
        assert torch.allclose(known_BQ.T @ known_BQ, torch.eye(known_BQ.shape[1]), atol=1e-5)
    with pytest.raises(EncoderError, match="no direction of any tensor"):
        LowRankEncoder.core(noise_updates(SEGMENTS).prior(SEGMENTS, 4))


# --- power ------------------------------------------------------------------------------------------------


def test_power_follows_the_momentum_and_looks_around() -> None:
    generator = torch.Generator().manual_seed(1)
    momentum_D = torch.zeros(LORA_SIZE)
    for segment in LORA:
        height, width = segment.shape
        left, right = torch.randn(height, 1, generator=generator), torch.randn(1, width, generator=generator)
        momentum_D[segment.start : segment.stop] = (left @ right).flatten()
    encoder = LowRankEncoder.power(LORA, LORA_SIZE // 4, momentum_D, 0.25)
    assert [known.shape[1] for known in encoder.known] == [1] * 6  # rank one: nothing else is known
    assert min(encoder.fresh) >= 1
    once_ND = encoder.decode(encoder.encode(momentum_D[None], 3), 3)
    assert torch.allclose(once_ND, momentum_D[None], atol=1e-4)
    start = LowRankEncoder.power(LORA, LORA_SIZE // 4, None, 0.25)
    assert start.code_size == encoder.code_size
    assert float((start.decode(start.encode(momentum_D[None], 3), 3) - momentum_D).norm() / momentum_D.norm()) > 0.3
    # Fresh directions: others in every round, so that in the long run everything is seen, at the rate of the rest.
    update_ND = some_updates(encoder, 4)
    shares = [encoder.encode(update_ND, seed).square().sum() / update_ND.square().sum() for seed in range(100)]
    assert float(torch.stack(shares).mean()) == pytest.approx(encoder.code_size / LORA_SIZE, rel=0.1)
    assert float((encoder.encode(update_ND, 0) - encoder.encode(update_ND, 1)).norm()) > 1.0


@pytest.mark.parametrize(("explore", "known"), [(0.0, 5), (0.25, 4), (0.5, 3), (0.99, 0)])
def test_a_share_of_the_directions_is_fresh_and_one_at_least(explore: float, known: int) -> None:
    segments = tile((8, 640))
    momentum_D = torch.randn(5120, generator=torch.Generator().manual_seed(0))
    encoder = LowRankEncoder.power(segments, 50, momentum_D, explore)
    assert (encoder.known[0].shape[1], encoder.fresh[0]) == (known, 6 - known)
    leading = torch.linalg.svd(momentum_D.view(8, 640), full_matrices=False).Vh[:known]
    assert torch.allclose(leading @ encoder.known[0] @ encoder.known[0].T, leading, atol=1e-5)


def test_directions_are_given_in_turns_to_b_first() -> None:
    tensors = [(False, 4, 24), (True, 40, 4), (False, 4, 20), (True, 3, 4)]
    for size, ranks in (
        (4, [0, 1, 0, 0]),
        (6, [0, 1, 0, 0]),
        (7, [0, 1, 0, 1]),
        (14, [1, 1, 0, 1]),
        (15, [1, 1, 1, 1]),
        (22, [1, 2, 1, 2]),
        (10**6, [24, 40, 20, 4]),
    ):
        assert power_ranks(tensors, size) == ranks
        assert power_ranks(tensors[::-1], size) == ranks[::-1]
    with pytest.raises(EncoderError, match=r"code_size is 3, but one direction.*takes 4 values; lower encoder\.ratio"):
        power_ranks(tensors, 3)


def test_momentum_that_is_none_is_refused() -> None:
    for momentum_D in (torch.zeros(3), torch.full((LORA_SIZE,), torch.inf)):
        with pytest.raises(EncoderError, match="no finite vector"):
            LowRankEncoder.power(LORA, 50, momentum_D, 0.25)


def test_power_is_made_anew_from_the_momentum_and_others_stay(tiny_folder: Path) -> None:
    live = build(recipe_of(tiny_folder, "power", "prior.public="))
    state, size = ServerState.start(live.lora.initial_D), live.lora.layout.size
    momentum_D = torch.randn(size, generator=torch.Generator().manual_seed(0))
    now = Progress(ServerState(state.adapter_D, momentum_D, state.second_D, 1))
    first = live.encoder(None)
    assert first.describe()["known_directions"] == 0
    assert refresh_encoder(live, now, first, 1) == (now, first)
    later, encoder = refresh_encoder(live, now, first, 2)
    assert encoder.describe()["known_directions"] > 0
    assert encoder.code_size == first.code_size
    restored = live.encoder(None, dict(later.encoder_state or {}))
    assert restored.describe() == encoder.describe()
    random = build(recipe_of(tiny_folder, "random", "prior.public=embedded"))
    fixed = random.encoder(None)
    assert refresh_encoder(random, now, fixed, 2)[1] is fixed
    assert random.public_updates(state.adapter_D, 2) is None


# --- the registry, the wire, states -----------------------------------------------------------------------


def request_of(name: str, seed: int = 0) -> EncoderRequest:
    public = noise_updates(LORA, seed)
    size = declaration_of(name).code_size(AdapterShape(MATRICES, 4), 6.0)
    return EncoderRequest(LORA, size, public=public, rank=4, history_JD=public.update_ND[:1])


@pytest.mark.parametrize("name", ["ffa", "top-k", "core", "power", "kronecker", "hybrid"])
def test_size_tag_and_state(name: str) -> None:
    request = request_of(name)
    encoder = build_encoder(name, request)
    assert encoder.name == name
    assert encoder.code_size == request.code_size
    again = build_encoder(name, request_of(name, seed=9), load(save(encoder.state())))  # other updates: not looked at
    update_ND, code_NK = some_updates(encoder, 3), some_codes(encoder, 3)
    assert torch.equal(again.encode(update_ND, 4), encoder.encode(update_ND, 4))
    assert torch.equal(again.decode(code_NK, 4), encoder.decode(code_NK, 4))
    assert again.describe() == encoder.describe()
    other = build_encoder(name, request_of(name, seed=9))
    same = WireFormat.of(other).encoder_tag == WireFormat.of(encoder).encoder_tag
    assert same == (name == "ffa")  # a mask or a basis of other updates is another code
    if name in ("ffa", "core"):
        with pytest.raises(EncoderError, match=f"the {name} encoder of this adapter always sends"):
            build_encoder(name, EncoderRequest(LORA, 7, public=request.public))


def test_states_of_others_are_refused() -> None:
    ffa, core = SubsetEncoder.lora_b(LORA).state(), build_encoder("core", request_of("core")).state()
    for name, state in (("ffa", core), ("top-k", core), ("core", ffa), ("power", ffa)):
        with pytest.raises(EncoderError, match=f"saved {name} encoder"):
            build_encoder(name, request_of(name), state)
    with pytest.raises(EncoderError, match="rising int64 places from 0 to 5"):
        SubsetEncoder.from_state(tile((2, 3)), ffa, "ffa")
    with pytest.raises(EncoderError, match="build it for this adapter"):
        LowRankEncoder.from_state(lora_tile(4, (41, 24), (3, 20), (4, 36)), core, "core")
    with pytest.raises(EncoderError, match=r"set prior\.public"):
        build_encoder("top-k", EncoderRequest(LORA, 5))
    with pytest.raises(EncoderError, match=r"set prior\.public"):
        build_encoder("core", EncoderRequest(LORA))


@pytest.mark.parametrize("name", ["kronecker", "hybrid", "top-k", "core"])
def test_encoders_of_public_text_have_the_base_model_write_it_if_none_is_named(name: str) -> None:
    recipe = load_recipe("quickstart", [f"encoder.name={name}"])
    assert declared(recipe).public_text == "required"
    assert (recipe.prior.public, public_text(recipe)) == ("", "self")
    assert public_text(load_recipe("quickstart", [f"encoder.name={name}", "prior.public=embedded"])) == "embedded"


def test_methods_of_public_text_take_the_recipes_or_the_embedded_one() -> None:
    plain = load_recipe(None)
    own = plain.changed({"prior.public": "hub:org/texts", "prior.provenance": "a public collection"})
    for name in ("kronecker", "hybrid", "top-k", "core"):
        made = [METHODS[name].recipe(base, epsilon=2.0, seed=0, rate=1.0) for base in (plain, own)]
        assert [recipe.prior.public for recipe in made] == ["embedded", "hub:org/texts"]
        assert made[1].prior.provenance == "a public collection"
        assert (made[0].encoder.name, made[0].prior.source, made[0].privacy.noise_in) == (name, "none", "code")
    for name in ("ffa-lora", "power", "dp-lora"):
        assert METHODS[name].recipe(plain, epsilon=2.0, seed=0, rate=1.0).prior.public == ""


# --- the orthonormal start --------------------------------------------------------------------------------


def test_an_orthonormal_start_has_orthogonal_rows_of_peft_length_and_span() -> None:
    plain, ours = (
        LoraModel(tiny_base(), config.Adapter(rank=3, start=start), seed=5) for start in ("peft", "orthonormal")
    )
    assert plain.layout == ours.layout
    for before, after in zip(plain.layout.pairs(plain.initial_D), ours.layout.pairs(ours.initial_D), strict=True):
        assert not after.B.any()
        length = float(before.A.norm())
        assert torch.allclose(after.A @ after.A.T, torch.eye(3) * length**2 / 3, atol=1e-5 * length**2)
        assert not torch.allclose(before.A @ before.A.T, torch.eye(3) * length**2 / 3, atol=1e-2 * length**2)
        inside = before.A @ torch.linalg.pinv(after.A) @ after.A
        assert torch.allclose(inside, before.A, atol=1e-5)
    with pytest.raises(ModelError, match=r"25 orthogonal rows of 24 values: lower adapter\.rank to 24"):
        LoraModel(tiny_base(), config.Adapter(rank=25, start="orthonormal"), seed=5)
