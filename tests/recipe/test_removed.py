"""A recipe of an earlier version is refused with one sentence per removed knob; the table never touches what is still valid."""

import dataclasses
from pathlib import Path

import pytest

from drencoder.errors import RecipeError
from drencoder.recipe import removed
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.recipe.removed import REMOVED

_SECTIONS = {field.name: field.type for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.type)}


def _gone(entry: str) -> bool:
    """Whether what the entry names is no section, key or value of today's recipe."""
    where, _, value = entry.partition("=")
    section, _, key = where.partition(".")
    fields = {field.name: field for field in dataclasses.fields(_SECTIONS[section])} if section in _SECTIONS else {}
    if key not in fields:
        return bool(key) or section not in _SECTIONS
    return bool(value) and value not in fields[key].metadata["choices"]


@pytest.mark.parametrize("entry", [entry for entry in REMOVED if _gone(entry)])
def test_a_removed_knob_in_an_override_is_one_sentence(entry: str) -> None:
    where, _, value = entry.partition("=")
    override = f"{where if '.' in where else where + '.key'}={value or 1}"
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    named = f"{where} = {value!r}" if value else where
    assert str(caught.value) == f"{named} was removed in 0.2: {REMOVED[entry]}."


@pytest.mark.parametrize("ending", REMOVED.values())
def test_the_ending_of_every_sentence_is_one_line_without_its_full_stop(ending: str) -> None:
    assert ending
    assert "\n" not in ending
    assert not ending.endswith(".")


def test_a_removed_key_a_section_and_a_value_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry, ending in (
        ("server.warmth", "the server is always cold"),
        ("cellar", "use the attic"),
        ("privacy.trust=nobody", "use local"),
    ):
        monkeypatch.setitem(removed.REMOVED, entry, ending)
    for text, sentence in {
        "[server]\nwarmth = 3": "server.warmth was removed in 0.2: the server is always cold.",
        "[cellar]\nwine = 'red'": "cellar was removed in 0.2: use the attic.",
        "[privacy]\ntrust = 'nobody'": "privacy.trust = 'nobody' was removed in 0.2: use local.",
    }.items():
        path = tmp_path / "old.toml"
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == sentence


def test_a_run_of_an_earlier_version_is_for_that_version(tmp_path: Path) -> None:
    path = tmp_path / "recipe.resolved.toml"
    path.write_text("[prior]\nsynthetic = 512")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"prior.synthetic was removed in 0.2: {REMOVED['prior.synthetic']}. {path} is of a run that had it: use the version of "
        "drencoder that made that run."
    )


def test_an_entry_for_a_knob_that_is_still_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in ("privacy", "privacy.epsilon", "privacy.trust=central"):
        monkeypatch.setitem(removed.REMOVED, entry, "never said")
    assert load_recipe("quickstart", ["privacy.epsilon=2", "privacy.trust=central"]).privacy.epsilon == 2.0
    with pytest.raises(RecipeError, match="must be above 0"):
        load_recipe("quickstart", ["privacy.epsilon=-1"])


def test_a_knob_that_never_was_still_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'momentum'"):
        load_recipe("quickstart", ["server.moment=1"])
