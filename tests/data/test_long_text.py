"""Records far longer than a model can read: the tokens that are kept are those of the whole record, at the cost of the kept ones."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drencoder.data import long_text
from drencoder.data.long_text import find_middle, safe_delimiters
from drencoder.data.prompts_template import history_of, pack_history
from drencoder.data.tokenization import RecordTokenizer, Tokenised
from drencoder.models.place import embedded_folder
from text_models import CHAT, WORDS

LEAST_WORK = 100_000  # characters that may be tokenised of a record of millions
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
_GPT4 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MORE = [
    "don't", "1234567", "naïve", "Übergröße", "日本語", "我们，今天", "привет", "x=[1,2]", "https://a.b/c?d=e", "\t", "  ", "\n\n", "...", "—",
    "🙂", "e\u0301", "</think>", "A.B.C.",
]  # fmt: skip


def texts(count: int, length: int, seed: int) -> Iterator[str]:
    """Words of several scripts, numbers and white space of all kinds, at random."""
    chance = random.Random(seed)
    for _ in range(count):
        rare = chance.choice([0.0, 0.05, 0.5])
        parts, size = [], 0
        while size < length:
            word = chance.choice(MORE if chance.random() < rare else WORDS)
            if chance.random() < 0.2:
                word = "".join(chance.choice(LETTERS) for _ in range(chance.randint(1, 12)))
            parts.append(word + chance.choice([" ", " ", " ", " ", ", ", ". ", "\n", "  ", ""]))
            size += len(parts[-1])
        yield "".join(parts)


def _corpus() -> list[str]:
    return [*texts(60, 400, 1), *(" ".join(WORDS[i : i + 6]) for i in range(len(WORDS)))]


def _byte_level(regex: str = "") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if regex:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )  # fmt: skip
    return tokenizer


def _across_words() -> Tokenizer:
    """Tokens reach over words, as where a tokenizer was trained without splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _sentencepiece(*, split: bool) -> Tokenizer:
    """Trained on words and used on the whole text at once, as LLaMA-2's converted tokenizer is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list("▁\n" + LETTERS), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if not split:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list("▁" + LETTERS), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _corpus(), trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level of GPT-4": lambda: _byte_level(_GPT4),
    "sentencepiece": lambda: _sentencepiece(split=True),
    "sentencepiece, the whole text at once": lambda: _sentencepiece(split=False),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "across words": _across_words,
}
_MADE: dict[str, PreTrainedTokenizerFast] = {}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind not in _MADE:
        _MADE[kind] = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            additional_special_tokens=["<|turn|>", "<|end|>"],
        )  # fmt: skip
        _MADE[kind].chat_template = CHAT
    return _MADE[kind]


class Counted:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.seen = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **named: Any) -> Any:
        self.seen += len(text)
        return self._tokenizer(text, **named)


def of(tokenizer: Any, template: str, max_tokens: int) -> RecordTokenizer:
    return RecordTokenizer.open(tokenizer, template=template, max_tokens=max_tokens, end_id=2, start=())


def whole(tokeniser: RecordTokenizer, record: dict[str, str]) -> Tokenised:
    """What becomes of a record that is tokenised whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "_LONG", 10**9)
        return tokeniser.tokenise(record)


def records(seed: int, length: int) -> Iterator[dict[str, str]]:
    """Records of which one part, or more, is long."""
    chance = random.Random(seed)
    long, other = texts(2, length, seed)
    (short,) = texts(1, 40, seed)
    turns = [(other if chance.random() < 0.5 else short, short), (short, long if chance.random() < 0.5 else short)]
    yield {"instruction": short, "response": long}
    yield {"instruction": long, "response": short}
    yield {"instruction": "", "response": long}
    yield {"instruction": short, "context": long, "response": short}
    yield {"instruction": long, "context": other, "response": long}
    yield {"instruction": short, "system": long, "response": short}
    yield {"instruction": other, "system": long, "history": pack_history(turns), "response": other}
    yield {"instruction": short, "history": pack_history(turns), "response": short, "context": short}


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_tokens_are_those_of_the_whole_record(kind: str, template: str) -> None:
    counted = Counted(tokenizer_of(kind))
    tokeniser, shorter, seen = of(counted, template, 40), 0, 0
    for seed in range(2):
        for record in records(seed, 9_000):
            start, counted.seen = counted.seen, 0
            quick = tokeniser.tokenise(record)
            seen, counted.seen = counted.seen, 0
            assert quick == whole(tokeniser, record)
            shorter += seen < counted.seen / 2
            counted.seen += start + seen
    assert (shorter > 9) == (kind != "across words")  # else nothing was tried


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_million_characters_cost_what_is_kept_of_them(template: str) -> None:
    counted = Counted(tokenizer_of("byte-level of GPT-4"))
    (long,) = texts(1, 1_000_000, 7)
    tokeniser = of(counted, template, 64)
    for record in (
        {"instruction": "Say", "response": long},
        {"instruction": "Say", "context": long, "response": long},
        {"instruction": "Say", "history": pack_history([(long, "yes")] * 2), "response": "no"},
    ):
        counted.seen = 0
        tokenised = tokeniser.tokenise(record)
        assert tokenised.cut
        assert counted.seen < LEAST_WORK


def test_words_without_a_safe_place_are_tokenised_whole() -> None:
    counted = Counted(tokenizer_of("byte-level"))
    tokeniser = of(counted, "plain", 40)
    for words in ("x" * 20_000, "日本語" * 8_000, "1 2 3 4 " * 3_000, "red </s> " * 3_000):
        record = {"instruction": "Say", "response": words}
        counted.seen = 0
        quick = tokeniser.tokenise(record)
        assert counted.seen > len(words)
        assert quick == whole(tokeniser, record)


def test_a_template_that_shows_other_words_than_the_record_has_is_left_alone() -> None:
    """Some templates drop what stands before a mark in a reply, which may be in the middle."""
    tokenizer = tokenizer_of("byte-level")
    template = CHAT.replace("message['content'] | trim", "message['content'].split('</think>')[-1] | trim")
    tokenizer.chat_template = template
    try:
        long, other = texts(2, 9_000, 3)
        record = {"instruction": f"{long} </think> {other}", "response": "yes"}
        tokeniser = of(tokenizer, "chat", 40)
        assert tokeniser.tokenise(record) == whole(tokeniser, record)
    finally:
        tokenizer.chat_template = CHAT


@pytest.mark.parametrize(
    ("vocabulary", "unsafe"),
    [
        (["Ġa", "a", "ĊĠ", "ĠĠ", "12", "Ġ1", "."], ""),
        (["Ġa", "aĠb"], " "),
        (["Ġa", "aĊ"], "\n"),
        (["▁a", "a", "▁▁", "▁3"], ""),
        (["▁a", "a▁b"], " "),
        (["a", "们。"], "。"),
        (["a", "a7", "x1b"], "17"),
        (["Ġa", "".join(["ä", "»", "¬", "ï", "¼", "Į"])], "，"),  # 们， in GPT-2's letters for bytes
        (["Ġa", "".join(["¬", "ï", "¼", "Į"])], "，"),  # the last byte of a letter, and the mark
    ],
)
def test_a_delimiter_is_safe_if_no_token_has_it_behind_a_letter(vocabulary: list[str], unsafe: str) -> None:
    assert set(safe_delimiters(vocabulary)) == set(" \n。，0123456789") - set(unsafe)


def test_a_long_record_is_tokenised_once() -> None:
    counted = Counted(tokenizer_of("byte-level"))
    tokeniser = of(counted, "plain", 40)
    record = {"instruction": "Say", "response": "x" * 120_000}  # without a safe place
    first, seen = tokeniser.tokenise(record), counted.seen
    assert tokeniser.tokenise(dict(record)) == first
    assert counted.seen == seen
    assert tokeniser.tokenise({**record, "instruction": "Ask"}) != first


def test_a_middle_leaves_more_tokens_than_are_kept() -> None:
    words = "word " * 20_000

    def places(text: str) -> list[tuple[int, int]]:  # a token for each 60 characters: few
        return [(at, at + 1) for at in range(0, len(text), 60)]

    found = find_middle(words, " ", 40, places)
    assert found is not None
    first, last = found
    assert len(places(words[:first])) > 40
    assert words[first] == words[last] == " "
    assert find_middle(words, "", 40, places) is None
    assert find_middle(words, " ", 4_000, places) is None
    assert find_middle(words, " ", 40, lambda text: [(0, len(text))]) is None  # a token across every place


@pytest.mark.parametrize("template", ["plain", "auto"])
def test_the_embedded_tokenizer_too(template: str) -> None:
    _check_folder(embedded_folder(), template)


@pytest.mark.skipif("DRENCODER_TEST_MODELS" not in os.environ, reason="DRENCODER_TEST_MODELS names no folders")
@pytest.mark.parametrize("template", ["plain", "auto"])
def test_tokenizers_of_real_models(template: str) -> None:
    for folder in os.environ["DRENCODER_TEST_MODELS"].split(os.pathsep):
        _check_folder(Path(folder), template)


def _check_folder(folder: Path, template: str) -> None:
    tokeniser = of(AutoTokenizer.from_pretrained(folder), template, 60)
    for seed in range(2):
        for record in records(seed, 12_000):
            assert tokeniser.tokenise(record) == whole(tokeniser, record), folder


@pytest.mark.skipif("DRENCODER_TEST_DATA" not in os.environ, reason="DRENCODER_TEST_DATA names no folder with dolly/")
def test_long_texts_of_people() -> None:
    words = []
    for path in sorted((Path(os.environ["DRENCODER_TEST_DATA"]) / "dolly").glob("*.jsonl"))[:1]:
        with path.open(encoding="utf-8") as lines:
            words = [json.loads(line)["response"] for line, _ in zip(lines, range(3_000), strict=False)]
    assert words
    for kind in KINDS:
        tokeniser = of(tokenizer_of(kind), "chat", 40)
        for start in range(0, 3_000, 300):
            text = "\n".join(words[start : start + 40])
            for record in ({"instruction": text, "response": "so"}, {"instruction": "why?", "response": text}):
                assert tokeniser.tokenise(record) == whole(tokeniser, record)
                assert history_of(record) == []
