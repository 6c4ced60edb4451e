"""Scores against a direct computation, and intervals against their definition."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch.nn import functional

from conftest import random_examples, tiny_base
from drencoder.data.embedded_world.world import World, prompt_of, record_of
from drencoder.data.prompts_template import LETTER_CONTINUATIONS
from drencoder.data.tokenization import Example
from drencoder.errors import DataError
from drencoder.evaluation.held_out import (
    choice_scores,
    held_out_loss,
    held_out_outcomes,
    question_examples,
)
from drencoder.evaluation.outcomes import measure
from drencoder.models.base_model import load_base, open_tokenizer
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config


def tiny_lora() -> LoraModel:
    return LoraModel(tiny_base(), config.Adapter(rank=2), seed=0)


def test_held_out_loss_is_the_mean_over_response_tokens() -> None:
    lora, examples = tiny_lora(), random_examples(30, 1)
    estimate = held_out_loss(lora, lora.initial_D, examples)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.tokens])
        with torch.no_grad():
            logits = lora.base.model(input_ids=ids).logits[0]
        start = example.prompt_length
        loss = functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
        total, count = total + loss.item(), count + example.targets
    assert estimate.value == pytest.approx(total / count, rel=1e-5)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.count == 30


def test_one_pass_over_the_prompt_scores_like_four_whole_texts() -> None:
    lora = tiny_lora()
    prompts = random_examples(12, 2)
    single = [
        [Example((*p.tokens[: p.prompt_length], letter), p.prompt_length) for letter in (5, 6, 7, 8)] for p in prompts
    ]
    quick = choice_scores(lora, lora.initial_D, single)
    for row, options in zip(quick, single, strict=True):
        for score, option in zip(row, options, strict=True):
            ids = torch.tensor([option.tokens])
            with torch.no_grad():
                log_p = lora.base.model(input_ids=ids).logits[0, -2].log_softmax(-1)
            assert score.item() == pytest.approx(log_p[option.tokens[-1]].item(), abs=1e-4)


def test_options_of_several_tokens_are_scored_as_texts() -> None:
    lora = tiny_lora()
    options = [[Example((3, 4, 5, 6 + i, 9), 3) for i in range(4)]]
    scores = choice_scores(lora, lora.initial_D, options)[0]
    for score, option in zip(scores, options[0], strict=True):
        ids = torch.tensor([option.tokens])
        with torch.no_grad():
            log_p = lora.base.model(input_ids=ids).logits[0].log_softmax(-1)
        expected = log_p[2, option.tokens[3]] + log_p[3, option.tokens[4]]
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)


def test_accuracy_and_wilson_interval() -> None:
    lora = tiny_lora()
    options = [[Example((2 + i, 3, 10 + j), 2) for j in range(4)] for i in range(40)]
    picks = choice_scores(lora, lora.initial_D, options).argmax(1).tolist()
    answers = [pick if i < 30 else (pick + 1) % 4 for i, pick in enumerate(picks)]
    outcomes = measure(lora, lora.initial_D, [], {"mmlu": (options, answers)})
    assert outcomes.right["mmlu"] == [True] * 30 + [False] * 10
    estimate = outcomes.estimates()["accuracy"]["mmlu"]
    assert estimate["value"] == 0.75
    z = 1.959963984540054
    for bound in (estimate["low"], estimate["high"]):  # Wilson's bounds solve |p_hat - p| = z sqrt(p (1 - p) / n)
        assert abs(0.75 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 40), rel=1e-6)


def test_nothing_to_evaluate_is_one_sentence() -> None:
    lora = tiny_lora()
    with pytest.raises(DataError, match="no held-out example"):
        held_out_loss(lora, lora.initial_D, [])


def test_questions_are_asked_as_clients_records_are(tiny_folder: Path) -> None:
    base = load_base(config.Model(source=str(tiny_folder)))
    question = World().benchmark("mmlu", count=1, seed=0)[0]
    (options,) = question_examples(open_tokenizer(base, config.Data(max_tokens=512)), [question])
    prompt = prompt_of(question, "plain")
    for option, letter in zip(options, LETTER_CONTINUATIONS, strict=True):
        assert base.tokenizer.decode(option.tokens) == prompt + letter


def test_outcomes_are_the_losses_of_single_texts() -> None:
    lora, examples = tiny_lora(), random_examples(20, 7)
    losses, targets = held_out_outcomes(lora, lora.initial_D, examples)
    assert targets == [example.targets for example in examples]
    for loss, example in zip(losses, examples, strict=True):
        alone = held_out_loss(lora, lora.initial_D, [example])
        assert alone.value * example.targets == pytest.approx(loss, rel=1e-4)
    assert held_out_loss(lora, lora.initial_D, examples).value == pytest.approx(sum(losses) / sum(targets))


@pytest.mark.parametrize("starts", [False, True])
def test_a_plain_question_is_cut_as_a_clients_record_is(tiny_folder: Path, starts: bool) -> None:
    base = load_base(config.Model(source=str(tiny_folder)))
    if starts:  # as LLaMA's tokenizer puts a token before every text
        base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", base.end_id)]
        )
    assert base.start_ids == ((base.end_id,) if starts else ())
    for question in World().benchmark("ceval", count=8, seed=1):
        for limit in (12, 40, 400):
            tokenizer = open_tokenizer(base, config.Data(max_tokens=limit))
            record = tokenizer.tokenise(record_of(question)).example
            option = question_examples(tokenizer, [question])[0][question.answer]
            assert record is not None
            assert option.tokens == record.tokens[:-1]
            assert option.prompt_length == record.prompt_length
            assert record.tokens[: len(base.start_ids)] == base.start_ids
            assert len(record.tokens) <= limit
