"""Where text comes from: what a place's name says, and which split of it is read."""

import json
from pathlib import Path

import pytest

from drencoder.data.evaluation_text import open_evaluation
from drencoder.data.places import Place, read_records
from drencoder.data.sources import open_source
from drencoder.errors import DataError
from drencoder.recipe.recipe import load_recipe


@pytest.mark.parametrize(
    ("where", "place", "clients_split"),
    [
        ("embedded:next", ("embedded", "next", ""), "train"),
        ("notes.jsonl", ("", "notes.jsonl", ""), "train"),
        ("odd:name.jsonl", ("", "odd:name.jsonl", ""), "train"),
        ("hub:org/name", ("hub", "org/name", ""), "train"),
        ("hub:org/name:test_sft", ("hub", "org/name", "test_sft"), "test_sft"),
        ("hub:org/name:train[:10%]", ("hub", "org/name", "train[:10%]"), "train[:10%]"),
        ("mmlu:folder", ("mmlu", "folder", ""), "auxiliary_train"),
        ("ceval:hub:org/name", ("ceval", "hub:org/name", ""), "dev"),
        ("ceval:hub:org/name:val", ("ceval", "hub:org/name", "val"), "val"),
    ],
)
def test_a_place_has_a_kind_a_name_and_perhaps_a_split(
    where: str, place: tuple[str, str, str], clients_split: str
) -> None:
    assert Place.parse(where) == Place(*place)
    assert Place.parse(where).clients_split == clients_split


def write(folder: Path, *splits: str) -> Path:
    folder.mkdir()
    for split in splits:
        rows = [{"instruction": f"{split} {n}", "response": "yes", "who": f"w{n}"} for n in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_a_folder_gives_the_split_that_is_named_even_where_its_name_has_a_colon(tmp_path: Path) -> None:
    folder = write(tmp_path / "a:b", "train", "test")
    assert {record["instruction"][:5] for record in read_records(str(folder), knob="data.source")} == {"train"}
    plain = write(tmp_path / "plain", "train", "test")
    assert {record["instruction"][:4] for record in read_records(f"{plain}:test", knob="data.source")} == {"test"}
    with pytest.raises(DataError, match="no files of split 'other': name one of test, train as 'FOLDER:SPLIT'"):
        read_records(f"{plain}:other", knob="data.source")
    unnamed = write(tmp_path / "unnamed", "one", "two")
    assert len(read_records(str(unnamed), knob="data.source")) == 8
    with pytest.raises(DataError, match="no files of split 'test': leave the split out, or give a file"):
        read_records(f"{unnamed}:test", knob="data.source")  # else both splits would be the same files


def test_the_server_may_measure_on_another_split_of_the_clients_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "notes", "train", "test")
    common = [f"data.source={folder}", "data.client_field=who"]
    recipe = load_recipe(None, [*common, f"evaluation.data={folder}:test"])
    source = open_source(recipe.data, population=4, seed=0)
    evaluation = open_evaluation(recipe, source)
    assert evaluation is not None
    assert {record["instruction"][:4] for record in evaluation(10)} == {"test"}
    for own in (f"{folder}", f"{folder}:train", f"{folder}:TRAIN"):
        with pytest.raises(DataError, match=r"is the clients' own text \(data\.source\)"):
            open_evaluation(load_recipe(None, [*common, f"evaluation.data={own}"]), source)


@pytest.mark.parametrize(
    ("source", "split", "shared"),
    [
        ("hub:org/name", "test", False),
        ("hub:org/name", "train", True),
        ("hub:org/name", "train[90%:]", True),
        ("hub:org/name:train[:90%]", "train[90%:]", True),
        ("hub:org/name:train+test", "test", True),
        ("hub:org/name:all", "test", True),
        ("hub:org/name:val", "validation", True),
        ("hub:org/name:dev", "test", False),
        ("ceval:hub:org/name", "val", False),
        ("ceval:hub:org/name:validation", "val", True),
    ],
)
def test_a_split_that_may_hold_a_clients_record_is_known(source: str, split: str, shared: bool) -> None:
    assert Place.parse(source).shares_records(split) == shared
