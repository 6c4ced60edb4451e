"""A recipe is checked at birth; what cannot be meant is one sentence with the value, the bound and the cure."""

import tomllib
from pathlib import Path

import pytest

from drencoder.errors import RecipeError
from drencoder.recipe.recipe import Recipe, describe_knobs, load_recipe, shipped_recipes


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert "quickstart" in shipped_recipes()
    for name in shipped_recipes():
        recipe = load_recipe(name)
        path = tmp_path / f"{name.replace('/', '-')}.toml"
        path.write_text(recipe.to_toml())
        assert load_recipe(path) == recipe


def test_no_recipe_is_the_quickstart() -> None:
    assert load_recipe() == load_recipe("quickstart")
    assert load_recipe(None, ["seed=3"]) == load_recipe("quickstart", ["seed=3"])
    assert load_recipe(None, ["data.source=embedded:next"]) == load_recipe("quickstart", ["data.source=embedded:next"])


def test_no_recipe_but_a_model_or_data_of_ones_own_is_the_defaults(tmp_path: Path) -> None:
    """The quickstart's rate and clip were tuned for the embedded model: with another one they teach nothing."""
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    for own in (
        ["model.source=mine"],
        ["data.source=notes.jsonl", "privacy.epsilon=4"],
        ["data.source=embedded-notes.jsonl"],
    ):
        assert load_recipe(None, own) == load_recipe(empty, own)
        assert load_recipe(None, own).server != load_recipe("quickstart").server
    with pytest.raises(RecipeError, match="did you mean 'epsilon'"):
        load_recipe(None, ["model.source=mine", "privacy.epsilo=2"])


def test_overrides_are_toml_values_or_bare_words() -> None:
    recipe = load_recipe(
        "quickstart",
        ["privacy.epsilon=2", "privacy.trust=central", 'adapter.targets=["q_proj"]', "seed=7", "adapter.alpha = 3"],
    )
    assert (recipe.privacy.epsilon, recipe.privacy.trust, recipe.seed, recipe.adapter.alpha) == (2.0, "central", 7, 3.0)
    assert recipe.adapter.targets == ("q_proj",)


def test_a_knob_can_be_a_table() -> None:
    recipe = load_recipe("quickstart", ['data.fields={response = "body", instruction = "title"}'])
    assert recipe.data.fields == (("instruction", "title"), ("response", "body"))
    assert recipe.to_dict()["data"]["fields"] == {"instruction": "title", "response": "body"}
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.from_dict(tomllib.loads(Recipe().to_toml())).data.fields == ()
    assert recipe.changed({"data.max_tokens": 64}).data.fields == recipe.data.fields
    hash(recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.epsilom=2", "did you mean 'epsilon'"),
        ("privcy.epsilon=2", "did you mean 'privacy'"),
        ("privacy.epsilon=-1", "must be above 0"),
        ("privacy.epsilon=nan", "not finite"),
        ("privacy.epsilon=lots", "'lots' is not a number"),
        ("privacy.delta=1", "must be below 1"),
        ("federation.population=2.5", "not a whole number"),
        ("federation.rounds=0", "at least 1"),
        ("federation.sampling_rate=1.01", "at most 1"),
        ("adapter.targets=[1]", "adapter.targets[0] = 1 is not a text"),
        ("adapter.rank=true", "not a whole number"),
        ("privacy", "not section.key=value"),
        ("a.b.c=1", "more than one dot"),
        ("name=../x", "cannot name a folder"),
        ("evaluation.benchmarks=['gsm8k']", "write auto, mmlu=PLACE or ceval=PLACE"),
    ],
)
def test_impossible_overrides_are_one_sentence(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_recipes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("privacy = [")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    (tmp_path / "flat.toml").write_text("privacy = 3")
    for name, words in {
        "absent.toml": "does not exist",
        "": "is a folder",
        "bad.toml": "not valid TOML",
        "latin.toml": "cannot be read",
        "flat.toml": "is not a section",
    }.items():
        with pytest.raises(RecipeError, match=words):
            load_recipe(tmp_path / name)
    for override in ("model=3", "data='text'"):
        with pytest.raises(RecipeError, match="is not a section"):
            load_recipe(None, [override])


def test_knobs_that_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match=r"set privacy\.noise_in = 'code'"):
        load_recipe("quickstart", ["privacy.clip=adaptive", "privacy.noise_in=update"])


def test_every_knob_is_documented_and_the_written_recipe_has_all_of_them() -> None:
    knobs = describe_knobs()
    assert all(meaning for _, _, meaning in knobs)
    tables = tomllib.loads(Recipe().to_toml())
    for key, _, _ in knobs:
        section, _, name = key.rpartition(".")
        assert name in (tables[section] if section else tables)


def test_a_code_longer_than_its_update_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"encoder\.ratio = 0\.5 would make codes longer than updates: give 1 or more, or 0"
    ):
        load_recipe("quickstart", ["encoder.ratio=0.5"])
    assert load_recipe("quickstart", ["encoder.ratio=0"]).encoder.ratio == 0.0
