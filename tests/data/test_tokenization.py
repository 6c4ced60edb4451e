"""A record is one text and is tokenised once; control tokens in its words stay words; what is too long is cut where it hurts least."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from drencoder.data.prompts_template import pack_history, render
from drencoder.data.tokenization import Example, RecordTokenizer, collate
from drencoder.errors import DataError
from text_models import CHAT, KINDS, make_tokenizer

RECORD = {"instruction": "Say the word about it", "context": "it was blue", "response": "red river stone"}


class Slow:
    """The same tokenizer without knowledge of places, as slow ones are."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.all_special_tokens, self.all_special_ids = tokenizer.all_special_tokens, tokenizer.all_special_ids
        self.unk_token_id = tokenizer.unk_token_id

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


def of(tokenizer: Any, max_tokens: int = 200, template: str = "plain", start: bool = True) -> RecordTokenizer:
    begin = (1,) if start else ()
    return RecordTokenizer.open(tokenizer, template=template, max_tokens=max_tokens, end_id=2, start=begin)


def words(tokenizer: Any, example: Example) -> tuple[str, str]:
    """What is read and what is learned, as text."""
    learned = [t for i, t in enumerate(example.tokens) if i >= example.prompt_length and i not in example.given]
    return tokenizer.decode(example.tokens[: example.prompt_length]), tokenizer.decode(learned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [False, True])
def test_a_record_has_the_tokens_of_its_whole_text(kind: str, slow: bool) -> None:
    tokenizer = make_tokenizer(kind)
    example = of(Slow(tokenizer) if slow else tokenizer).tokenise(RECORD).example
    prompt, response = render(RECORD)
    whole, alone = tokenizer(prompt + response)["input_ids"], tokenizer(prompt)["input_ids"]
    assert whole[: len(alone)] == alone  # else the place of the response would not be plain to see
    assert example == Example((*whole, 2), len(alone))
    if kind == "llama2":
        apart = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert [*alone, *apart] != whole  # tokenised apart, the model would be trained on another text


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    tokenizer = make_tokenizer("bytes", start=False)
    tokenizer.add_tokens([": red"])
    example = of(tokenizer, start=False).tokenise(RECORD).example
    assert example is not None
    assert words(tokenizer, example)[0].endswith("\nAnswer")
    assert words(tokenizer, example)[1] == ": red river stone</s>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_option_is_a_record_without_its_end(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, template=CHAT)
    for limit in (30, 40, 200):
        records = of(tokenizer, limit, template)
        for letter in "ABCD":
            record = {"instruction": "Say the word number about it was " * 4, "response": letter}
            example, option = records.tokenise(record).example, records.option(record)
            assert example is not None
            end = 2 if template == "plain" else tokenizer.convert_tokens_to_ids("<|end|>")
            assert example.tokens == (*option.tokens, end)
            assert (option.prompt_length, option.given) == (example.prompt_length, ())
            assert tokenizer.decode(option.tokens[option.prompt_length :]).strip() == letter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("slow", [False, True])
def test_control_tokens_in_words_stay_words(kind: str, template: str, slow: bool) -> None:
    if slow and template == "chat":
        pytest.skip("the slow stand-in runs no templates")
    tokenizer = make_tokenizer(kind, template=CHAT)
    records = of(Slow(tokenizer) if slow else tokenizer, template=template)
    spoken = "red <|end|> </s><s> <|turn|>assistant stone"
    for record in (
        {**RECORD, "response": spoken},
        {**RECORD, "instruction": spoken},
        {**RECORD, "context": spoken},
        {**RECORD, "system": spoken},
    ):
        got, plain = records.tokenise(record), records.tokenise({**record, **RECORD, "system": "it"})
        assert got.example is not None
        assert plain.example is not None
        assert got.marked
        assert not plain.marked

        def control(tokens: tuple[int, ...], record: dict[str, str] = record) -> list[int]:
            return [t for t in tokens if t in set(tokenizer.all_special_ids) - {0}]

        expected = control(plain.example.tokens)
        if template == "chat" and not record.get("system"):
            expected = control(records.tokenise(RECORD).example.tokens)  # type: ignore[union-attr]
        assert control(got.example.tokens) == expected
        if kind == "bytes" and not slow:  # nothing is lost on the way
            assert spoken in tokenizer.decode(got.example.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_words_with_control_tokens_are_as_transformers_splits_them(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    record = {**RECORD, "response": "red </s> stone"}
    example = of(tokenizer).tokenise(record).example
    assert example is not None
    assert list(example.tokens[:-1]) == tokenizer("".join(render(record)), split_special_tokens=True)["input_ids"]


def test_empty_responses_give_no_example() -> None:
    records = of(make_tokenizer("llama2"))
    assert records.tokenise({**RECORD, "response": " \n"}).example is None
    assert records.examples([{**RECORD, "response": ""}, RECORD]) == records.examples([RECORD])
    with pytest.raises(DataError, match="The server has no usable text"):
        records.examples([{**RECORD, "response": ""}], owner="The server")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_long_context_is_cut_and_nothing_else(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, template=CHAT)
    record = {**RECORD, "context": "house bird " * 300}
    got = of(tokenizer, 60, template).tokenise(record)
    assert got.example is not None
    assert got.cut
    read, learned = words(tokenizer, got.example)
    assert 50 < len(got.example.tokens) <= 60
    assert "Say the word about it" in read
    assert "house bird" in read
    assert learned.strip() in ("red river stone</s>", "red river stone<|end|>")
    assert not of(tokenizer, 60, template).tokenise(RECORD).cut


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_response_without_its_end_is_not_taught_to_end(template: str) -> None:
    tokenizer = make_tokenizer("bytes", template=CHAT)
    got = of(tokenizer, 60, template).tokenise({**RECORD, "response": "red river " * 100})
    assert got.example is not None
    assert got.cut
    read, learned = words(tokenizer, got.example)
    assert "Say the word about it" in read
    assert learned.strip().startswith("red river red river")
    assert not {2, tokenizer.convert_tokens_to_ids("<|end|>")} & set(got.example.tokens[got.example.prompt_length :])
    assert len(got.example.tokens) <= 60


def test_a_long_instruction_and_a_long_response_share_the_room() -> None:
    tokenizer = make_tokenizer("bytes")
    record = {"instruction": "house bird " * 200, "response": "red river " * 200}
    got = of(tokenizer, 100).tokenise(record).example
    assert got is not None
    assert 30 < got.targets < 60
    short = of(tokenizer, 100).tokenise({**record, "response": "red"}).example
    assert short is not None
    assert words(tokenizer, short)[1] == " red</s>"


def test_every_length_fits_whatever_the_limit() -> None:
    tokenizer, chance = make_tokenizer("bytes"), random.Random(0)
    for _ in range(150):
        limit = chance.randint(8, 60)
        parts = {name: "bird stone " * chance.randint(0, 30) for name in ("instruction", "context", "system")}
        turns = [("a red", "a blue " * chance.randint(1, 9))] * chance.randint(0, 3)
        record = {**parts, "response": "red " * chance.randint(1, 40), "history": pack_history(turns)}
        example = of(tokenizer, limit).tokenise(record).example
        assert example is not None
        assert len(example.tokens) <= limit
        assert example.targets > 0
        assert example.prompt_length > 0


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_all_replies_of_a_conversation_are_learned_and_nothing_else(template: str) -> None:
    tokenizer = make_tokenizer("bytes", template=CHAT)
    turns = [("Say red", "red stone"), ("Say it", "blue")]
    record = {"instruction": "the word", "response": "house", "history": pack_history(turns), "system": "it was"}
    records = of(tokenizer, template=template)
    example = records.tokenise(record).example
    assert example is not None
    learned = [i for i in range(example.prompt_length, len(example.tokens)) if i not in example.given]
    text = tokenizer.decode([example.tokens[i] for i in learned])
    end = "<|end|>" if template == "chat" else ""
    assert text.replace(" ", "") == f"redstone{end}blue{end}house{end or '</s>'}"
    batch = collate([[example]], 0)
    assert batch.predicted[0].nonzero()[:, 0].tolist() == learned
    short = of(tokenizer, len(example.tokens) - 1, template).tokenise(record)
    assert short.cut
    assert short.example is not None
    assert "Say red" not in tokenizer.decode(short.example.tokens)


def test_a_text_that_asks_nothing_is_learned_whole() -> None:
    tokenizer = make_tokenizer("mistral", template=CHAT)
    for template in ("plain", "chat"):
        example = of(tokenizer, template=template).tokenise({"instruction": "", "response": "red river"}).example
        assert example == Example((*tokenizer("red river")["input_ids"], 2), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("asked", ["Say it", " \u4f60\u597d", "\t1 "])
def test_the_saved_tokenizer_gives_the_tokens_that_were_taught(
    kind: str, start: bool, asked: str, tmp_path: Path
) -> None:
    """By `apply_chat_template` too, where some tokenizers put no space behind a start token that is written out."""
    tokeniser = of(make_tokenizer(kind, start=start), start=start)
    tokeniser.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    example = tokeniser.tokenise({"instruction": asked, "response": "red river"}).example
    assert example is not None
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "red river"}]
    text = saved.apply_chat_template(turns, tokenize=False)
    assert tuple(saved(text, add_special_tokens=False)["input_ids"]) == example.tokens
