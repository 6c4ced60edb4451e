"""What a model answers to a prompt: for people, who see in three answers what a loss does not say.

Legend: D adapter values, L tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drencoder.data.tokenization import RecordTokenizer
from drencoder.errors import ModelError
from drencoder.models.lora import LoraModel


@dataclass(frozen=True)
class Answer:
    """`ended`: whether the model ended its answer itself; if not, it was cut at the most tokens that were asked for."""

    text: str
    tokens: int
    prompt_tokens: int
    ended: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def answer(
    lora: LoraModel,
    adapter_D: Tensor,
    tokenizer: RecordTokenizer,
    record: Mapping[str, str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answer:
    """What base and adapter answer to a record's prompt.

    Args:
      record: its `response` is not read.
      max_tokens: of the answer.
      temperature: 0 = always the most likely token; else tokens are drawn, by `seed`.

    Raises:
      DataError: the chat template refuses the record.
      ModelError: the prompt leaves the model no position.
    """
    base = lora.base
    prompt_ids = tokenizer.prompt({**record, "response": ""})
    most = len(prompt_ids) + max_tokens
    if base.positions:
        most = min(most, base.positions)
    if most <= len(prompt_ids):
        raise ModelError(
            f"the prompt has {len(prompt_ids)} tokens and the model {base.positions} positions: ask with a shorter text."
        )
    generator = torch.Generator().manual_seed(seed) if temperature else None
    with lora.peft(adapter_D):
        stop = tokenizer.stop_id
        whole = base.complete(torch.tensor([prompt_ids]), most, generator, temperature or 1.0, stop=stop)[0].tolist()
    ids = whole[len(prompt_ids) :]
    ended = bool({base.end_id, stop} & set(ids))
    words = base.words_of(ids).strip()
    return Answer(words, len(ids) - ended, len(prompt_ids), ended)
