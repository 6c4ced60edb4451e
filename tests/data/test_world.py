"""The embedded world: deterministic, disjoint, balanced, made on demand, and readable by the shipped tokenizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest

import drencoder
from drencoder.data.embedded_world.subjects import all_subjects, world_tables
from drencoder.data.embedded_world.world import BENCHMARKS, Question, World, prompt_of, record_of
from drencoder.data.prompts_template import LETTER_CONTINUATIONS, LETTERS, PROMPT_ENDING, render

EMBEDDED = Path(drencoder.__file__).parent / "embedded"
RECORD_KEYS = {"instruction", "context", "response", "category"}


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED)


def clients(world: World, num: int = 300, alpha: float = 0.5) -> list[dict[str, str]]:
    return [r for c in range(num) for r in world.client_records(c, count=8, alpha=alpha, seed=0)]


def instance(record: dict[str, str]) -> tuple[str, frozenset[str]]:
    """Question and set of options, whatever their order."""
    text, options = record["instruction"].split(" A. ")
    for letter in "BCD":
        options = options.replace(f" {letter}. ", "|")
    return text, frozenset(options.split("|"))


def test_two_worlds_of_one_seed_are_equal_and_seeds_differ(world: World) -> None:
    again = World(0)
    assert list(islice(again.documents(3), 50)) == list(islice(world.documents(3), 50))
    assert list(islice(world.documents(4), 50)) != list(islice(world.documents(3), 50))
    assert clients(again, 5) == clients(world, 5)
    assert world.client_records(1, count=8, alpha=0.5, seed=1) != world.client_records(1, count=8, alpha=0.5, seed=0)
    assert again.held_out_records(40, seed=2) == world.held_out_records(40, seed=2)
    assert again.benchmark("ceval", count=40, seed=2) == world.benchmark("ceval", count=40, seed=2)
    assert World(1).facts("global_facts") != world.facts("global_facts")


def test_a_client_does_not_depend_on_who_was_asked_before(world: World) -> None:
    alone = World(0).client_records(9_999, count=6, alpha=0.3, seed=5)
    clients(world, 20)
    assert world.client_records(9_999, count=6, alpha=0.3, seed=5) == alone


def test_client_held_out_and_benchmark_instances_are_disjoint(world: World) -> None:
    ours = {instance(r) for r in clients(world)}
    held_out = {instance(r) for seed in (0, 1) for r in world.held_out_records(500, seed=seed)}
    asked = {
        instance(record_of(q))
        for name in BENCHMARKS
        for seed in (0, 1)
        for q in world.benchmark(name, count=500, seed=seed)
    }
    assert len(ours) > 1000
    assert not ours & held_out
    assert not ours & asked
    assert not held_out & asked


def test_the_general_part_never_asks_for_a_letter_in_kept_subjects(world: World) -> None:
    kept = {stem.format(key) for s in all_subjects() if s.kept for stem in s.stems for key, _ in world.facts(s.name)}
    starts = re.compile("|".join(re.escape(question) for question in sorted(kept)))
    answered_in_words = 0
    for prompt, response in islice(world.documents(0), 20_000):
        if starts.match(prompt):
            assert response.strip() not in LETTERS
            answered_in_words += 1
    assert answered_in_words > 1000


def test_the_general_part_contains_no_held_out_instance(world: World) -> None:
    held_out = {r["instruction"] for r in world.held_out_records(2000, seed=0)}
    assert not any(p.removesuffix(PROMPT_ENDING) in held_out for p, _ in islice(world.documents(1), 20_000))


def test_records_have_dollys_schema(world: World) -> None:
    kept = {s.name for s in all_subjects() if s.kept}
    for record in clients(world, 30) + world.held_out_records(100, seed=0):
        assert set(record) == RECORD_KEYS
        assert record["category"] in kept
        assert record["response"] in LETTERS
        assert all(isinstance(value, str) for value in record.values())


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kept", [True, False])
def test_a_question_has_four_choices_and_one_right_answer(world: World, name: str, kept: bool) -> None:
    by_name = {s.name: s for s in all_subjects()}
    questions = world.benchmark(name, count=400, seed=0, kept=kept)
    assert len(set(questions)) == 400
    for q in questions:
        subject = by_name[q.subject]
        assert (subject.kept, subject.language, q.language) == (kept, BENCHMARKS[name], BENCHMARKS[name])
        assert len(set(q.choices)) == 4
        right = {answer for key, answer in world.facts(q.subject) for s in subject.stems if s.format(key) == q.question}
        assert right & set(q.choices) == {q.choices[q.answer]}
    assert {q.subject for q in questions} == {
        s.name for s in all_subjects() if (s.kept, s.language) == (kept, q.language)
    }


def test_answers_are_balanced(world: World) -> None:
    counts = Counter(r["response"] for r in clients(world, 500))
    assert all(900 < counts[letter] < 1100 for letter in LETTERS)
    for name in BENCHMARKS:
        assert set(Counter(q.answer for q in world.benchmark(name, count=400, seed=0)).values()) == {100}
    assert set(Counter(r["response"] for r in world.held_out_records(400, seed=0)).values()) == {100}


def test_a_population_costs_nothing_until_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = World.question

    def counted(self, subject, rng, **arguments):
        drawn.append(subject.name)
        return draw(self, subject, rng, **arguments)

    monkeypatch.setattr(World, "question", counted)
    fresh = World(0)
    fresh.documents(0)
    assert not drawn
    fresh.client_records(9_999, count=4, alpha=0.5, seed=0)
    assert len(drawn) == 4


def test_skew_grows_as_alpha_falls(world: World) -> None:
    def mean_top_share(alpha: float) -> float:
        tops = []
        for c in range(200):
            records = world.client_records(c, count=10, alpha=alpha, seed=0)
            tops.append(max(Counter(r["category"] for r in records).values()) / 10)
        return sum(tops) / len(tops)

    shares = [mean_top_share(alpha) for alpha in (1e-4, 0.1, 1.0, 100.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] < 0.35


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_impossible_alpha_is_refused(world: World, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        world.client_records(0, count=1, alpha=alpha, seed=0)


def test_an_unknown_benchmark_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="mmlu"):
        world.benchmark("gsm8k", count=1, seed=0)


def test_tiny_alpha_and_no_records_are_fine(world: World) -> None:
    assert world.client_records(0, count=0, alpha=0.5, seed=0) == []
    assert len({r["category"] for r in world.client_records(0, count=8, alpha=1e-300, seed=0)}) == 1


def test_both_languages_and_a_dozen_subjects() -> None:
    assert len(all_subjects()) >= 12
    assert len({s.name for s in all_subjects()}) == len(all_subjects())
    for language in ("en", "zh"):
        for kept in (True, False):
            assert sum(s.language == language and s.kept == kept for s in all_subjects()) >= 4


def test_the_file_of_the_tables_says_everything_once() -> None:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        assert len(set(names)) == len(names), names  # JSON would keep the last of two answers without a word
        return dict(pairs)

    tables = json.loads((EMBEDDED / "world.json").read_text("utf-8"), object_pairs_hook=once)
    for subject in tables["subjects"]:
        assert len({"facts", "cycles", "sums", "invented"} & set(subject)) == 1
        assert {"name", "language", "kept", "stems"} < set(subject)
        assert all(stem.count("{}") == 1 for stem in subject["stems"])
    assert world_tables().version == json.loads((EMBEDDED / "provenance.json").read_text("utf-8"))["world_version"]


def test_the_tables_are_read_when_they_are_asked_for_and_not_before() -> None:
    code = (
        "from drencoder.data.embedded_world import subjects, world; assert not subjects.world_tables.cache_info().misses;"
        "world.World(0); assert subjects.world_tables.cache_info().misses == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_world_of_version_1_is_the_one_that_the_embedded_model_learned(world: World) -> None:
    """The generated texts themselves: another digest means a new version, a new base model and new golden numbers."""
    texts = sha256()
    for document in islice(world.documents(3), 500):
        texts.update(repr(document).encode())
    for task in ("letters", "next", "facts"):
        texts.update(repr(world.client_records(4, count=40, alpha=0.5, seed=1, task=task)).encode())
        texts.update(repr(world.held_out_records(40, seed=2, task=task)).encode())
    for name in BENCHMARKS:
        texts.update(repr(world.benchmark(name, count=40, seed=2)).encode())
    assert (world_tables().version, texts.hexdigest()) == (
        "1",
        "8d85b739a436ed445eae6e8846e7d31a7f8fadebca6df2937e6218a47a1fca64",
    )


def test_every_key_has_one_answer_and_every_subject_enough_choices(world: World) -> None:
    for subject in all_subjects():
        table = world.facts(subject.name)
        assert len(dict(table)) == len(table)
        assert len({answer for _, answer in table}) >= 4
        assert not {answer for _, answer in table} & set(LETTERS)


def test_the_template_serves_real_records_too() -> None:
    record = {"instruction": "Who won?", "context": "Team A won.\n", "response": "Team A", "category": "closed_qa"}
    assert render(record) == ("Who won?\nTeam A won.\nAnswer:", " Team A")
    assert render({"instruction": "Who won?", "response": "B"}) == ("Who won?\nAnswer:", " B")


def test_a_benchmark_prompt_is_a_client_prompt() -> None:
    question = Question("nutrition", "What kind of food is rice?", ("grain", "fruit", "meat", "dairy"), 0, "en")
    assert prompt_of(question) == "What kind of food is rice? A. grain B. fruit C. meat D. dairy\nAnswer:"
    assert prompt_of(question) == render(record_of(question))[0]
    assert prompt_of(question, "letter").endswith("D. dairy Give the letter.\nAnswer:")


def test_the_tokenizer_is_lossless(world: World, tokenizer) -> None:
    texts = ["".join(document) for document in islice(world.documents(9), 300)]
    texts += ["".join(render(record)) for record in clients(world, 40)]
    texts += [
        "",
        " ",
        "\t\n  x",
        "Ærøskøbing – naïve café?",
        "今天天气很好。",
        "emoji 🙂 \x00",
        "a  b\r\n\n c",
        "١٢٣ Straße",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_prompt_and_response_encode_apart_as_together(world: World, tokenizer) -> None:
    for prompt, response in [render(r) for r in clients(world, 40)] + list(islice(world.documents(9), 300)):
        apart = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, response)]
        assert apart[0] + apart[1] == tokenizer(prompt + response, add_special_tokens=False).input_ids
        assert len(apart[0]) <= 48


def test_letters_are_single_tokens(tokenizer) -> None:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in LETTER_CONTINUATIONS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == 4
    assert tokenizer.eos_token_id is not None


def test_the_shipped_model_loads_and_is_small() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) < 8_000_000
