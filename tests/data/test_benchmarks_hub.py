"""MMLU and C-Eval as the hub has them: what is read, and what each mistake is called."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import HEADER, load, mmlu_folder, mmlu_rows, read, write_csv

from drencoder.data.benchmarks.files import read_questions
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import Question
from drencoder.data.sources import open_source
from drencoder.errors import DataError
from drencoder.recipe import recipe as config


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def write_card(folder: Path, files: dict[str, dict[str, str]]) -> None:
    lines = ["---", "configs:"]
    for name, splits in files.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def cais_mmlu(datasets: Any, folder: Path, rows: dict[str, list[dict[str, Any]]], whole: bool) -> str:
    """As `cais/mmlu`: parquet, the answer as a class label; every subject a configuration, or `all` only."""
    kinds = datasets.Features(
        {
            "question": datasets.Value("string"),
            "subject": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    names = ["all"] if whole else list(rows)
    for name in names:
        table = [row for some in rows.values() for row in some] if whole else rows[name]
        for split in ("test", "validation", "dev"):
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            marked = [{**row, "question": f"{split} {row['question']}"} for row in table]
            datasets.Dataset.from_list(marked, features=kinds).to_parquet(str(path))
    splits = ("test", "validation", "dev")
    write_card(folder, {name: {split: f"{name}/{split}-*" for split in splits} for name in names})
    return f"hub:{folder}"


def hub_row(subject: str, number: int) -> dict[str, Any]:
    choices = [f"{letter}{number}" for letter in "wxyz"]
    return {"question": f"{subject} {number}", "subject": subject, "choices": choices, "answer": number % 4}


@pytest.mark.parametrize("whole", [False, True])
def test_the_hubs_mmlu(datasets: Any, tmp_path: Path, whole: bool) -> None:
    rows = {subject: [hub_row(subject, i) for i in range(6)] for subject in ("anatomy", "virology")}
    where = cais_mmlu(datasets, tmp_path / "mmlu", rows, whole)
    found = load(where)
    assert Counter(found.subjects) == {"anatomy": 6, "virology": 6}
    assert Question("anatomy", "test anatomy 3", ("w3", "x3", "y3", "z3"), 3, "en") in found.questions
    assert [q.question for q in read(where, "dev")["virology"]] == [f"dev virology {i}" for i in range(6)]
    assert set(read(where, "val", subjects=["virology"])) == {"virology"}
    assert read(where, "val")["anatomy"][0].question.startswith("validation")
    with pytest.raises(DataError, match="has no split 'train': choose one of dev, test, validation"):
        read(where, "train")
    with pytest.raises(DataError, match="no question of 'sociology'"):
        read(where, "test", subjects=["anatomy", "sociology"])


def test_mmlus_training_split_is_clients_text_and_no_benchmark(datasets: Any, tmp_path: Path) -> None:
    # Questions of other sets: no subject on the hub, files named after the sets in the original folder.
    hub = tmp_path / "hub"
    cais_mmlu(datasets, hub, {"": [hub_row("", i) for i in range(9)]}, whole=True)
    for path in (hub / "all").glob("test-*"):
        path.rename(path.with_name(path.name.replace("test", "auxiliary_train")))
    write_card(hub, {"all": {split: f"all/{split}-*" for split in ("auxiliary_train", "dev")}})
    folder = mmlu_folder(tmp_path / "folder")
    for name in ("arc_easy", "race"):
        write_csv(folder / "auxiliary_train" / f"{name}.csv", mmlu_rows(name, 10))
    for where, count in ((f"hub:{hub}", 9), (str(folder), 20)):
        wanted = config.Data(source=f"mmlu:{where}", examples_per_client=100)
        source = open_source(wanted, population=2, seed=0)
        records = [*source.client(0), *source.client(1)]
        assert len(records) == count
        assert all(record["response"] in "ABCD" for record in records)
    with pytest.raises(DataError, match="has no subjects"):
        read_questions(TAXONOMIES["mmlu"], str(folder), "auxiliary_train", ["anatomy"])


def test_bad_rows_of_the_hubs_mmlu_name_configuration_and_row(datasets: Any, tmp_path: Path) -> None:
    good = hub_row("anatomy", 0)
    for number, (change, message) in enumerate(
        (
            ({"choices": ["a", "b", "c"]}, "instead of a list of four options"),
            ({"answer": -1}, "the question has no right answer"),
            ({"answer": None}, "the question has no right answer"),
            ({"question": None, "subject": "anatomi"}, ""),
        )
    ):
        folder = tmp_path / str(number)
        where = cais_mmlu(datasets, folder, {"anatomy": [good, {**good, **change}]}, whole=False)
        if not message:  # the configuration says the subject, so the column is not asked
            assert len(load(where).questions) == 2
            continue
        with pytest.raises(DataError, match=f"configuration anatomy, split test, row 2: .*{message}"):
            load(where)
    with pytest.raises(DataError, match=r"row 2: 'anatomi' is not a subject.*did you mean 'anatomy'"):
        load(cais_mmlu(datasets, tmp_path / "all", {"": [good, {**good, "subject": "anatomi"}]}, whole=True))


def ceval_exam(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """As `ceval/ceval-exam`: one configuration per subject; here as CSV."""
    for split in ("val", "dev"):
        write_csv(folder / "law" / f"{split}.csv", [header, *rows])
    write_csv(folder / "law" / "test.csv", [header, ["0", "问", "甲", "乙", "丙", "丁", "", ""][: len(header)]])
    write_card(folder, {"law": {split: f"law/{split}.csv" for split in ("val", "dev", "test")}})
    return f"hub:{folder}"


def test_the_hubs_ceval(datasets: Any, tmp_path: Path) -> None:
    rows = [[str(i), f"问{i}", "甲", "乙", "丙", "丁", "ABCD"[i % 4], "因为"] for i in range(6)]
    where = ceval_exam(tmp_path / "ceval", rows)
    found = load(where, "ceval")
    assert Question("law", "问5", ("甲", "乙", "丙", "丁"), 1, "zh") in found.questions
    assert len(read(where, "dev", "ceval")["law"]) == 6
    with pytest.raises(DataError, match=r"configuration law, split test, row 1: .*no right answer.*use its split val"):
        read(where, "test", "ceval")
    where = ceval_exam(tmp_path / "lacking", [row[:7] for row in rows], [*HEADER[:4], "E", *HEADER[5:7]])
    with pytest.raises(DataError, match="configuration law, split val, row 1: there is no column 'C'"):
        load(where, "ceval")
    where = ceval_exam(tmp_path / "outside", [*rows, ["6", "问", "甲", "乙", "丙", "丁", "F", ""]])
    with pytest.raises(DataError, match="row 7: the answer is 'F'"):
        load(where, "ceval")


def test_a_hub_that_cannot_be_had(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.mmlu = '.*' cannot be loaded"):
        load(f"hub:{tmp_path / 'nothing'}")
    where = cais_mmlu(datasets, tmp_path / "mmlu", {"anatomi": [hub_row("anatomi", 0)]}, whole=False)
    with pytest.raises(DataError, match=r"configuration anatomi: 'anatomi' is not a subject.*'anatomy'"):
        load(where)
