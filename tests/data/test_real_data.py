"""Real data sets, where the folder that DRENCODER_TEST_DATA names has them, are read as they are."""

import os
from pathlib import Path

import pytest

from drencoder.data.places import Place
from drencoder.data.survey import survey_data, with_population
from drencoder.errors import DataError
from drencoder.recipe.recipe import load_recipe

FOLDER = Path(os.environ.get("DRENCODER_TEST_DATA", "/nowhere"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="DRENCODER_TEST_DATA names no folder")


@pytest.mark.parametrize(
    ("source", "changes", "records", "schema"),
    [
        ("{}/dolly/databricks-dolly-15k.jsonl", {}, 15_011, "Dolly (instruction, context, response)"),
        ("{}/banking77", {}, 10_003, "plain text (text)"),
        ("{}/banking77:test", {}, 3_080, "plain text (text)"),
        (
            "{}/banking77/train.csv",
            {"data.fields": {"instruction": "text", "response": "category"}},
            10_003,
            "your fields (text, category)",
        ),
        ("{}/gsm8k:test", {}, 1_319, "question and answer (question, answer)"),
        ("{}/shakespeare/speeches.jsonl", {}, 7_097, "plain text (text)"),
        ("mmlu:{}/mmlu:dev", {}, 285, "questions with four options"),
        ("ceval:{}/ceval:val", {}, 1_346, "questions with four options"),
    ],
)
def test_real_data_are_read(source: str, changes: dict[str, object], records: int, schema: str) -> None:
    place = Place.parse(source.format(FOLDER))
    if not Path(place.name).exists():
        pytest.skip(f"{place.name} is not there")
    where = {"data.source": source.format(FOLDER), "federation.population": 0}
    survey = survey_data(with_population(load_recipe().changed(where | changes)), None)
    assert survey is not None
    assert (survey.records, survey.schema) == (records, schema)
    assert survey.records_of_client[0] >= 1
    if "data.client_field" in changes:
        assert survey.clients == 299


def test_roles_that_are_spelled_in_two_ways_are_not_taken_for_two_owners() -> None:
    """The plays have MESSENGER and Messenger: whether they are one is for their holder to say."""
    file = Path(FOLDER) / "shakespeare" / "speeches.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    recipe = load_recipe().changed(
        {"data.source": str(file), "data.client_field": "client", "federation.population": 0}
    )
    with pytest.raises(DataError, match=r"12 names in 'client' .* may be only 6 owners"):
        with_population(recipe)
