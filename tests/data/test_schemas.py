"""Schemas are recognised by their fields' names, mapped by `data.fields`, and named."""

import json
from typing import Any

import pytest

from drencoder.data.prompts_template import PlainTemplate, history_of
from drencoder.data.schemas import Records, to_records
from drencoder.errors import DataError


def records_of(*rows: Any, **fields: str) -> Records:
    return to_records(((f"file, line {n}", row) for n, row in enumerate(rows, start=1)), fields, origin="file")


def talk(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: speaker, content: words} for speaker, words in turns]


TALK = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
SHARED = (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))


@pytest.mark.parametrize(
    ("row", "schema", "text"),
    [
        ({"instruction": "a", "context": "b", "response": "c"}, "Dolly (instruction, context, response)", "a\nb\nAnswer: c"),
        ({"instruction": "a", "input": "b", "output": "c"}, "Alpaca (instruction, input, output)", "a\nb\nAnswer: c"),
        ({"instruction": "a", "input": None, "output": "c"}, "Alpaca (instruction, input, output)", "a\nAnswer: c"),
        ({"instruction": "a", "input": "b", "response": "c"}, "Dolly (instruction, input, response)", "a\nb\nAnswer: c"),
        ({"prompt": "a", "completion": "c"}, "prompt and completion (prompt, completion)", "a\nAnswer: c"),
        ({"question": "a", "answer": "c"}, "question and answer (question, answer)", "a\nAnswer: c"),
        ({"system_prompt": "s", "question": "a", "response": "c"}, "question and response (system_prompt, question, response)", "s\na\nAnswer: c"),
        ({"text": "a", "label": 3}, "plain text (text)", "a"),
        ({"messages": talk(*TALK)}, "chat messages (messages)", "s\na\nAnswer: b\n\nc\nAnswer: d"),
        ({"conversations": talk(*SHARED, role="from", content="value"), "id": 7}, "ShareGPT conversations (conversations)", "a\nAnswer: b\n\nc\nAnswer: d"),
        ({"input": "a", "output": "c"}, "input and output (input, output)", "a\nAnswer: c"),
        ({"input": "a", "context": "b", "output": "c"}, "input and output (input, context, output)", "a\nb\nAnswer: c"),
        ({"messages": talk(*TALK), "system": "t"}, "chat messages (system, messages)", "t\n\ns\na\nAnswer: b\n\nc\nAnswer: d"),
        ({"conversations": talk(*SHARED, role="from", content="value"), "system": "s"}, "ShareGPT conversations (system, conversations)", "s\na\nAnswer: b\n\nc\nAnswer: d"),
        ({"prompt": talk(*TALK[:-1]), "completion": talk(TALK[-1])}, "prompt and completion as messages (prompt, completion)", "s\na\nAnswer: b\n\nc\nAnswer: d"),
        ({"messages": talk(("developer", "s"), ("user", "a"), ("assistant", "b"))}, "chat messages (messages)", "s\na\nAnswer: b"),
        ({"messages": [{"role": role, "content": [{"type": "text", "text": text} for text in texts]} for role, texts in (("user", "xy"), ("assistant", "b"))]}, "chat messages (messages)", "xy\nAnswer: b"),
        ({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}, "Alpaca (instruction, input, output)", "a\nAnswer: b\n\nc\nAnswer: d"),
    ],
)  # fmt: skip
def test_schemas_are_recognised(row: dict[str, Any], schema: str, text: str) -> None:
    got = records_of(row)
    assert got.schema == schema
    rendered = PlainTemplate().render(got.records[0])
    assert rendered.text == text
    replies = [text[first:last].strip() for first, last in rendered.targets]
    assert replies == ([text] if "text" in row else [reply for reply in "bd" if f"Answer: {reply}" in text] or ["c"])


@pytest.mark.parametrize(
    ("fields", "row", "text"),
    [
        ({"instruction": "title", "response": "body"}, {"title": "a", "body": "c"}, "a\nAnswer: c"),
        ({"instruction": "title"}, {"title": "a", "answer": "c", "question": "x"}, "a\nAnswer: c"),
        ({"response": "category", "instruction": "text"}, {"text": "a", "category": "c"}, "a\nAnswer: c"),
        ({"context": "passage"}, {"question": "a", "passage": "b", "answer": "c"}, "a\nb\nAnswer: c"),
        ({"text": "body"}, {"title": "a", "body": "c"}, "c"),
        ({"messages": "dialogue"}, {"dialogue": talk(("user", "a"), ("assistant", "c"))}, "a\nAnswer: c"),
        ({"instruction": "text", "response": "reply"}, {"text": "a", "reply": "c", "messages": []}, "a\nAnswer: c"),
        (
            {"instruction": "translation.de", "response": "translation.fr"},
            {"translation": {"de": "a", "fr": "c"}},
            "a\nAnswer: c",
        ),
        ({"response": "answers.text.1"}, {"question": "a", "answers": {"text": ["b", "c"]}}, "a\nAnswer: c"),
        ({"response": "a.b"}, {"question": "a", "a.b": "c", "a": {"b": "x"}}, "a\nAnswer: c"),
        ({"response": "chosen"}, {"prompt": "a", "chosen": "c", "rejected": "b"}, "a\nAnswer: c"),
        ({"messages": "chosen"}, {"prompt": "a", "chosen": talk(("user", "a"), ("assistant", "c"))}, "a\nAnswer: c"),
        ({"messages": "talk"}, {"talk": json.dumps(talk(("user", "a"), ("assistant", "c")))}, "a\nAnswer: c"),
    ],
)
def test_fields_map_anything_else(fields: dict[str, str], row: dict[str, Any], text: str) -> None:
    assert PlainTemplate().render(records_of(row, **fields).records[0]).text == text


def test_fields_that_are_not_there_are_one_sentence() -> None:
    with pytest.raises(DataError, match=r"line 1: no field .body., which data\.fields names as response"):
        records_of({"title": "a"}, instruction="title", response="body")


def test_one_field_cannot_ask_and_reply() -> None:
    with pytest.raises(DataError, match=r"data\.fields names 'answer' as instruction and response: one field"):
        records_of({"question": "a", "answer": "c"}, instruction="answer", response="answer")


def test_a_path_that_leads_nowhere_is_one_sentence_and_a_list_without_an_answer_is_empty() -> None:
    rows = [{"question": "a", "answers": {"text": ["c"]}}, {"question": "b", "answers": {"text": []}}]
    assert [one["response"] for one in records_of(*rows, response="answers.text.0").records] == ["c", ""]
    for path in ("answers.words.0", "answers.text.first", "question.0"):
        with pytest.raises(DataError, match=rf"line 1: no field '{path}', which data\.fields names as response"):
            records_of(*rows, response=path)


def test_an_owner_may_be_named_inside_a_nested_field() -> None:
    rows = [("file, line 1", {"text": "a", "meta": {"ward": 7}}), ("file, line 2", {"text": "b", "meta": {}})]
    got = to_records(rows, {}, origin="file", owners={"meta.ward": "data.client_field"})
    assert [record.get("meta.ward") for record in got.records] == ["7", None]


def weighted(*weights: float | None) -> list[dict[str, Any]]:
    """Replies r0, r1 ... with these weights, as files for OpenAI's fine-tuning have them."""
    said = []
    for n, weight in enumerate(weights):
        said += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"r{n}", "weight": weight}]
    return said


@pytest.mark.parametrize(
    ("weights", "learned", "left_out"),
    [
        ((1, 1, 1), ["r0", "r1", "r2"], False),
        ((0, None, 1), ["r1", "r2"], False),
        ((1, 0.0, 1), ["r0", "r2"], False),
        ((0, 0, 1), ["r2"], False),
        ((0, 1, 0), ["r1"], True),
        ((0, 0), [""], True),
    ],
)
def test_a_reply_of_weight_zero_is_read_and_not_learned(
    weights: tuple[float | None, ...], learned: list[str], left_out: bool
) -> None:
    got = records_of({"messages": weighted(*weights), "unlearned": "x"})
    assert got.changed == left_out
    rendered = PlainTemplate().render(got.records[0])
    assert [rendered.text[first:last].strip() for first, last in rendered.targets] == learned
    assert all(f"r{n}" in rendered.text for n in range(len(weights) - left_out)) or learned == [""]


def test_replies_in_a_row_are_learned_if_each_of_them_is() -> None:
    said = [*weighted(1, 1)[:2], {"role": "assistant", "content": "more", "weight": 0}, *weighted(1, 1)[2:]]
    rendered = PlainTemplate().render(records_of({"messages": said}).records[0])
    assert [rendered.text[first:last] for first, last in rendered.targets] == [" r1"]
    assert "r0\n\nmore" in rendered.text


def test_other_fields_are_kept_and_values_stay_what_they_are() -> None:
    row = {
        "instruction": " None ",
        "response": "NA",
        "patient": 17,
        "ratio": 1.5,
        "none": None,
        "nested": [1],
        "history": "x",
    }
    (record,) = records_of(row).records
    assert record == {
        "instruction": " None ", "response": "NA", "context": "", "category": "none", "patient": "17", "ratio": "1.5",
    }  # fmt: skip


def test_halves_of_characters_are_replaced_and_counted() -> None:
    got = records_of(
        {"instruction": "a \ud83d", "response": "b", "who": "x"},
        {"instruction": "a \U0001f600", "response": "b", "who": "x"},
        {"instruction": "a", "response": "b", "who": "\udc80"},
    )
    assert got.changed == 2
    assert [record["instruction"] for record in got.records] == ["a \ufffd", "a \U0001f600", "a"]
    assert got.records[2]["who"] == "\ufffd"


def test_messages_that_nothing_replies_to_are_left_out() -> None:
    said = (("assistant", "hello"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
    got = records_of({"messages": talk(*said)}, {"messages": talk(("user", "a"))}, {"messages": []})
    assert got.changed == 2
    assert (got.records[0]["instruction"], got.records[0]["response"]) == ("a\n\nb", "c")
    assert history_of(got.records[0]) == []
    assert [record["response"] for record in got.records[1:]] == ["", ""]


def test_empty_messages_teach_nothing() -> None:
    said = talk(("system", " "), ("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c"))
    got = records_of({"messages": said}, {"messages": said[1:3]})
    assert got.changed == 2
    assert [(record["instruction"], record["response"]) for record in got.records] == [("a\n\nb", "c"), ("", "")]
    earlier = {"instruction": "c", "output": "d", "history": [["a", ""], ["x", "y"]]}
    assert history_of(records_of(earlier).records[0]) == [("x", "y")]


def test_fields_of_another_source_do_not_apply_to_text_of_the_server() -> None:
    rows = [("file, line 1", {"instruction": "a", "response": "c"})]
    got = to_records(rows, {"instruction": "title", "response": "body"}, origin="file", strict=False)
    assert got.schema == "Dolly (instruction, response)"
    same = [("file, line 1", {"title": "a", "body": "c"})]
    mapped = to_records(same, {"instruction": "title", "response": "body"}, origin="file", strict=False)
    assert mapped.records[0]["response"] == "c"
