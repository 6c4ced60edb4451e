"""The registry: every encoder is what its row declares, a new one takes one row, and no recipe with a wrong one is planned.

Legend: D adapter values, K code values, J directions.
"""

import json
from pathlib import Path

import pytest
import torch
from first_values import FirstValues
from typer.testing import CliRunner

from conftest import tiny_overrides
from drencoder.cli.main import app
from drencoder.encoders import registry
from drencoder.encoders.code_sizes import AdapterShape
from drencoder.encoders.contract import Encoder, is_lora_b
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.planning import clip_text, public_text
from drencoder.encoders.registry import ENCODERS, EncoderDeclaration, EncoderRow, build_encoder, declaration_of
from drencoder.encoders.request import EncoderRequest
from drencoder.encoders.viability import measure_viability
from drencoder.errors import EncoderError, RecipeError
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.plan_overview import survey
from encoder_contract import CONTRACT, Check, check_linear_flag
from encoder_toys import lora_tile

RANK, MATRICES = 4, ((64, 48), (32, 64), (48, 64))
SEGMENTS = lora_tile(RANK, *MATRICES)
ADAPTER = AdapterShape(MATRICES, RANK)
SIZE = ADAPTER.update_size
EVERY_NAME = pytest.mark.parametrize("name", ENCODERS)
ONLY_LORA_B = ("hybrid", "ffa", "core")


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def made(name: str, *, public_seed: int | None = 0, history_seed: int = 1) -> Encoder:
    """The encoder of this adapter, of the size that it declares, from these public updates and released directions."""
    size = declaration_of(name).code_size(ADAPTER, 6.0)
    public = None if public_seed is None else PublicUpdates(normal(6, public_seed), "noise")
    prior = GaussianPrior.isotropic(SEGMENTS)
    history_JD = normal(1, history_seed)
    request = EncoderRequest(SEGMENTS, size, prior, public=public, rank=4, history_JD=history_JD)
    return build_encoder(name, request)


# --- what a row declares ------------------------------------------------------------------------------


@EVERY_NAME
def test_every_encoder_has_the_code_size_and_the_linearity_that_it_declares(name: str) -> None:
    encoder, declared = made(name), declaration_of(name)
    assert encoder.code_size == declared.code_size(ADAPTER, 6.0)
    assert encoder.linear == declared.linear
    check_linear_flag(encoder)
    by_ratio = declared.code_size(ADAPTER, 6.0) != declared.code_size(ADAPTER, 24.0)
    assert by_ratio == declared.sized_by_ratio


@EVERY_NAME
def test_every_encoder_needs_the_public_text_that_it_declares(name: str) -> None:
    if declaration_of(name).public_text == "required":
        with pytest.raises(EncoderError, match=r"set prior\.public"):
            made(name, public_seed=None)
        return
    encoder, other = made(name, public_seed=None), made(name, public_seed=7)
    same = torch.equal(encoder.encode(normal(2, 3), 5), other.encode(normal(2, 3), 5))
    assert same == (declaration_of(name).public_text == "unused")


@EVERY_NAME
def test_exactly_those_that_learn_during_a_run_are_refreshed(name: str) -> None:
    declared, update_ND = declaration_of(name), normal(2, 3)
    first, later = made(name), made(name, public_seed=7, history_seed=8)
    changes = not torch.equal(first.encode(update_ND, 5), later.encode(update_ND, 5))
    # The auto-encoder is another one for other text as well, but making it anew in a run would train it again.
    assert changes == (declared.refreshed or declared.trained)
    if declared.refreshed:  # so that a code of the old map is not taken for one of the new
        assert first.describe()["fingerprint"] != later.describe()["fingerprint"]


@EVERY_NAME
def test_a_code_is_about_the_tensors_that_are_declared(name: str) -> None:
    encoder = made(name)
    is_b_D = torch.cat([torch.full((segment.size,), is_lora_b(segment)) for segment in SEGMENTS])
    code_NK = torch.randn(3, encoder.code_size, generator=torch.Generator().manual_seed(2))
    about_a = bool(encoder.decode(code_NK, 5)[:, ~is_b_D].abs().max() > 1e-5)
    assert (name in ONLY_LORA_B) == (not about_a) or name == "power"  # whose few directions may all be of B
    assert bool(encoder.encode(normal(3, 4) * ~is_b_D, 5).abs().max() > 1e-5) == about_a


@EVERY_NAME
def test_the_gate_agrees_with_what_is_expected_of_an_encoder(name: str) -> None:
    """On updates without any structure. Two steps of training make no working network."""
    viable = measure_viability(made(name), normal(64, 5), 0).viable
    assert viable == declaration_of(name).expected_viable


def test_a_row_that_says_something_else_than_its_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ENCODERS["random"]
    for name, declaration, words in (
        ("sketch", EncoderDeclaration(), "came out as 'random'"),
        ("random", EncoderDeclaration(linear=False), "declares linear = False, on which the privacy plan rests"),
    ):
        monkeypatch.setattr(registry, "ENCODERS", {name: EncoderRow(row.maker, declaration)})
        with pytest.raises(EncoderError, match=words):
            build_encoder(name, EncoderRequest(SEGMENTS, 10))
    monkeypatch.setattr(
        registry,
        "ENCODERS",
        {"identity": EncoderRow("drencoder.encoders.random_sketch:make_random", EncoderDeclaration())},
    )
    with pytest.raises(EncoderError):
        build_encoder("identity", EncoderRequest(SEGMENTS, 10))


def test_a_saved_encoder_of_another_size_than_planned_is_refused() -> None:
    saved = made("top-k").state()
    with pytest.raises(EncoderError, match="code values where 3 were planned"):
        build_encoder("top-k", EncoderRequest(SEGMENTS, 3), saved)


# --- a new encoder ------------------------------------------------------------------------------------


@pytest.fixture
def first_values(monkeypatch: pytest.MonkeyPatch) -> str:
    """One more row, which is all that a new encoder needs beside its file."""
    row = EncoderRow("first_values:make_first_values", EncoderDeclaration())
    monkeypatch.setattr(registry, "ENCODERS", {**ENCODERS, "first-values": row})
    return "first-values"


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_holds_for_a_new_encoder(first_values: str, check: Check) -> None:
    check(made(first_values))


def test_a_new_encoder_plans_and_runs(first_values: str, tiny_folder: Path, tmp_path: Path) -> None:
    overrides = [
        *tiny_overrides(tiny_folder),
        f"encoder.name={first_values}",
        "encoder.gate=warn",
        "federation.rounds=2",
    ]
    recipe = load_recipe("quickstart", overrides)
    overview = survey(recipe)
    assert overview.code_size == round((overview.adapter_size or 0) / 4)
    result = experiment.run(recipe, tmp_path / "run")
    assert result.certificate["encoder"]["name"] == first_values
    assert result.certificate["encoder"]["code_size"] == overview.code_size
    assert result.certificate["observers"]["server"]["epsilon_pld"] <= recipe.privacy.epsilon
    assert result.certificate["rounds"] == 2
    assert isinstance(made(first_values), FirstValues)


def test_the_knobs_list_every_row(first_values: str) -> None:
    output = " ".join(CliRunner().invoke(app, ["knobs"]).output.split())
    assert all(name in output for name in (*ENCODERS, first_values))


# --- recipes ------------------------------------------------------------------------------------------


def test_a_wrong_name_is_one_sentence_with_the_known_names() -> None:
    recipe = load_recipe("quickstart", ["encoder.name=hybird"])
    with pytest.raises(RecipeError) as caught:
        survey(recipe)
    assert "there is no encoder 'hybird': did you mean 'hybrid'? choose one of identity, random" in str(caught.value)
    assert all(name in str(caught.value) for name in ENCODERS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["plan", "run", "compare", "audit"])
def test_every_command_refuses_a_wrong_name_before_anything_else(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, "--set", "encoder.name=zip"])
    assert result.exit_code != 0
    assert "there is no encoder 'zip'" in f"{result.output} {result.exception}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoder.name=autoencoder", "privacy.trust=central"], "'autoencoder' is not linear, so a sum of its codes"),
        (["encoder.name=autoencoder", "prior.source=none"], "synthetic gradients and prior.source = 'none' gives none"),
        (["encoder.name=random", "prior.source=gradients"], "set encoder.name = 'autoencoder', or prior.source"),
        (["encoder.name=autoencoder", "privacy.clip=adaptive"], "'adaptive' needs codes that can be summed"),
        (["encoder.name=autoencoder", "privacy.trust=secure-aggregation"], "set encoder.name = 'random'"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_in_one_sentence(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        survey(load_recipe("quickstart", overrides))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_encoder_works_with_any_model() -> None:
    """No recipe needs to name public text: the base model writes it."""
    assert (Recipe().encoder.name, Recipe().encoder.ratio, public_text(Recipe())) == ("hybrid", 0.0, "self")
    assert public_text(Recipe().changed({"prior.public": "embedded"})) == "embedded"
    # A clip that no recipe names is measured on public text, which makes no encoder of it.
    assert clip_text(Recipe()) == "self"
    assert clip_text(Recipe().changed({"privacy.clip_l2": 1.0})) == ""
    # The published prior, unless public text is asked for.
    assert public_text(Recipe().changed({"encoder.name": "autoencoder"})) == ""


def test_a_plan_says_so_if_the_gate_is_expected_to_refuse() -> None:
    said = ["encoder.name=autoencoder", "privacy.trust=local"]
    refusing, warned = (
        survey(load_recipe("quickstart", [*said, f"encoder.gate={gate}"])) for gate in ("refuse", "warn")
    )
    assert any("set encoder.gate = 'warn'" in sentence for sentence in refusing.warnings())
    assert not any("encoder.gate" in sentence for sentence in warned.warnings())
    assert json.loads(json.dumps(refusing.to_dict()))["code_size"] == refusing.code_size
