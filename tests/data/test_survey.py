"""What a plan says of the data: counts, doubles, and how many clients there are where the recipe does not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from drencoder.data.evaluation_text import set_aside_share
from drencoder.data.sources import FileSource, open_source
from drencoder.data.survey import DataSurvey, survey_data, with_population
from drencoder.data.text_report import report_records, report_source
from drencoder.data.tokenization import RecordTokenizer
from drencoder.errors import DataError
from drencoder.recipe.recipe import Recipe, load_recipe
from text_models import CHAT, make_tokenizer


def recipe_of(path: Path, records: list[dict[str, Any]], **changes: Any) -> Recipe:
    path.write_text("\n".join(map(json.dumps, records)))
    data = {"data.source": str(path), "federation.population": 0}
    return load_recipe().changed(data | {key.replace("__", "."): value for key, value in changes.items()})


def owned(count: int, owners: int) -> list[dict[str, Any]]:
    return [{"instruction": f"q{i}", "response": f"a{i}", "who": f"p{i % owners}"} for i in range(count)]


def surveyed(recipe: Recipe, tokenizer: Path | None = None) -> DataSurvey:
    survey = survey_data(with_population(recipe), tokenizer)
    assert survey is not None
    return survey


def test_the_population_is_that_of_the_data(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "a.jsonl", owned(60, 12), data__client_field="who")
    assert with_population(recipe).federation.population == 12
    aside = recipe.changed({"data.held_out_share": 0.3})
    population = with_population(aside).federation.population
    assert 0 < population < 12
    source = open_source(aside.data, population=population, seed=aside.seed, set_aside=set_aside_share(aside))
    assert isinstance(source, FileSource)
    assert len(source.owned) == population
    named = recipe.changed({"federation.population": 7})
    assert with_population(named) is named
    assert with_population(load_recipe()).federation.population == 10_000
    simulated = recipe_of(tmp_path / "b.jsonl", owned(400, 1), data__examples_per_client=4, evaluation__data="none")
    assert with_population(simulated).federation.population == 100


def test_the_embedded_world_has_clients_where_a_recipe_names_none() -> None:
    assert Recipe().federation.population == 10_000
    assert survey_data(Recipe(), None) is None


def test_no_simulated_client_is_left_without_a_record(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "a.jsonl", owned(5418, 1), federation__population=1000)
    sources = [open_source(recipe.data, population=1000, seed=3) for _ in range(2)]
    assert all(isinstance(source, FileSource) for source in sources)
    first, second = (source.owned for source in sources)  # type: ignore[union-attr]
    assert first == second
    assert min(map(len, first)) == 1
    assert sorted(index for indices in first for index in indices) == list(range(5418))
    full = open_source(recipe.data, population=5418, seed=3)
    assert {len(indices) for indices in full.owned} == {1}  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"82 of 5500 simulated clients .* lower federation\.population to 5418"):
        open_source(recipe.data, population=5500, seed=3)


def test_counts(tmp_path: Path) -> None:
    records = [
        *owned(20, 4),
        {"instruction": "same", "response": "words", "who": "p0"},
        {"instruction": "same", "response": "words", "who": "p0"},
        {"instruction": "q3", "response": "a3", "who": "p1"},
        {"instruction": "q5", "response": "a5", "who": "p3"},
        {"instruction": "nothing", "response": " ", "who": "p1"},
        {"instruction": "half \ud83d", "response": "a", "who": "p1"},
        {"instruction": "word " * 500, "response": "a", "who": "p2"},
    ]
    recipe = recipe_of(tmp_path / "a.jsonl", records, data__client_field="who", data__max_tokens=200)
    tokenizer = make_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    survey = surveyed(recipe, tmp_path / "tokenizer" / "tokenizer.json")
    assert (survey.records, survey.clients, survey.empty, survey.changed, survey.too_long) == (27, 4, 1, 1, 1)
    assert survey.schema == "Dolly (instruction, response)"
    assert (survey.duplicates.across_owners, survey.duplicates.in_evaluation) == (2, 0)
    assert survey.records_of_client == (6, 7, 8)
    texts = [
        f"{r['instruction'].strip()}\nAnswer: {r['response'].strip()}".replace("\ud83d", "\ufffd") for r in records
    ]
    assert survey.tokens == sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    estimate = surveyed(recipe)
    assert "estimated" in estimate.tokens_are
    assert estimate.tokens == sum(len(text.encode()) // 4 for text in texts)
    json.dumps(survey.to_dict())


def test_clients_text_in_the_evaluation_data_is_counted(tmp_path: Path) -> None:
    (tmp_path / "server.jsonl").write_text(json.dumps({"instruction": "q3", "response": "a3"}) + "\n")
    evaluation = str(tmp_path / "server.jsonl")
    recipe = recipe_of(tmp_path / "a.jsonl", owned(20, 4), data__client_field="who", evaluation__data=evaluation)
    survey = surveyed(recipe)
    assert (survey.evaluation_records, survey.duplicates.in_evaluation) == (1, 1)


def test_a_run_says_what_becomes_of_the_records(tmp_path: Path) -> None:
    records = [
        *owned(20, 4),
        {"instruction": "nothing", "response": "", "who": "p1"},
        {"instruction": "say </s> and <|end|>", "response": "a", "who": "p1"},
        {"instruction": "word " * 500, "response": "secret", "who": "p2"},
        {"instruction": "q3", "response": "a3", "who": "p1"},
        {"instruction": "half \ud83d", "response": "a", "who": "p1"},
    ]
    recipe = recipe_of(tmp_path / "a.jsonl", records, data__client_field="who", data__examples_per_client=100)
    source = open_source(recipe.data, population=4, seed=0)
    chat = make_tokenizer("bytes", template=CHAT)
    tokenizer = RecordTokenizer.open(chat, template="chat", max_tokens=100, end_id=2, start=())
    told = report_source(tokenizer, source)
    assert told == [
        "The clients' text: 25 records; left out, since they have no response: 1; cut to data.max_tokens = 100: 1; with control "
        "tokens, which stay words: 1.",
        "Records with characters or messages that are no text, which were replaced or left out: 1.",
        "Texts that several clients have word for word: 1.",
    ]
    plain = recipe_of(tmp_path / "b.jsonl", owned(8, 4), data__client_field="who")
    assert report_source(tokenizer, open_source(plain.data, population=4, seed=0)) == [
        "The clients' text: 8 records; all are used whole."
    ]
    assert report_source(tokenizer, open_source(load_recipe().data, population=4, seed=0)) == []
    many = [(number, {"instruction": "a", "response": "" if number % 3 == 1 else "b"}) for number in range(1, 10_001)]
    assert report_records(tokenizer, many, "It") == (
        "It: 10,000 records, of which 5,000, at even distances, were looked at; left out, since they have no response: 1,667."
    )


def test_a_record_that_the_template_refuses_is_named_before_anything_is_charged(tmp_path: Path) -> None:
    records = [*owned(8, 2), {"system": "secret", "instruction": "secret", "response": "secret", "who": "p1"}]
    recipe = recipe_of(tmp_path / "a.jsonl", records, data__client_field="who", data__examples_per_client=100)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system message') }}{% endif %}" + CHAT
    chat = make_tokenizer("bytes", template=refusing)
    tokenizer = RecordTokenizer.open(chat, template="chat", max_tokens=100, end_id=2, start=())
    with pytest.raises(DataError, match=r"record 9: data\.template: .* \(No system message\)") as caught:
        report_source(tokenizer, open_source(recipe.data, population=2, seed=0))
    assert "secret" not in str(caught.value)


def test_a_file_is_read_once_for_counting_and_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`with_population` counts the owners, a run opens the file: it is read once, and again as soon as it has changed."""
    from drencoder.data import places

    read: list[str] = []

    def counted(path: Path, split: str, *, knob: str) -> Any:
        read.append(path.name)
        return original(path, split, knob=knob)

    original = places.read_rows
    monkeypatch.setattr(places, "read_rows", counted)
    recipe = recipe_of(tmp_path / "once.jsonl", owned(12, 4), data__client_field="who")
    known = with_population(recipe)
    source = open_source(known.data, population=known.federation.population, seed=0)
    assert (known.federation.population, read) == (4, ["once.jsonl"])
    assert isinstance(source, FileSource)
    assert len(source.records) == 12
    recipe_of(tmp_path / "once.jsonl", owned(10, 5), data__client_field="who")
    assert with_population(recipe).federation.population == 5
    assert read == ["once.jsonl"] * 2
    (tmp_path / "once.jsonl").unlink()
    with pytest.raises(DataError):
        with_population(recipe)
