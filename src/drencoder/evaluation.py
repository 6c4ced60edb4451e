"""Held-out loss and multiple choice by log-likelihood, each with a confidence interval.

Everything here runs on data that the server holds; no client's text is touched.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.special import ndtri
from torch import Tensor

from drencoder.data.template import LETTER_CONTINUATIONS
from drencoder.data.world import Question, prompt_of
from drencoder.errors import DataError
from drencoder.examples import Example, collate, make_example
from drencoder.model import LoraModel

__all__ = ["Estimate", "choice_scores", "held_out_loss", "multiple_choice", "question_examples"]

_Z95 = float(ndtri(0.975))
# Tokens of one evaluation batch, padding included: keeps memory flat whatever the number of examples.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % confidence interval over `count` examples or questions."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@torch.no_grad()
def held_out_loss(lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example]) -> Estimate:
    """Mean cross-entropy (nats per response token), with the interval of a ratio of sums over examples.

    Raises:
      DataError: there is no example.
    """
    if not examples:
        raise DataError("there is no held-out example: raise evaluation.examples or give the server some data.")
    losses, targets = [0.0] * len(examples), [example.targets for example in examples]
    for indices in _batches(examples):
        batch = collate([[examples[index] for index in indices]], lora.base.pad_id).to(lora.device)
        with lora.stacked(_single(lora, adapter_D)):
            losses_M = lora.token_losses(batch)
        row_M = batch.predicted.nonzero()[:, 0]
        sums = torch.zeros(len(indices), device=losses_M.device).index_add(0, row_M, losses_M)
        for index, total in zip(indices, sums.tolist(), strict=True):
            losses[index] = total
    mean = sum(losses) / sum(targets)
    residuals = sum((loss - mean * count) ** 2 for loss, count in zip(losses, targets, strict=True))
    error = _Z95 * math.sqrt(residuals) / sum(targets)
    return Estimate(mean, mean - error, mean + error, len(examples))


def question_examples(lora: LoraModel, questions: Sequence[Question], max_tokens: int) -> list[list[Example]]:
    """For each question the four examples (prompt, letter), without an end token."""
    base = lora.base
    made = []
    for question in questions:
        prompt = prompt_of(question, "plain")
        options = [
            make_example(prompt, letter, base.tokenize, base.end_id, max_tokens) for letter in LETTER_CONTINUATIONS
        ]
        made.append([Example(option.tokens[:-1], option.prompt_length) for option in options if option is not None])
    return made


@torch.no_grad()
def choice_scores(lora: LoraModel, adapter_D: Tensor, options: Sequence[Sequence[Example]]) -> Tensor:
    """Log-likelihood (nats) of every option of every question, (questions, 4) float32.

    When all options of a question are one token after the same prompt, which letters are to most tokenizers, one pass
    over the prompt scores them all; otherwise each option is scored as a text of its own.
    """
    scores = torch.zeros(len(options), 4)
    single = [index for index, four in enumerate(options) if all(option.targets == 1 for option in four)]
    first = [options[index][0] for index in single]
    for indices in _batches(first):
        batch = collate([[first[i] for i in indices]], lora.base.pad_id).to(lora.device)
        with lora.stacked(_single(lora, adapter_D)):
            log_NV = lora.logits_before(batch.input_ids, batch.predicted).float().log_softmax(dim=-1)
        letters = torch.tensor([[option.tokens[-1] for option in options[single[i]]] for i in indices])
        scores[[single[i] for i in indices]] = log_NV.cpu().gather(1, letters)
    for index in sorted(set(range(len(options))) - set(single)):
        batch = collate([list(options[index])], lora.base.pad_id).to(lora.device)
        with lora.stacked(_single(lora, adapter_D)):
            losses_M = lora.token_losses(batch)
        row_M = batch.predicted.nonzero()[:, 0]
        scores[index] = -torch.zeros(4, device=losses_M.device).index_add(0, row_M, losses_M).cpu()
    return scores


def multiple_choice(
    lora: LoraModel, adapter_D: Tensor, options: Sequence[Sequence[Example]], answers: Sequence[int]
) -> Estimate:
    """Accuracy of the most likely option, with Wilson's interval (Wilson 1927).

    Raises:
      DataError: there is no question.
    """
    if not options:
        raise DataError("there is no multiple-choice question: raise evaluation.questions or name a benchmark.")
    picked = choice_scores(lora, adapter_D, options).argmax(dim=1).tolist()
    right = sum(pick == answer for pick, answer in zip(picked, answers, strict=True))
    n, share, z2 = len(options), right / len(options), _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, centre - half, centre + half, n)


def _single(lora: LoraModel, adapter_D: Tensor) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in lora.layout.unflatten(adapter_D.to(lora.device)).items()}


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `_BATCH_TOKENS` tokens each (but at least one example)."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(examples[index].tokens) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
