"""Files of every format give the same records, and what is wrong with one is a sentence with its place, never with its words."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from drencoder.data.places import read_data
from drencoder.errors import DataError

ROWS = [
    {
        "instruction": f"What is {i}?",
        "context": "None" if i % 2 else "",
        "response": 'NA, "quoted"\nand 1.50',
        "category": "c",
    }
    for i in range(5)
]


def gzipped(text: str) -> bytes:
    """The same bytes whenever it is called: a test's name holds them, and workers compare names."""
    return gzip.compress(text.encode(), mtime=0)


def as_csv(rows: list[dict[str, str]], mark: str = ",") -> str:
    lines = [mark.join(rows[0])]
    lines += [mark.join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\r\n".join(lines) + "\r\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, split: str = "train", **fields: str) -> Any:
    return read_data(str(path), split=split, knob="data.source", fields=fields)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a.jsonl", "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("a", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\ufeff" + json.dumps({"version": 1, "data": ROWS})),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("A.CSV", as_csv(ROWS)),
        ("a.csv", "\ufeff" + as_csv(ROWS, ";")),
        ("a.csv", as_csv(ROWS).replace("\r\n", "\n", 1) + "\n"),
        ("a.tsv", as_csv(ROWS, "\t")),
        ("a.csv", as_csv(ROWS, "\t")),
        ("a.csv", as_csv(ROWS, "|")),
        ("a.csv", "\ufeffsep=;\r\n" + as_csv(ROWS, ";")),
        ("a.csv", as_csv([{**row, "a, b": ""} for row in ROWS], ";").replace("a, b", '"a, b"', 1)),
        ("a.jsonl.gz", gzipped("\n".join(map(json.dumps, ROWS)))),
        ("a.CSV.GZ", gzipped(as_csv(ROWS))),
    ],
)
def test_formats_give_the_same_records(name: str, content: str | bytes, tmp_path: Path) -> None:
    got = read(write(tmp_path / name, content))
    assert [{key: value for key, value in record.items() if key != "a, b"} for record in got.records] == ROWS
    assert got.schema == "Dolly (instruction, context, response)"
    assert got.changed == 0


def test_parquet_and_folders(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "one.parquet")
    assert read(tmp_path / "one.parquet").records == ROWS[:2]
    write(tmp_path / "two" / "part.jsonl", "\n".join(map(json.dumps, ROWS[2:])))
    write(tmp_path / "README.md", "about these files")
    write(tmp_path / ".hidden.csv", "x\n")
    assert read(tmp_path).records == ROWS
    talk = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(talk), tmp_path / "talk.parquet")
    assert read(tmp_path / "talk.parquet").records[0]["response"] == "b"
    odd = {"at": pa.array([10**18], pa.timestamp("us")), "who": pa.array([17]).cast(pa.decimal128(38, 0))}
    pq.write_table(pa.table({**{key: [value] for key, value in ROWS[0].items()}, **odd}), tmp_path / "odd.parquet")
    assert read(tmp_path / "odd.parquet").records == [{**ROWS[0], "who": "17"}]
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["instruction", "response", "response"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: two columns have the same name"):
        read(tmp_path / "twice.parquet")
    write(tmp_path / "torn.parquet", b"PAR1" + b"\0" * 30)
    with pytest.raises(DataError, match=r"torn\.parquet cannot be read as Parquet"):
        read(tmp_path / "torn.parquet")


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "test.csv", as_csv(ROWS[1:3]))
    write(tmp_path / "my.val.jsonl", json.dumps(ROWS[3]))
    write(tmp_path / "categories.json", '["not", "records"]')
    assert read(tmp_path).records == ROWS[:1]
    assert read(tmp_path, "test").records == ROWS[1:3]
    assert read(tmp_path, "validation").records == ROWS[3:4]
    (tmp_path / "train-00000-of-00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"no files of split 'train': name one of test, val as 'FOLDER:SPLIT'"):
        read(tmp_path)


def test_a_split_may_be_a_folder_and_only_data_are_read(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0000.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "Test" / "deeper" / "0000.jsonl", json.dumps(ROWS[1]))
    for name in ("train/.cache/0000.jsonl", "train/.ipynb_checkpoints/0.jsonl", "__MACOSX/train/._0000.jsonl"):
        write(tmp_path / name, json.dumps(ROWS[2]))
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json", "train/notes.txt"):
        write(tmp_path / name, "{}")
    assert read(tmp_path).records == ROWS[:1]
    assert read(tmp_path, "test").records == ROWS[1:2]


def test_what_the_datasets_library_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both").records == ROWS[:3]
    assert read(tmp_path / "both", "test").records == ROWS[3:]


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_a_file_of_arrow_is_read_as_its_streams_are(name: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(ROWS)
    with arrow.ipc.new_file(str(tmp_path / name), table.schema) as writer:
        writer.write_table(table.slice(0, 2))
        writer.write_table(table.slice(2))
    assert read(tmp_path / name).records == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"instruction": "secret", "response": "b"}\n{"instruction": "secret\xff", "response": "b"}\n', "line 2: not UTF-8"),
        ("a.csv", "instruction,response\r\nsecret,b".encode("utf-16"), "line 1: not UTF-8"),
        ("a.jsonl", '{"instruction": "secret", "response": "b"}\n{"instruction": "secret"', r"line 2: not valid JSON"),
        ("a.json", '[\n{"instruction": "secret",\n "response": }\n]', r"line 3: not valid JSON"),
        ("a.jsonl", '{"instruction": "secret", "response": ' + "1" * 5000 + "}", "a whole number of more than 300 digits"),
        ("a.jsonl", "[" * 90_000, "nested more than 64 levels deep"),
        ("b.json", "[" * 90_000, "nested more than 64 levels deep"),
        ("a.jsonl", '{"instruction": "secret", "response": "b", "who": "secret", "who": "x"}', "line 1: an object has two values of one name"),
        ("a.csv.gz", gzipped("instruction,response\nsecret,b\n" * 99)[:-9], "not a whole gzip file"),
        ("a.arrow", b"secret", "cannot be read as Arrow"),
        ("a.arrow", b"ARROW1secret", "cannot be read as Arrow"),
        ("a.zip", b"PK\x03\x04secret", "is packed, and not with gzip: unpack it"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdsecret", "is packed, and not with gzip: unpack it"),
        ("a.xlsx", b"PK\x03\x04secret", "is a workbook of a spreadsheet program: save its sheet there as CSV"),
        ("a.csv", "sep=;\ninstruction;response\nsecret;b\nsecret;b;c\n", "line 4: 3 values for 2 columns"),
        ("a.json", '{"train": [{"instruction": "secret"}], "Test": []}', r"an object of splits \(train, Test\) instead of a list"),
        ("a.jsonl", '{"messages": "[secret"}', "line 1: the text in 'messages' is no list of messages in JSON"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "secret"}]}', "message 2: a tool instead of a text: drencoder learns no images"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "", "tool_calls": ["secret"]}]}', "message 1: a tool instead of a text"),
        ("a.jsonl", '{"prompt": "a", "chosen": "secret", "rejected": "b"}', r'Of preferences set data.fields = \{ response = "chosen" \}'),
        ("a.jsonl", '{"chosen": [{"secret": 1}], "rejected": []}', r'Of preferences set data.fields = \{ messages = "chosen" \}'),
        ("a.jsonl", '{"translation": {"de": "secret"}}', r"has a path, such as 'translation\.de' or 'answers\.text\.0'"),
        ("a.jsonl", '{"question": "secret", "answer": ["b"]}', r"'answer' but a list: .* in data\.fields \('answer\.0' is the first\)"),
        ("a.json", "null", "null instead of a list of records"),
        ("a.json", '["secret"]', "record 1: a text instead of a record"),
        ("a.jsonl", '{"instruction": "secret", "response": 3}', r"line 1: no text in 'response' but a number"),
        ("a.jsonl", '{"instruction": "secret", "response": true}', "but true or false"),
        ("a.jsonl", '{"instruction": "secret", "response": null}', "but null"),
        ("a.jsonl", '{"instruction": ["secret"], "response": "b"}', r"'instruction' but a list"),
        ("a.jsonl", '{"instruction": "a", "input": {"secret": 1}, "output": "b"}', r"'input' but an object"),
        ("a.jsonl", '{"instruction": "a", "response": "b"}\n{"instruction": "secret"}', "line 2: no field 'response'"),
        ("a.jsonl", '{"instruction": "secret", "x": 1}', r"line 1: no field replies \(there are instruction and 1 of other names\)"),
        ("a.jsonl", '{"title": "secret", "body": "b"}', r"line 1: no field asks and no field replies \(there are title, body\)"),
        ("a.csv", "secret words of a patient,and more of it\nx,y\n", r"line 2: no field asks and no field replies \(there are 2 of other names\): known"),
        ("a.csv", "secret,secretly,c\nx,y,z\n", r"line 2: no field asks and no field replies \(there are 3 of other names\): known"),
        ("a.json", '{"secret": {"instruction": "a"}, "secrets": {}}', r"record 1: no field asks .* 2 of other names"),
        ("a.csv", "instruction,response\na,b,secret\n", "line 2: 3 values for 2 columns"),
        ("a.csv", 'instruction,response\na,b\n"secret"x,b\n', "line 3: not valid CSV"),
        ("a.csv", 'instruction,response\na,"secret\n', "line 2: not valid CSV"),
        ("a.csv", "instruction,response,response\na,b,secret\n", "two columns have the same name"),
        ("a.csv", "instruction,response\n", "holds no records"),
        ("a.csv", "question,A,B,C,D,answer\nsecret,1,2,3,4,A\n", "mmlu:FOLDER"),
        ("a.jsonl", "", "holds no records"),
        ("a.txt", "secret words", "of no known format"),
        ("a.jsonl", '{"messages": "secret"}', r"'messages' is a text instead of a list"),
        ("a.jsonl", '{"messages": ["secret"]}', "message 1: a text instead of a message"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', "message 1: null instead of a text: drencoder learns no images"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image", "image": "secret"}]}]}', "message 1: a list instead of a text: drencoder learns no images"),
        ("a.jsonl", '{"messages": [{"role": "secret", "content": "a"}]}', "message 1: its role is none of system, developer, user"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_sentence(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert "secret" not in message
    assert "\n" not in message
    assert name in message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, words in {
        tmp_path / "absent.jsonl": "does not exist",
        tmp_path / ("x" * 300): "cannot be read",
        Path("a\0b.jsonl"): "cannot be read",
        tmp_path: "is a folder without data files",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.source is empty"):
        read_data(" ", knob="data.source")
