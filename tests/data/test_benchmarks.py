"""MMLU and C-Eval from small files in the original layouts: what is read, and what each mistake is called."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_files import HEADER, ceval_folder, load, mmlu_folder, mmlu_rows, read, write_csv

from drencoder.data.benchmarks.questions import Benchmark, check_apart, load_benchmarks
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import Question, World
from drencoder.errors import DataError, RecipeError
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import load_recipe
from drencoder.rng import derive_seed

# --- taxonomy --------------------------------------------------------------------------------------


def test_the_taxonomies_are_those_of_the_papers() -> None:
    mmlu, ceval = TAXONOMIES["mmlu"], TAXONOMIES["ceval"]
    assert len(set(mmlu.subjects)) == len(mmlu.subjects) == 57
    assert {name: len(subjects) for name, subjects in ceval.categories.items()} == {
        "STEM": 20,
        "Social Science": 10,
        "Humanities": 11,
        "Other": 11,
    }
    assert len(set(ceval.subjects)) == 52
    assert len(ceval.hard) == 8
    assert ceval.hard < set(ceval.categories["STEM"])
    assert "anatomy" in mmlu.categories["other"]  # health, as its authors have it; lm-eval counts it to STEM


# --- folders ---------------------------------------------------------------------------------------


def test_a_folder_of_mmlus_files(tmp_path: Path) -> None:
    found = load(mmlu_folder(tmp_path))
    assert Counter(found.subjects) == {"anatomy": 7, "virology": 7, "philosophy": 7}
    by_text = {question.question: question for question in found.questions}
    assert by_text["anatomy 2?"] == Question("anatomy", "anatomy 2?", ("a2", "b2", "c2", "d2"), 2, "en")
    worked = read(tmp_path, "dev")["virology"]
    assert [example.question for example in worked[:2]] == ["virology dev 0?", "virology dev 1?"]
    assert {q.question for questions in read(tmp_path, "validation").values() for q in questions} == {
        f"{subject} val {i}?" for subject in ("anatomy", "virology", "philosophy") for i in range(2)
    }
    assert set(read(tmp_path, "test", subjects=["virology"])) == {"virology"}


def test_a_folder_of_cevals_files(tmp_path: Path) -> None:
    found = load(ceval_folder(tmp_path), "ceval")
    assert Counter(found.subjects) == {"law": 4, "logic": 4}
    assert found.questions[0].language == "zh"
    assert read(tmp_path, "dev", "ceval")["law"][4] == Question("law", "law问题4", ("甲", "乙", "丙", "丁4"), 0, "zh")


def test_a_count_is_spread_evenly_and_depends_on_the_seed(tmp_path: Path) -> None:
    mmlu_folder(tmp_path, count=20)
    some = load(tmp_path, count=10)
    assert sorted(Counter(some.subjects).values()) == [3, 3, 4]
    assert load(tmp_path, count=10) == some
    assert set(load(tmp_path, count=10, seed=1).questions) != set(some.questions)
    assert load(tmp_path).questions[:10] == some.questions  # so that a beginning is a sample
    assert len(load(tmp_path, count=1000).questions) == 60


def test_text_as_spreadsheets_leave_it(tmp_path: Path) -> None:
    rows = mmlu_rows("anatomy", 2)
    rows[0][0] = 'Which "one",\r\n\nof these?'
    path = write_csv(tmp_path / "test" / "anatomy_test.csv", rows, "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    (tmp_path / "test" / "._anatomy_test.csv").write_bytes(b"\x00\x05")
    (tmp_path / "README.txt").write_text("notes")
    questions = {question.question for question in load(tmp_path).questions}
    assert questions == {'Which "one",\r\n\nof these?', "anatomy 1?"}


def test_equal_options_are_let_through_as_the_published_sets_have_some(tmp_path: Path) -> None:
    rows = [["q?", "same", "same", "other", "", "B"]]
    write_csv(tmp_path / "test" / "anatomy_test.csv", rows)
    assert load(tmp_path).answers == [1]


GOOD = ["q?", "a", "b", "c", "d", "A"]


BAD_MMLU: dict[str, tuple[list[list[str]], str]] = {
    "too few columns": ([GOOD, GOOD[:5]], "line 2: 5 columns instead of 6"),
    "too many columns": ([[*GOOD, "x"]], "line 1: 7 columns instead of 6"),
    "no answer": ([GOOD, GOOD, [*GOOD[:5], " "]], "line 3: the question has no right answer"),
    "answer outside": ([GOOD, [*GOOD[:5], "E"]], "line 2: the answer is 'E': it must be one of the letters A to D"),
    "answer in words": ([[*GOOD[:5], "a"]], "line 1: the answer is 'a'"),
    "header": ([["question", "A", "B", "C", "D", "answer"], GOOD], "line 1: the answer is 'answer'"),
    "empty question": ([GOOD, [" ", *GOOD[1:]]], "line 2: the question is empty"),
    "empty right option": ([["q?", "", "b", "c", "d", "A"]], "line 1: the right option, A, is empty"),
    "four equal options": ([["q?", "b", "b", "b", "b", "A"]], "line 1: all four options are the same"),
    "after line breaks": ([["q\n\n?", "a\nb", *GOOD[2:]], [*GOOD[:5], "?"]], "line 5: the answer is '?'"),
    "nothing": ([], "holds no question"),
}


@pytest.mark.parametrize("name", BAD_MMLU)
def test_bad_rows_of_mmlu_name_file_and_line(tmp_path: Path, name: str) -> None:
    rows, message = BAD_MMLU[name]
    path = write_csv(tmp_path / "test" / "anatomy_test.csv", rows)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        load(tmp_path)


BAD_CEVAL: dict[str, tuple[list[list[str]], str]] = {
    "missing column": ([["id", "question", "A", "B", "D", "answer"]], "line 1: the header .* lacks the column 'C'"),
    "two missing": ([["id", "question", "A", "B", "answer"]], "lacks the column 'C', 'D'"),
    "column twice": ([[*HEADER[:7], "A"]], "has a column twice"),
    "short row": ([HEADER[:7], ["0", *GOOD[:5]]], "line 2: 6 columns instead of 7"),
    "no answer": ([HEADER[:7], ["0", *GOOD], ["1", *GOOD[:5], ""]], "line 3: the question has no right answer"),
    "answer outside": ([HEADER[:7], ["0", *GOOD[:5], "AB"]], "line 2: the answer is 'AB'"),
    "header only": ([HEADER], "holds no question"),
}


@pytest.mark.parametrize("name", BAD_CEVAL)
def test_bad_rows_of_ceval_name_file_and_line(tmp_path: Path, name: str) -> None:
    rows, message = BAD_CEVAL[name]
    path = write_csv(tmp_path / "val" / "law_val.csv", rows)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}"):
        load(tmp_path, "ceval")


def test_cevals_test_split_has_no_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"law_test\.csv, line 1: .*lacks the column 'answer'.*use its split val"):
        read(ceval_folder(tmp_path), "test", "ceval")


@pytest.mark.parametrize(
    ("encode", "line", "byte"),
    [
        (lambda rows: rows.encode("utf-8") + "五,一,二,三,四,A\n".encode("gbk"), 3, "0xce"),
        (lambda rows: rows.encode("utf-8") + b'"\xe4\xb8\n\xad",a,b,c,d,A\n', 3, "0xe4"),
        (lambda rows: b"\xef\xbb\xbf" + rows.encode("utf-8") + b"caf\xe9,a,b,c,d,A\n", 3, "0xe9"),
        (lambda rows: rows.encode("utf-16"), 1, "0xff"),
        (lambda rows: rows.encode("utf-16-le"), 1, "0x00"),
    ],
)
def test_other_encodings_name_line_and_byte(
    tmp_path: Path, encode: Callable[[str], bytes], line: int, byte: str
) -> None:
    mmlu_folder(tmp_path)  # the other files are UTF-8
    path = tmp_path / "test" / "philosophy_test.csv"
    path.write_bytes(encode("q?,a,b,c,d,A\nr?,a,b,c,d,B\n"))
    with pytest.raises(DataError, match=rf"philosophy_test\.csv, line {line}: byte {byte} is not UTF-8"):
        load(tmp_path)


def test_quotation_marks_that_do_not_close(tmp_path: Path) -> None:
    path = tmp_path / "test" / "anatomy_test.csv"
    path.parent.mkdir()
    path.write_text('q?,a,b,c,d,A\n"open,a,b,c,d,A\nq?,a,b,c,d,A\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"anatomy_test\.csv, line 2: not valid CSV"):
        load(tmp_path)


def test_folders_that_are_not_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match="no folder with CSV files in it"):
        load(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no folder with CSV files in it"):
        load(tmp_path)
    with pytest.raises(DataError, match="is a file: give the folder"):
        load(write_csv(tmp_path / "one.csv", [GOOD]))
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", [GOOD])
    with pytest.raises(DataError, match="has no split 'test': choose one of dev"):
        load(tmp_path)
    with pytest.raises(DataError, match="benchmark 'mmul' is not known"):
        load(tmp_path, "mmul")


def test_unknown_subjects_get_the_nearest_name(tmp_path: Path) -> None:
    mmlu_folder(tmp_path)
    with pytest.raises(DataError, match="'anatomi' is not a subject of mmlu: did you mean 'anatomy'"):
        read(tmp_path, "test", subjects=["anatomi"])
    with pytest.raises(DataError, match="'zzz' is not a subject of mmlu: its 57 subjects are abstract_algebra"):
        read(tmp_path, "test", subjects=["zzz"])
    with pytest.raises(DataError, match="split 'test' has no question of 'sociology'"):
        read(tmp_path, "test", subjects=["sociology"])
    path = write_csv(tmp_path / "test" / "philosofy_test.csv", [GOOD])
    with pytest.raises(DataError, match=rf"{path}: 'philosofy' is not a subject.*did you mean 'philosophy'"):
        load(tmp_path)
    path = path.rename(tmp_path / "test" / "sociology.csv")
    with pytest.raises(DataError, match=r"sociology\.csv: the file's name is not <subject>_test\.csv"):
        load(tmp_path)


# --- the embedded world ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_the_embedded_questions_are_the_worlds_own(name: str) -> None:
    found = load("embedded", name, count=60, seed=4)
    assert list(found.questions) == World().benchmark(name, count=60, seed=derive_seed(4, "benchmark"))
    with pytest.raises(DataError, match="has no end"):
        load("embedded", name)


# --- recipes ---------------------------------------------------------------------------------------


def test_a_recipe_names_the_places_of_its_benchmarks(tmp_path: Path) -> None:
    places = [f"mmlu={mmlu_folder(tmp_path / 'm')}", f"ceval={ceval_folder(tmp_path / 'c')}"]
    found = load_benchmarks(load_recipe("quickstart", [f"evaluation.benchmarks={places}", "evaluation.examples=9"]))
    assert {name: len(one.questions) for name, one in found.items()} == {"mmlu": 9, "ceval": 8}
    assert set(found["ceval"].subjects) == {"law", "logic"}
    for wrong in ("gsm8k", "mmlu=", "auto=here", "law"):
        with pytest.raises(RecipeError, match="write auto, mmlu=PLACE or ceval=PLACE"):
            load_recipe("quickstart", [f"evaluation.benchmarks=['{wrong}']"])
    with pytest.raises(RecipeError, match="names a benchmark twice"):
        load_recipe("quickstart", ["evaluation.benchmarks=['mmlu', 'mmlu=here']"])


def test_clients_never_own_what_is_asked(tmp_path: Path) -> None:
    folder = str(mmlu_folder(tmp_path))

    def asked(place: str, split: str) -> dict[str, Benchmark]:
        own = [f"data.source=mmlu:{place}:{split}", f"evaluation.benchmarks=['mmlu={folder}']"]
        return load_benchmarks(load_recipe("quickstart", own))

    assert asked(folder, "dev")
    # Other spellings of the same place and the same split.
    for other in (f"{folder}/", f"{folder}/../{Path(folder).name}"):
        with pytest.raises(DataError, match="clients are trained on"):
            asked(other, "test")
    for split, other in (("dev", "dev"), ("val", "validation"), ("validation", "val")):
        with pytest.raises(DataError, match=f"clients are trained on split '{other}'"):
            check_apart("mmlu", folder, ["test", split], config.Data(source=f"mmlu:{folder}:{other}"))
    check_apart("mmlu", folder, ["test"], config.Data(source=f"mmlu:{folder}x:test"))
    check_apart("ceval", folder, ["test"], config.Data(source=f"mmlu:{folder}:test"))
