"""A site's units: what they are, their numbers, and that no other record matters to them."""

import json
from pathlib import Path
from typing import Any

import pytest

from drencoder.data.evaluation_text import evaluation_rests_on, open_evaluation, set_aside_share
from drencoder.data.survey import survey_data, with_population
from drencoder.data.units import EmbeddedUnits, FileUnits, SiteUnits, open_text
from drencoder.errors import DataError
from drencoder.recipe.recipe import Recipe, load_recipe

Row = dict[str, Any]


def rows_of(wards: int = 3, patients: int = 4) -> list[Row]:
    return [
        {
            "instruction": f"ask {ward} {patient} {number}",
            "response": "well",
            "ward": f"w{ward}",
            "patient": f"p{patient}",
        }
        for ward in range(wards)
        for patient in range(patients)
        for number in range(1 + patient)
    ]


def recipe_of(folder: Path, rows: list[Row], unit: str = "owner", **changes: Any) -> Recipe:
    path = folder / f"notes{len(list(folder.iterdir()))}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    known = {
        "data.source": str(path), "data.client_field": "ward", "data.owner_field": "patient", "federation.population": 3,
        "federation.units_per_site": 10, "privacy.unit": unit,
    }  # fmt: skip
    return load_recipe().changed(known | {key.replace("__", "."): value for key, value in changes.items()})


def opened(recipe: Recipe, **more: Any) -> FileUnits:
    source = open_text(recipe, set_aside=set_aside_share(recipe), **more)
    assert isinstance(source, FileUnits)
    assert isinstance(source, SiteUnits)
    return source


def texts(source: SiteUnits, site: int) -> list[list[str]]:
    return sorted(sorted(row["instruction"] for row in source.client(unit)) for unit in source.units(site))


def test_a_unit_is_an_owner_at_a_site_or_a_record(tmp_path: Path) -> None:
    owners = opened(recipe_of(tmp_path, rows_of(), data__examples_per_client=9))
    assert texts(owners, 1) == sorted([[f"ask 1 {p} {n}" for n in range(1 + p)] for p in range(4)])
    records = opened(recipe_of(tmp_path, rows_of(), "record"))
    assert texts(records, 1) == sorted([f"ask 1 {p} {n}"] for p in range(4) for n in range(1 + p))
    few = opened(recipe_of(tmp_path, rows_of(), data__examples_per_client=2))
    assert max(len(few.client(unit)) for unit in few.units(2)) == 2
    assert owners.units(7) == ()


def test_one_name_at_two_sites_is_two_units_and_equal_records_are_units_each(tmp_path: Path) -> None:
    source = opened(recipe_of(tmp_path, rows_of()))
    numbers = [number for site in range(3) for number in source.units(site)]
    assert len(set(numbers)) == len(numbers) == 12
    twice = [row | {"instruction": "the same"} for row in rows_of()]
    assert [len(opened(recipe_of(tmp_path, twice, "record")).units(site)) for site in range(3)] == [10, 10, 10]


@pytest.mark.parametrize("unit", ["owner", "record"])
def test_other_units_keep_their_numbers_and_records(tmp_path: Path, unit: str) -> None:
    """Whatever else the file holds, and in whatever order: a number is a function of the unit alone."""
    before = opened(recipe_of(tmp_path, rows_of(), unit))
    rows = [row for row in reversed(rows_of()) if (row["ward"], row["patient"]) != ("w1", "p2")]
    after = opened(recipe_of(tmp_path, rows, unit))
    for site in range(3):
        kept, all_ = set(after.units(site)), set(before.units(site))
        assert kept <= all_
        assert len(all_ - kept) == (0 if site != 1 else 1 if unit == "owner" else 3)
        for number in kept:
            assert after.client(number) == before.client(number)


def test_a_site_may_lose_its_last_unit(tmp_path: Path) -> None:
    source = opened(recipe_of(tmp_path, [row for row in rows_of() if row["ward"] != "w2"]))
    assert source.units(2) == ()
    assert len(source.units(1)) == 4


def test_a_machines_own_file_is_one_sites(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [{k: v for k, v in row.items() if k != "ward"} for row in rows_of(1)])
    own = opened(recipe, own=(recipe.data.source, [2]))
    assert [len(own.units(site)) for site in range(3)] == [0, 0, 4]
    both = recipe_of(tmp_path, rows_of(2))
    shared = opened(both, own=(both.data.source, [0, 2]))
    assert [len(shared.units(site)) for site in range(3)] == [4, 0, 4]
    with pytest.raises(DataError, match="this machine answers for 3"):
        opened(both, own=(both.data.source, [0, 1, 2]))


def test_the_embedded_world_has_sites_too() -> None:
    recipe = load_recipe("silos")
    source = open_text(recipe)
    assert isinstance(source, EmbeddedUnits)
    assert len(source.units(3)) == recipe.federation.units_per_site
    assert not set(source.units(3)) & set(source.units(4))
    unit = source.units(3)[5]
    assert len(source.client(unit)) == recipe.data.examples_per_client
    single = open_text(recipe.changed({"privacy.unit": "record"}))
    assert single.client(unit) == source.client(unit)[:1]


@pytest.mark.parametrize(
    ("changes", "spoil", "words"),
    [
        ({}, {"ward": None}, "line 30: null in 'ward', where data.client_field"),
        ({}, {"patient": ""}, "field 'patient': an empty name"),
        ({"data__owner_field": "who"}, {}, "has no field 'who', or no text or number in it: set data.owner_field"),
        ({"data__owner_field": ""}, {}, "name the field in data.owner_field"),
        ({"data__client_field": ""}, {}, "name the field in data.client_field"),
        ({"federation__population": 2}, {}, "names 3 sites in 'ward', and the recipe has federation.population = 2"),
        ({"data__held_out_share": 1e-9}, {}, "sets none of the owners"),
        ({}, {"patient": "P0"}, "may be only 1 owner:"),
        ({}, {"patient": True}, "line 30: true or false in 'patient', where data.owner_field expects an owner's name"),
        ({}, {"ward": ["w0"]}, "line 30: a list in 'ward', where data.client_field expects an owner's name"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path: Path, changes: Row, spoil: Row, words: str) -> None:
    rows = rows_of()
    rows[-1] = rows[-1] | spoil
    with pytest.raises(DataError, match=words) as caught:
        opened(recipe_of(tmp_path, rows, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["owner", "record"])
def test_units_that_are_set_aside_are_in_no_site(tmp_path: Path, unit: str) -> None:
    recipe = recipe_of(tmp_path, rows_of(patients=30), unit, data__held_out_share=0.2, data__examples_per_client=99)
    source = opened(recipe)
    used = {text for site in range(3) for one in texts(source, site) for text in one}
    draw = open_evaluation(recipe, source)
    assert draw is not None
    aside = {row["instruction"] for row in draw(10_000)}
    assert used | aside == {row["instruction"] for row in rows_of(patients=30)}
    assert not used & aside
    assert 0.02 < len(aside) / len(used | aside) < 0.6
    if unit == "owner":  # with all their records or not at all
        names = [{tuple(text.split()[1:3]) for text in part} for part in (used, aside)]
        assert not names[0] & names[1]
    assert f"of the {unit}s" in evaluation_rests_on(recipe)
    fewer = recipe_of(
        tmp_path, [row for row in rows_of(patients=30) if row["patient"] != "p29"], unit, data__held_out_share=0.2,
        data__examples_per_client=99,
    )  # fmt: skip
    again = {text for site in range(3) for one in texts(opened(fewer), site) for text in one}
    assert again == {text for text in used if text.split()[2] != "29"}  # nobody else is set aside instead


def test_without_a_share_nothing_is_taken_from_the_units(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows_of(), "record")
    assert open_evaluation(recipe, opened(recipe)) is None


def test_a_survey_counts_sites_owners_and_records(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows_of(), federation__population=0)
    assert with_population(recipe).federation.population == 3
    for changed in (with_population(recipe), recipe.changed({"privacy.unit": "client", "federation.population": 3})):
        survey = survey_data(changed, None)
        assert survey is not None
        assert (survey.clients, survey.owners, survey.records) == (3, 12, 30)
        assert survey.shared_owners == 4  # each patient's name is at all three
        assert survey.records_of_client == (10, 10, 10)


def test_a_survey_counts_names_at_several_sites(tmp_path: Path) -> None:
    rows = [row | {"patient": f"{row['ward']} {row['patient']}"} for row in rows_of()]
    apart = survey_data(recipe_of(tmp_path, rows), None)
    rows[0]["patient"] = rows[-1]["patient"]
    together = survey_data(recipe_of(tmp_path, rows), None)
    assert apart is not None
    assert together is not None
    assert (apart.shared_owners, together.shared_owners) == (0, 1)
