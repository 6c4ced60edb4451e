"""The round's algebra, and METHOD's privacy rules: each test fails when its rule is broken."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.planning import check_encoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.errors import CodeError, PrivacyError
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import Query, QuerySpec, gradient_query, moment_query, update_query
from drencoder.federated.round import (
    Upload,
    client_message,
    message_rows,
    message_wire,
    released_update,
    server_release,
)
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.noise_source import ReplayNoise
from drencoder.published.autoencoder import Autoencoder, AutoencoderOptions
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs.plan_overview import privacy_plan

SEGMENTS = (Segment("a", 0, (4, 16)), Segment("b", 64, (16, 4)))
D = 128
NOISE = ReplayNoise(1)


def recipe_of(**overrides: object) -> Recipe:
    settings = {
        "privacy.noise": "replay",
        "privacy.delta": 1e-3,
        "privacy.clip_l2": 0.5,
        "federation.population": 400,
        "federation.sampling_rate": 0.2,
        "federation.rounds": 2,
        **overrides,
    }
    return load_recipe("quickstart", [f"{key}={value}" for key, value in settings.items()])


def ledger_of(folder: Path, recipe: Recipe) -> Ledger:
    return Ledger.create(folder / "ledger.jsonl", privacy_plan(recipe), key=bytes(range(32)))


def encoder_of(name: str) -> Encoder:
    if name == "identity":
        return IdentityEncoder(SEGMENTS)
    if name == "random":
        return RandomSketch.build(SEGMENTS, 32)
    prior = GaussianPrior.isotropic(SEGMENTS)
    options = AutoencoderOptions(steps=2, samples=8, validation=4)
    return Autoencoder.fit(SEGMENTS, prior.sample(8, 0), prior.sample(4, 1), seed=0, options=options)


def updates(count: int, seed: int = 0, norm: float = 3.0) -> torch.Tensor:
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True) * norm


def gather(query: Query, rows: torch.Tensor, cohort: list[int], permit: Permit, step: int = 7) -> list[Upload]:
    return [
        client_message(query, rows[start : start + step], cohort[start : start + step], permit, NOISE)
        for start in range(0, len(rows), step)
    ]


@pytest.mark.parametrize("name", ["identity", "random"])
def test_without_noise_the_release_is_the_sum_of_clipped_codes(tmp_path: Path, name: str) -> None:
    recipe = recipe_of(**{"privacy.trust": "non-private", "encoder.wire_dtype": "float32"})
    encoder, rows = encoder_of(name), updates(20)
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        query = update_query(encoder, recipe, 1)
        outcome = server_release(query, gather(query, rows, list(range(20)), permit), permit, NOISE)
        direction = released_update(query, outcome.release, permit, 80.0)
    seed_free = query.encode(rows)
    clipped = seed_free * (0.5 / seed_free.norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(outcome.release.value, clipped.sum(0), atol=1e-4)
    assert torch.allclose(direction, query.decode(clipped.sum(0)[None])[0] / 80.0, atol=1e-5)


@pytest.mark.parametrize("trust", ["local", "central"])
@pytest.mark.parametrize("noise_in", ["code", "update"])
@pytest.mark.parametrize("name", ["identity", "random", "autoencoder"])
def test_every_combination_runs_or_is_refused_by_the_plan(tmp_path: Path, trust: str, noise_in: str, name: str) -> None:
    overrides = {"privacy.trust": trust, "privacy.noise_in": noise_in, "encoder.name": name}
    if name == "autoencoder" and trust == "central" and noise_in == "code":
        with pytest.raises(config.RecipeError, match="not linear"):
            check_encoder(recipe_of(**overrides))
        return
    recipe, encoder = recipe_of(**overrides), encoder_of(name)
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        cohort = list(permit.cohort)
        query = update_query(encoder, recipe, 1)
        outcome = server_release(query, gather(query, updates(len(cohort)), cohort, permit), permit, NOISE)
        direction = released_update(query, outcome.release, permit, ledger.plan.expected_cohort)
    assert direction.shape == (D,)
    assert direction.isfinite().all()
    assert direction.norm() > 0
    assert outcome.bytes_up == len(cohort) * message_wire(query, permit).message_size
    integers = trust == "local" and noise_in == "code"  # elsewhere codes carry no noise, or were made after it
    assert message_wire(query, permit).dtype == ("integer16" if integers else query.spec.wire.dtype)
    assert outcome.rejected == outcome.nonfinite == 0
    assert (outcome.release.contributors == len(cohort)) if trust == "local" else outcome.release.contributors is None


@pytest.mark.parametrize(("trust", "noise_in"), [("local", "code"), ("central", "code"), ("local", "update")])
def test_noise_has_the_charged_scale_where_it_is_added(tmp_path: Path, trust: str, noise_in: str) -> None:
    """The same uploads with and without noise differ by a Gaussian of exactly the plan's standard deviation."""
    recipe = recipe_of(
        **{
            "privacy.trust": trust,
            "privacy.noise_in": noise_in,
            "privacy.clip_l2": 2.0,
            "encoder.wire_dtype": "float32",
        }
    )
    encoder = encoder_of("identity")
    silent = recipe_of(**{"privacy.trust": "non-private", "privacy.clip_l2": 2.0, "encoder.wire_dtype": "float32"})
    sums: list[torch.Tensor] = []
    cohort: list[int] = []
    for index, chosen in enumerate((recipe, silent)):
        folder = tmp_path / str(index)
        folder.mkdir()
        with ledger_of(folder, chosen) as ledger:
            permit = ledger.charge(1)
            cohort = cohort or list(permit.cohort)
            query = update_query(encoder, chosen, 1)
            outcome = server_release(query, gather(query, updates(len(cohort)), cohort, permit), permit, NOISE)
            sums.append(outcome.release.value)
            if chosen is recipe:
                multiplier, reported = permit.noise_multiplier, outcome.release.noise_std
    expected = multiplier * 2.0 * (math.sqrt(len(cohort)) if trust == "local" else 1.0)
    measured = (sums[0] - sums[1]).std().item()
    assert measured == pytest.approx(expected, rel=0.25)  # 128 values: 3/2 or 2/3 of the scale are 4 deviations away
    if noise_in == "code":
        assert expected < reported < 1.01 * expected  # of the bound of a rounded code, which is a little longer


def test_code_is_clipped_after_encoding_and_again_by_the_server(tmp_path: Path) -> None:
    """A client that sends a code of a thousand times the norm moves the sum by the clip and no more."""
    recipe = recipe_of(**{"privacy.trust": "non-private"})
    encoder = encoder_of("random")
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        query = update_query(encoder, recipe, 1)
        honest = client_message(query, updates(1), [0], permit, NOISE)
        loose = dataclasses.replace(query, spec=dataclasses.replace(query.spec, clip_l2=500.0))
        cheat = client_message(loose, updates(1, seed=1, norm=1e6), [1], permit, NOISE)
        total = server_release(query, [honest, cheat], permit, NOISE).release.value
        alone = query.encode(updates(1))[0]
    moved = (total - alone * (0.5 / alone.norm()).clamp(max=1)).norm().item()
    assert moved <= 0.5 * (1 + 1e-3)
    assert moved > 0.49


def test_weights_are_equal_whatever_a_client_holds_and_the_denominator_is_fixed(tmp_path: Path) -> None:
    recipe = recipe_of(**{"privacy.trust": "non-private", "encoder.wire_dtype": "float32"})
    encoder, rows = encoder_of("identity"), updates(4)
    with ledger_of(tmp_path, recipe) as ledger:
        query = update_query(encoder, recipe, 1)
        permit = ledger.charge(1)
        few = released_update(
            query,
            server_release(query, gather(query, rows[:2], [0, 1], permit), permit, NOISE).release,
            permit,
            ledger.plan.expected_cohort,
        )
        permit = ledger.charge(2)
        query = update_query(encoder, recipe, 2)
        all_four = released_update(
            query,
            server_release(query, gather(query, rows, [0, 1, 2, 3], permit), permit, NOISE).release,
            permit,
            ledger.plan.expected_cohort,
        )
    unit = rows / rows.norm(dim=1, keepdim=True) * 0.5
    assert torch.allclose(few, unit[:2].sum(0) / 80, atol=1e-6)
    assert torch.allclose(all_four, unit.sum(0) / 80, atol=1e-6)


def test_broken_updates_and_messages_are_counted_and_change_nothing_else(tmp_path: Path) -> None:
    recipe = recipe_of(**{"privacy.trust": "central"})
    rows = updates(6)
    rows[2, 5] = math.nan
    rows[4] = math.inf
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        query = update_query(encoder_of("random"), recipe, 1)
        upload = client_message(query, rows, list(range(6)), permit, NOISE)
        good = upload.messages[0]
        messages = [good, good[:-1], good + b"\0", b"", b"\xff" * len(good), upload.messages[1]]
        outcome = server_release(query, [Upload(tuple(range(6)), messages, upload.nonfinite)], permit, NOISE)
    assert outcome.nonfinite == 2
    assert outcome.rejected == 4
    assert outcome.release.value.isfinite().all()


def test_under_local_trust_the_server_learns_no_count_of_broken_updates(tmp_path: Path) -> None:
    recipe = recipe_of()
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        cohort = list(permit.cohort)[:3]
        rows = updates(3)
        rows[1] = math.nan
        upload = client_message(update_query(encoder_of("random"), recipe, 1), rows, cohort, permit, NOISE)
    assert upload.nonfinite == 0
    assert len({len(message) for message in upload.messages}) == 1


@pytest.mark.parametrize(("name", "dtype", "noise_in", "hidden"), [
    ("random", "float32", "code", True), ("random", "rotated4", "code", False), ("autoencoder", "float32", "code", False),
    ("random", "float32", "update", False),
])  # fmt: skip
def test_public_hides_among_others_only_where_codes_are_summed_as_they_are(
    name: str, dtype: str, noise_in: str, hidden: bool
) -> None:
    knobs = {"encoder.name": name, "encoder.wire_dtype": dtype, "privacy.noise_in": noise_in}
    recipe = recipe_of(**knobs, **{"privacy.noise": "secure"})
    epsilons = privacy_plan(recipe).epsilons()
    public, server = epsilons["public"].epsilon_pld, epsilons["server"].epsilon_pld
    assert (public < 0.5 * server) if hidden else (public == server)


def test_a_client_outside_the_cohort_or_a_second_time_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(1)
        cohort = list(permit.cohort)
        query = update_query(encoder_of("random"), recipe, 1)
        client_message(query, updates(1), cohort[:1], permit, NOISE)
        with pytest.raises(PrivacyError, match="second time"):
            client_message(query, updates(1), cohort[:1], permit, NOISE)
        stranger = next(client for client in range(400) if client not in cohort)
        with pytest.raises(PrivacyError, match="not in the cohort"):
            client_message(query, updates(1), [stranger], permit, NOISE)


@pytest.mark.parametrize("trust", ["local", "central"])
def test_moments_are_noised_and_bounded_like_any_query(tmp_path: Path, trust: str) -> None:
    recipe = recipe_of(**{"privacy.trust": trust, "privacy.clip_l2": 1.0})
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(0)
        cohort = list(permit.cohort)
        query = moment_query(SEGMENTS, recipe)
        same = updates(1).expand(len(cohort), D)
        uploads = gather(query, same, cohort, permit)
        outcome = server_release(query, uploads, permit, NOISE)
    exact = query.encode(same[:1])[0]
    exact = exact / exact.norm()
    error = outcome.release.value / len(cohort) - exact
    scale = permit.noise_multiplier / (math.sqrt(len(cohort)) if trust == "local" else len(cohort))
    assert 0.4 * scale < error.abs().max() < 5 * scale  # noise is there, and of the right size
    assert outcome.release.noise_std > 0


def test_a_client_with_nothing_to_say_contributes_zero_even_to_a_network() -> None:
    # Add/remove adjacency compares with the vector zero; an auto-encoder's code of a zero update is another vector.
    network, recipe = encoder_of("autoencoder"), recipe_of(**{"encoder.name": "autoencoder"})
    nothing, rows = torch.zeros(1, D), updates(3)
    assert network.encode(nothing, 0).norm() > 1e-3
    query = update_query(network, recipe, 1)
    assert not query.encode(nothing).any()
    # The server adds the constant back: decoding is as ever.
    assert torch.allclose(query.decode(query.encode(rows)), network.decode(network.encode(rows, 0), 0), atol=1e-6)
    published = update_query(network, recipe_of(**{"encoder.name": "autoencoder", "privacy.noise_in": "update"}), 1)
    assert torch.equal(published.encode(rows), torch.cat([network.encode(row[None], 0) for row in rows]))


@pytest.mark.parametrize("trust", ["local", "central", "non-private"])
def test_single_messages_are_shown_to_a_non_private_stage_only(tmp_path: Path, trust: str) -> None:
    fedcg = {"prior.source": "gradients", "encoder.name": "autoencoder", "privacy.noise_in": "update"}
    recipe = recipe_of(**{"privacy.trust": trust, **fedcg})
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(0)
        cohort = list(permit.cohort)
        query = gradient_query(D, 1)
        sent = updates(len(cohort), norm=1e3)
        rows, count = message_rows(query, gather(query, sent, cohort, permit), permit)
        assert torch.equal(rows, sent)  # as they are: neither clipped nor noised
        assert count == len(cohort) * (20 + 4 * D)
        if trust == "non-private":
            return
        permit = ledger.charge(1)
        query = update_query(encoder_of("identity"), recipe, 1)
        with pytest.raises(PrivacyError, match="Slot 1 is private"):
            message_rows(query, [], permit)


def test_statistics_of_several_epochs_are_one_clipped_vector(tmp_path: Path) -> None:
    recipe = recipe_of(
        **{"privacy.trust": "non-private", "local.upload": "increment", "local.epochs": 3, "privacy.clip_l2": 0.25}
    )
    query = moment_query(SEGMENTS, recipe)
    assert (query.spec.epochs, query.spec.wire.code_size) == (3, 3 * 2 * len(SEGMENTS))
    path = torch.cat([updates(5, seed=seed) for seed in range(3)], dim=1)
    with ledger_of(tmp_path, recipe) as ledger:
        permit = ledger.charge(0)
        outcome = server_release(query, gather(query, path, list(range(5)), permit), permit, NOISE)
    assert outcome.release.value.norm() <= 5 * 0.25 * (1 + 1e-6)
    single = query.encode(path[:1])[0]
    once = moment_query(SEGMENTS, recipe_of()).encode(path[:1, D : 2 * D])[0]
    assert torch.equal(single.reshape(3, -1)[1], once)


def test_sketches_are_fresh_in_every_round_and_the_same_for_client_and_server() -> None:
    recipe, encoder, rows = recipe_of(), encoder_of("random"), updates(2)
    first, again, second = (update_query(encoder, recipe, slot).encode(rows) for slot in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("clip", [None, AdaptiveClip(0.4, 0.5, 0.3)])
def test_a_spec_survives_the_journey_as_json(clip: AdaptiveClip | None) -> None:
    recipe = recipe_of()
    for query in (
        moment_query(SEGMENTS, recipe),
        gradient_query(D, 1),
        update_query(encoder_of("random"), recipe, 2, clip),
    ):
        facts = json.loads(json.dumps(query.spec.to_dict()))
        assert QuerySpec.from_dict(facts) == query.spec
        assert query.spec.has_possible_clip
        for change in ({"kind": "other"}, {"slot": -1}, {"slot": True}, {"clip_l2": "1"}, {"wire": {}}, {"more": 1}):
            with pytest.raises(CodeError, match="spec"):
                QuerySpec.from_dict(facts | change)
        with pytest.raises(CodeError, match="spec"):
            QuerySpec.from_dict([])
        assert not QuerySpec.from_dict(facts | {"clip_l2": 0.0}).has_possible_clip


def test_specs_agree_up_to_the_rounding_of_a_clip_and_no_further() -> None:
    recipe, encoder = recipe_of(), encoder_of("random")
    spec = update_query(encoder, recipe, 1, AdaptiveClip(0.4, 0.5, 0.3)).spec
    rounded = update_query(encoder, recipe, 1, AdaptiveClip(0.4 * (1 + 1e-9), 0.5, 0.3)).spec
    assert spec.same_clip(rounded)
    assert spec.same_but_for_clip(rounded)
    assert not spec.same_clip(update_query(encoder, recipe, 1, AdaptiveClip(0.41, 0.5, 0.3)).spec)
    assert not spec.same_but_for_clip(update_query(encoder, recipe, 2, AdaptiveClip(0.4, 0.5, 0.3)).spec)
    assert not spec.same_but_for_clip(update_query(encoder_of("identity"), recipe, 1).spec)
