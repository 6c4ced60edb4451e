"""The [compare] table of a recipe file: read by a comparison, and by no run."""

from pathlib import Path

import pytest

from drencoder.errors import RecipeError
from drencoder.recipe.recipe import Recipe, describe_knobs, load_recipe
from drencoder.study.settings import Compare, load_comparison


def test_a_comparison_reads_its_table_and_a_run_leaves_it_alone() -> None:
    recipe, settings = load_comparison("paper/embedded-crowd", ["compare.seeds=[3, 4]", "privacy.epsilon=3"])
    assert settings.rates == ("random=8",)  # of the file
    assert settings.seeds == (3, 4)
    assert settings.tuning_factor == Compare().tuning_factor
    assert recipe == load_recipe("paper/embedded-crowd", ["privacy.epsilon=3"])
    assert "compare" not in recipe.to_dict()
    assert not any(key.startswith("compare.") for key, _, _ in describe_knobs())


def test_a_file_without_the_table_has_the_defaults() -> None:
    assert load_comparison("quickstart") == (load_recipe("quickstart"), Compare())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compare.tuning_runs=0", "at least 1"),
        ("compare.epsilons=[0]", "above 0"),
        ("compare.methods=3", "not a list of texts"),
        ("compare.seed=[1]", "did you mean 'seeds'"),
        ("compare=1", "not a section"),
        ("compare.tuning_factor=1", "above 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_comparison(None, [override])


def test_a_resolved_recipe_of_an_earlier_version_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "recipe.resolved.toml"
    path.write_text(load_recipe("quickstart").to_toml() + '\n[compare]\nmethods = ["lora"]\n')
    assert load_recipe(path) == load_recipe("quickstart")


def test_the_table_is_no_part_of_a_recipe() -> None:
    with pytest.raises(RecipeError, match="'compare' is not a known key"):
        Recipe.from_dict({"compare": {}})
