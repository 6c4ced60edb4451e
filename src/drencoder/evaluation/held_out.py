"""Held-out loss and multiple choice by log-likelihood: outcomes per item, and estimates built on them.

Everything here runs on data that the server holds; no client's text is touched. Legend: N texts, Q questions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drencoder.data.embedded_world.world import Question, record_of
from drencoder.data.prompts_template import LETTERS
from drencoder.data.tokenization import Example, RecordTokenizer, collate
from drencoder.errors import DataError
from drencoder.evaluation.statistics import Estimate, ratio_of_sums
from drencoder.models.base_model import BaseModel
from drencoder.models.lora import LoraModel

# Tokens of one evaluation batch, padding included: keeps memory flat whatever the number of examples.
_BATCH_TOKENS = 8192
_BATCH_LOGITS = 1 << 26  # predicted tokens times vocabulary: 256 MiB


@torch.no_grad()
def held_out_outcomes(lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Each example's cross-entropy, summed over its response tokens (nats), and how many those are; both (N,)."""
    losses = [0.0] * len(examples)
    for indices in _batches(examples, lora.base):
        sums = _summed_losses(lora, adapter_D, [examples[index] for index in indices])
        for index, total in zip(indices, sums.tolist(), strict=True):
            losses[index] = total
    return losses, [example.targets for example in examples]


def held_out_loss(lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example]) -> Estimate:
    """Mean cross-entropy (nats per response token), with the interval of a ratio of sums over examples.

    Raises:
      DataError: there is no example.
    """
    if not examples:
        raise DataError("there is no held-out example: raise evaluation.examples or give the server some data.")
    return ratio_of_sums(*held_out_outcomes(lora, adapter_D, examples))


def question_examples(tokenizer: RecordTokenizer, questions: Sequence[Question]) -> list[list[Example]]:
    """Every question with each of its four letters, tokenised as clients' records are, zero-shot, without what ends a response.

    Returns (Q, 4) examples. The letters are the tokens that they are in the rendered text.
    """
    return [
        [tokenizer.option({**record_of(question), "response": letter}) for letter in LETTERS] for question in questions
    ]


@torch.no_grad()
def choice_scores(lora: LoraModel, adapter_D: Tensor, options: Sequence[Sequence[Example]]) -> Tensor:
    """Log-likelihood (nats) of every option of every question, (questions, 4) float32.

    When all options of a question are one token after the same prompt, which letters are to most tokenizers, one pass
    over the prompt scores them all; otherwise each option is scored as a text of its own.
    """
    scores = torch.zeros(len(options), 4)
    single = [index for index, four in enumerate(options) if _is_one_token(four)]
    first = [options[index][0] for index in single]
    for indices in _batches(first, lora.base):
        batch = collate([[first[i] for i in indices]], lora.base.pad_id).to(lora.device)
        with lora.stacked(_single(lora, adapter_D)):
            log_NV = lora.logits_before(batch.input_ids, batch.predicted).float().log_softmax(dim=-1)
        letters = torch.tensor([[option.tokens[-1] for option in options[single[i]]] for i in indices])
        scores[[single[i] for i in indices]] = log_NV.cpu().gather(1, letters)
    for index in sorted(set(range(len(options))) - set(single)):
        scores[index] = -_summed_losses(lora, adapter_D, options[index]).cpu()
    return scores


def _is_one_token(options: Sequence[Example]) -> bool:
    """Whether the options differ in nothing but one last token."""
    return all(option.targets == 1 for option in options) and len({option.tokens[:-1] for option in options}) == 1


def choice_picks(lora: LoraModel, adapter_D: Tensor, options: Sequence[Sequence[Example]]) -> list[int]:
    """The most likely option of each question, (Q,) indices 0 to 3; the first of equals."""
    return choice_scores(lora, adapter_D, options).argmax(dim=1).tolist()


def _summed_losses(lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example]) -> Tensor:
    """Each example's loss (N,), summed over its response tokens, in one batch."""
    batch = collate([list(examples)], lora.base.pad_id).to(lora.device)
    with lora.stacked(_single(lora, adapter_D)):
        losses_M = lora.token_losses(batch)
    row_M = batch.predicted.nonzero()[:, 0]
    return torch.zeros(len(examples), device=losses_M.device).index_add(0, row_M, losses_M)


def _single(lora: LoraModel, adapter_D: Tensor) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in lora.layout.unflatten(adapter_D.to(lora.device)).items()}


def _batches(examples: Sequence[Example], base: BaseModel) -> Iterator[list[int]]:
    """Indices in batches of similar length, of at most `_BATCH_TOKENS` tokens and `_BATCH_LOGITS` logits (but at least one example).

    A model that `mixes_texts` gets one example at a time: its loss is that of the example, whatever else is measured.
    """
    vocabulary, most_tokens = base.vocabulary, 0 if base.mixes_texts else _BATCH_TOKENS
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    batch: list[int] = []
    logits = 0
    for index in order:
        own = examples[index].targets * vocabulary
        if batch and ((len(batch) + 1) * len(examples[index].tokens) > most_tokens or logits + own > _BATCH_LOGITS):
            yield batch
            batch, logits = [], 0
        batch.append(index)
        logits += own
    if batch:
        yield batch
