"""Tokenised training examples and how they become one padded batch.

Legend: K clients (1 outside cohort training), R examples of each, L tokens. Padding is on the right, where
causal attention never looks, so no attention mask is needed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drencoder.errors import DataError

__all__ = ["Batch", "Example", "collate", "make_example", "make_examples"]


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and response; only the response (with its end) is predicted."""

    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Batch:
    """`input_ids` (K*R, L) int64; `predicted` (K*R, L) bool: token l is a target, predicted from l - 1."""

    input_ids: Tensor
    predicted: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.predicted.to(device))


def make_example(
    prompt: str,
    response: str,
    tokenize: Callable[[str], list[int]],
    end_id: int,
    max_tokens: int,
    start: Sequence[int] = (),
) -> Example | None:
    """Tokenises one record; None when its response is empty: a client must not train on a bare end token.

    `start` holds the tokens that every text of this model begins with, if any. A prompt that does not fit loses its
    beginning (but not `start`); a response that does not fit alone loses its end.
    """
    response_ids = tokenize(response)
    if not response.strip() or not response_ids:
        return None
    prompt_ids = tokenize(prompt)
    response_ids = [*response_ids, end_id][: max(1, max_tokens - 1 - len(start))]
    room = max(0, max_tokens - len(response_ids) - len(start))
    prompt_ids = [*start, *prompt_ids[len(prompt_ids) - min(room, len(prompt_ids)) :]]
    prompt_ids = prompt_ids or [end_id]  # something must stand before the first predicted token
    return Example((*prompt_ids, *response_ids), len(prompt_ids))


def make_examples(
    rendered: Iterable[tuple[str, str]],
    tokenize: Callable[[str], list[int]],
    end_id: int,
    max_tokens: int,
    *,
    owner: str = "",
    start: Sequence[int] = (),
) -> list[Example]:
    """Tokenises the rendered records of one owner; records with an empty response are left out.

    Raises:
      DataError: no record is left, and `owner` names whose they are. Without a name that is no error: a client without
        text sends a zero update.
    """
    tokenised = (make_example(prompt, response, tokenize, end_id, max_tokens, start) for prompt, response in rendered)
    examples = [example for example in tokenised if example is not None]
    if owner and not examples:
        raise DataError(
            f"{owner} has no usable text: every record's response is empty. Give it at least one record with a "
            "non-empty response."
        )
    return examples


def collate(rows: Sequence[Sequence[Example]], pad_id: int, length: int = 1) -> Batch:
    """Lays K clients' examples into one (K*R, L) batch; missing examples are rows of padding.

    R is the largest number of examples of a client, and L the longest example of all but at least `length`.
    """
    width = max((len(row) for row in rows), default=0)
    longest = max((len(example.tokens) for row in rows for example in row), default=1)
    length = max(length, longest)
    input_ids = torch.full((len(rows) * width, length), pad_id, dtype=torch.int64)
    predicted = torch.zeros((len(rows) * width, length), dtype=torch.bool)
    for k, row in enumerate(rows):
        for r, example in enumerate(row):
            line = k * width + r
            input_ids[line, : len(example.tokens)] = torch.tensor(example.tokens)
            predicted[line, example.prompt_length : len(example.tokens)] = True
    return Batch(input_ids, predicted)
