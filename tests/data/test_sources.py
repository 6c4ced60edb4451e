"""Own data: files and the datasets library, split over clients once and for all."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from drencoder.data.evaluation_text import open_evaluation
from drencoder.data.owners import owner_key
from drencoder.data.sources import FileSource, Record, SiteSource, open_source
from drencoder.errors import DataError
from drencoder.recipe import sections
from drencoder.recipe.recipe import load_recipe

RECORDS = [
    {
        "instruction": f"question {i}",
        "context": "",
        "response": f"answer {i}",
        "category": f"c{i % 3}",
        "site": f"s{i % 4}",
    }
    for i in range(80)
]


def write(folder: Path, records: list[dict[str, str]], name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def file_source(knobs: sections.Data, population: int, seed: int, set_aside: float) -> FileSource:
    source = open_source(knobs, population=population, seed=seed, set_aside=set_aside)
    assert isinstance(source, FileSource)
    return source


@pytest.mark.parametrize("share", [0.0, 0.1, 1e-9])
def test_a_record_that_is_set_aside_has_no_owner_and_every_other_has_one(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, RECORDS)
    knobs = sections.Data(source=str(path), examples_per_client=1000)
    source = file_source(knobs, population=5, seed=3, set_aside=share)
    owned = [record["instruction"] for client in range(5) for record in source.client(client)]
    held = [record["instruction"] for record in source.held_out(1000)]
    assert len(held) == {0.0: 0, 0.1: 7, 1e-9: 1}[share]  # the keyed hash decides: about a tenth; at least one
    assert sorted(owned + held) == sorted(record["instruction"] for record in RECORDS)
    again = file_source(knobs, population=5, seed=3, set_aside=share)
    assert [again.client(client) for client in range(5)] == [source.client(client) for client in range(5)]
    other = file_source(knobs, population=5, seed=4, set_aside=share)
    assert [other.client(client) for client in range(5)] != [source.client(client) for client in range(5)]


def test_a_file_of_one_record_has_none_to_set_aside(tmp_path: Path) -> None:
    knobs = sections.Data(source=str(write(tmp_path, RECORDS[:1])))
    with pytest.raises(DataError, match=r"all 1 records .* name text that the server owns in evaluation\.data"):
        open_source(knobs, population=1, seed=0, set_aside=0.05)
    assert len(open_source(knobs, population=1, seed=0).client(0)) == 1


def test_equal_records_are_set_aside_together(tmp_path: Path) -> None:
    """Else a client's text would be evaluated on, as another line of the file."""
    knobs = sections.Data(source=str(write(tmp_path, RECORDS * 2)), examples_per_client=1000)
    source = file_source(knobs, population=3, seed=0, set_aside=0.3)
    owned = {record["instruction"] for client in range(3) for record in source.client(client)}
    held = [record["instruction"] for record in source.held_out(1000)]
    assert 20 < len(held) < 80
    assert len(set(held)) == len(held) / 2
    assert not owned & set(held)


@pytest.mark.parametrize("task", ["letters", "next"])
def test_the_embedded_servers_text_is_no_clients(task: str) -> None:
    """The same question with its options in another order is the same question."""

    def instance(record: dict[str, str]) -> tuple[str, frozenset[str]]:
        question, *options = re.split(r" [ABCD]\. ", record["instruction"])
        return question, frozenset(options)

    recipe = load_recipe("quickstart", [f"data.source=embedded:{task}", "data.examples_per_client=16"])
    source = open_source(recipe.data, population=recipe.federation.population, seed=recipe.seed)
    held_out = open_evaluation(recipe, source)
    assert held_out is not None
    ours = {instance(record) for client in range(500) for record in source.client(client)}
    servers = {instance(record) for record in held_out(2000)}
    assert len(ours) > 5000  # enough to meet a tenth of any sample of the clients' questions
    assert len(servers) > 1500
    assert not ours & servers


def test_owners_of_a_field_are_the_files_own(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    source = open_source(sections.Data(source=str(path), client_field="site"), population=4, seed=0)
    for client in range(4):
        assert {record["site"] for record in source.client(client)} == {f"s{client}"}
    with pytest.raises(DataError, match=r"set federation\.population=4"):
        open_source(sections.Data(source=str(path), client_field="site"), population=5, seed=0)
    with pytest.raises(DataError, match="no field 'ward'"):
        open_source(sections.Data(source=str(path), client_field="ward"), population=4, seed=0)


@pytest.mark.parametrize("change", ["one more", "twice", "longer", "fewer"])
def test_a_change_of_one_owners_records_moves_no_other_owners(tmp_path: Path, change: str) -> None:
    """Else one patient's record would decide which records others train on: the sum would move by more than one clip."""
    records = [dict(record) for record in RECORDS]
    own = [number for number, record in enumerate(records) if record["site"] == "s1"]
    extra = {**records[own[0]], "instruction": "a new one"}
    changed = {
        "one more": [extra, *records],
        "twice": [*records, records[own[0]]],
        "longer": [{**record, "response": "x" * 500} if n in own else record for n, record in enumerate(records)],
        "fewer": [record for n, record in enumerate(records) if n not in own[:-1]],
    }[change]
    knobs = sections.Data(client_field="site", examples_per_client=3)
    before, after = (
        open_source(replace(knobs, source=str(write(tmp_path, rows, name))), population=4, seed=0)
        for name, rows in (("before.jsonl", records), ("after.jsonl", changed))
    )
    assert [before.client(client) for client in (0, 2, 3)] == [after.client(client) for client in (0, 2, 3)]
    other_seed = open_source(replace(knobs, source=str(tmp_path / "before.jsonl")), population=4, seed=1)
    assert [other_seed.client(client) for client in range(4)] != [before.client(client) for client in range(4)]


def test_owners_who_are_set_aside_are_no_clients_and_no_other_owner_decides_who(tmp_path: Path) -> None:
    records = [{**record, "site": f"s{number % 20:02d}"} for number, record in enumerate(RECORDS)]
    knobs = sections.Data(source=str(write(tmp_path, records)), client_field="site", examples_per_client=1000)
    source = file_source(knobs, population=14, seed=0, set_aside=0.25)
    aside = {record["site"] for record in source.held_out(1000)}
    assert len(source.held_out(1000)) == 4 * len(aside) == 24  # all of an owner's records, or none
    assert all(record["site"] not in aside for client in range(14) for record in source.client(client))
    assert len({record["site"] for record in source.held_out(8)}) > 2  # not one owner after the other
    # A further owner with other text leaves everybody else where they were.
    more = replace(knobs, source=str(write(tmp_path, [*records, {**records[0], "site": "s0"}], "more.jsonl")))
    assert {record["site"] for record in file_source(more, 15, 0, 0.25).held_out(1000)} == aside


def test_a_wrong_population_beside_owners_set_aside_names_the_right_one(tmp_path: Path) -> None:
    records = [{**record, "site": f"s{number % 20:02d}"} for number, record in enumerate(RECORDS)]
    knobs = sections.Data(source=str(write(tmp_path, records)), client_field="site")
    with pytest.raises(
        DataError,
        match=r"names 14 clients .* not counting 6 whom data\.held_out_share [^:]*: set federation.population=14",
    ):
        open_source(knobs, population=19, seed=0, set_aside=0.25)
    counted = open_source(
        knobs, population=20, seed=0, set_aside=0.25
    )  # all twenty, of whom six have nothing to train on
    assert [bool(counted.client(number)) for number in range(20)] == [True] * 14 + [False] * 6
    with pytest.raises(DataError, match=r"data\.held_out_share = 1e-09 sets none of the 20 owners"):
        open_source(knobs, population=20, seed=0, set_aside=1e-9)


def test_json_lists_and_missing_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "a", "response": "b"}] * 40))
    source = open_source(
        sections.Data(
            source=str(path),
        ),
        population=2,
        seed=0,
    )
    assert source.client(0)[0]["category"] == "none"
    path.write_text('[{"instruction": "a", "response": "b"}, {"instruction": "a"}]')
    with pytest.raises(DataError, match=r"data\.json, record 2: no field 'response'"):
        open_source(sections.Data(source=str(path)), population=1, seed=0)


def test_text_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"instruction": "a", "response": "b"}\n{"instruction": "\xff", "response": "b"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        open_source(sections.Data(source=str(path)), population=1, seed=0)


def test_hub_sources_go_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dolly"
    folder.mkdir()
    write(folder, RECORDS)
    source = open_source(sections.Data(source=f"hub:{folder}"), population=3, seed=0)
    assert sum(len(source.client(client)) for client in range(3)) > 0
    assert source.provenance == f"hub:{folder}"
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(sections.Data(source=f"hub:{tmp_path / 'nothing'}"), population=3, seed=0)


def test_another_split_of_a_hub_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dolly"
    folder.mkdir()
    write(folder, RECORDS)
    write(folder, [{**record, "instruction": "other"} for record in RECORDS[:40]], "test.jsonl")
    source = open_source(sections.Data(source=f"hub:{folder}:test"), population=2, seed=0)
    texts = [record["instruction"] for record in [*source.client(0), *source.client(1)]]
    assert set(texts) == {"other"}


def test_clients_can_own_a_benchmarks_split(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        for subject in ("anatomy", "virology"):
            rows = "".join(f'"{split} {i},\n{subject}?",a{i},b,c,d,{"ABCD"[i % 4]}\n' for i in range(20))
            (tmp_path / split / f"{subject}_{split}.csv").write_text(rows, encoding="utf-8")
    knobs = sections.Data(source=f"mmlu:{tmp_path}:dev", examples_per_client=100)
    source = open_source(knobs, population=3, seed=0)
    records = [record for client in range(3) for record in source.client(client)]
    assert len(records) == 40
    assert {record["category"] for record in records} == {"anatomy", "virology"}
    assert {
        "instruction": "dev 2,\nanatomy? A. a2 B. b C. c D. d",
        "context": "",
        "response": "C",
        "category": "anatomy",
    } in records
    assert source.provenance == f"mmlu:{tmp_path}, split dev"
    with pytest.raises(DataError, match="has no split 'auxiliary_train': choose one of dev, test"):
        open_source(sections.Data(source=f"mmlu:{tmp_path}"), population=3, seed=0)
    for where in ("", "embedded"):
        with pytest.raises(DataError, match=r"names no folder: write ceval:FOLDER or ceval:hub:ORG/NAME"):
            open_source(sections.Data(source=f"ceval:{where}"), population=3, seed=0)


@pytest.mark.parametrize(("name", "letters"), [("", True), (":letters", True), (":next", False), (":facts", False)])
def test_embedded_clients_teach_what_the_source_names(name: str, letters: bool) -> None:
    source = open_source(sections.Data(source=f"embedded{name}"), population=3, seed=1)
    responses = [record["response"] for client in range(3) for record in source.client(client)]
    assert all((text in "ABCD") == letters for text in responses)


def test_another_embedded_task_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^data\.source = 'embedded:poems' is not there: write embedded, "):
        open_source(sections.Data(source="embedded:poems"), population=3, seed=1)


SAME_OWNER = [
    ("3", 3, 3.0, "3.0", " 3 ", "3.00", "\u200b3"),
    ("Zo\u00e9 Meier", "Zoe\u0301 Meier", "Zo\u00e9 Meier ", "\tZo\u00e9  Meier", "Zo\u00e9\u00a0Meier"),
    ("p-07", "p-07\r", "\ufeffp-07"),
]


@pytest.mark.parametrize("spellings", SAME_OWNER)
def test_one_owner_in_several_spellings_is_one_client(tmp_path: Path, spellings: tuple[object, ...]) -> None:
    named = [*spellings, "another"]
    records = [{"instruction": f"q{n}", "response": "a", "patient": name} for n, name in enumerate(named)]
    path = write(tmp_path, records)  # type: ignore[arg-type]
    source = open_source(
        sections.Data(source=str(path), client_field="patient", examples_per_client=99), population=2, seed=0
    )
    owned = sorted(len(source.client(client)) for client in range(2))
    assert owned == [1, len(spellings)]


@pytest.mark.parametrize(
    "spellings",
    [("Meier", "MEIER"), ("7", "007"), ("Stra\u00dfe 1", "strasse 1"), ("\uff13", "3"), ("2.5", "2.50"), ("+4", "4")],
)
def test_owners_who_may_be_one_are_an_error_that_names_nobody(tmp_path: Path, spellings: tuple[str, str]) -> None:
    named = [*spellings, "another"]
    records = [{"instruction": f"q{n}", "response": "a", "patient": name} for n, name in enumerate(named)]
    for population in (2, 3):
        with pytest.raises(DataError, match=r"2 names in 'patient' of .* may be only 1 owner:") as refused:
            open_source(
                sections.Data(source=str(write(tmp_path, records)), client_field="patient"),
                population=population,
                seed=0,
            )
        assert "population" not in str(refused.value)
        assert not any(name in str(refused.value).replace(str(tmp_path), "") for name in named if len(name) > 2)


@pytest.mark.parametrize("name", [float("nan"), "", " ", "\u200b"])
def test_a_record_that_names_nobody_is_refused(tmp_path: Path, name: object) -> None:
    records = [{"instruction": f"q{n}", "response": "a", "patient": who} for n, who in enumerate(["p1", name])]
    with pytest.raises(DataError, match=r"record 2 of .*train\.jsonl, field 'patient': an empty name"):
        open_source(
            sections.Data(source=str(write(tmp_path, records)), client_field="patient"),  # type: ignore[arg-type]
            population=2,
            seed=0,
        )


@pytest.mark.parametrize(
    ("field", "fields", "row"),
    [
        ("player", {"instruction": "player", "response": "speech"}, {"speech": "a"}),
        ("input", {}, {"instruction": "q", "output": "a"}),
        ("category", {}, {"instruction": "q", "response": "a"}),
        ("system", {}, {"instruction": "q", "response": "a"}),
        ("title", {"text": "body"}, {"body": "a"}),
    ],
)
def test_owners_are_named_by_a_field_that_has_another_use(
    tmp_path: Path, field: str, fields: dict[str, str], row: dict[str, str]
) -> None:
    """The name is kept beside the text, and nothing stands in for one that is not there."""
    rows = [{**row, field: name} for name in ("Ann", "Bob", "Ann")]
    path = tmp_path / "records.jsonl"
    knobs = sections.Data(source=str(path), client_field=field, fields=tuple(fields.items()))
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    source = open_source(knobs, population=2, seed=0)
    assert [len(source.client(client)) for client in range(2)] == [2, 1]
    if field not in fields.values():
        for nobody, words in (
            (row, f"record 4 of .*records.jsonl has no field '{field}'"),
            ({**row, field: None}, f"line 4: null in '{field}'"),
        ):
            path.write_text("".join(json.dumps(record) + "\n" for record in (*rows, nobody)))
            with pytest.raises(DataError, match=words):
                open_source(knobs, population=2, seed=0)


@pytest.mark.parametrize("names", [(0, -0.0, 1), (1e16, 10**16), (1e20, "1e20"), ("12e4", 120000), ("3", "\uff13")])
def test_one_number_in_two_ways_is_refused(tmp_path: Path, names: tuple[object, ...]) -> None:
    records = [{"instruction": f"q{n}", "response": "a", "patient": who} for n, who in enumerate(names)]
    knobs = sections.Data(source=str(write(tmp_path, records)), client_field="patient")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"2 names in 'patient' of .* may be only 1 owner:"):
        open_source(knobs, population=len(names), seed=0)


@pytest.mark.parametrize(
    ("wrong", "kind"), [(True, "true or false"), (["p2"], "a list"), ({"id": 2}, "an object"), (None, "null")]
)
def test_an_owner_that_is_neither_text_nor_number_is_refused_with_its_place(
    tmp_path: Path, wrong: object, kind: str
) -> None:
    records = [{"instruction": f"q{n}", "response": "a", "patient": who} for n, who in enumerate(["p1", wrong])]
    path = write(tmp_path, records)  # type: ignore[arg-type]
    expected = f"{path}, line 2: {kind} in 'patient', where data.client_field expects an owner's name"
    with pytest.raises(DataError, match=re.escape(expected)):
        open_source(sections.Data(source=str(path), client_field="patient"), population=2, seed=0)
    assert open_source(
        sections.Data(source=str(path)), population=2, seed=0
    )  # a field that names no owner may be anything


def test_a_reply_that_rows_call_otherwise_names_no_owner(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"line 1: no field 'response', where data\.client_field expects an owner's name"
    ):
        open_source(sections.Data(source=str(path), client_field="response"), population=1, seed=0)


def test_a_tables_column_of_true_and_false_names_no_owners(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("instruction,response,smoker\nq0,a,True\nq1,a,False\nq2,a,true\n")
    with pytest.raises(
        DataError, match=r"'smoker' of .*notes\.csv has nothing but true and false where an owner's name"
    ):
        open_source(sections.Data(source=str(path), client_field="smoker"), population=2, seed=0)


def test_an_owners_key_is_its_own_key() -> None:
    for name in (3, 3.0, 2.5, " 3.0 ", "Zoe\u0301", "-4.0", "1e5", "07", "a.0"):
        assert owner_key(owner_key(name)) == owner_key(name)
    assert len({owner_key(name) for name in ("3", "4", "3.5", "p3", "-3", "a", "b", "3 4")}) == 8
    for wrong in (True, None, ["a"], float("inf")):
        with pytest.raises(DataError):
            owner_key(wrong)


def test_a_site_finds_each_of_its_clients_by_its_number_in_the_population() -> None:
    class Held:
        provenance = "here"

        def client(self, client: int) -> list[Record]:
            return [{"response": str(client)}]

    site = SiteSource(Held(), (3, 4, 9, 1_000_000))
    assert [site.client(client)[0]["response"] for client in site.clients] == ["0", "1", "2", "3"]
    for stranger in (0, 5, 10, 1_000_001):
        with pytest.raises(DataError, match=f"client {stranger} is none of this site's"):
            site.client(stranger)
