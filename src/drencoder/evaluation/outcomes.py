"""How good a model is on the server's data: outcomes item by item, so that two models can be compared in pairs.

Legend: N held-out texts, Q questions of a benchmark, D adapter values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drencoder.data.tokenization import Example
from drencoder.errors import ModelError
from drencoder.evaluation.held_out import choice_picks, held_out_outcomes
from drencoder.evaluation.statistics import outcome_estimates
from drencoder.models.lora import LoraModel


@dataclass(frozen=True)
class Outcomes:
    """`losses` (N,): nats, summed over each text's `targets` (N,) tokens; `right`: benchmark -> (Q,) answered rightly.

    N is 0 without evaluation data.
    """

    losses: list[float]
    targets: list[int]
    right: dict[str, list[bool]]

    def estimates(self) -> dict[str, Any]:
        """Held-out loss and the accuracy on each benchmark, with 95 % intervals, as the certificate has them."""
        return outcome_estimates(self.losses, self.targets, self.right)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; right answers as 0 and 1."""
        return {**asdict(self), "right": {name: list(map(int, hits)) for name, hits in self.right.items()}}


Questions = Mapping[str, tuple[list[list[Example]], list[int]]]  # benchmark -> (four options a question, answers)


def measure(lora: LoraModel, adapter_D: Tensor, held_out: Sequence[Example], questions: Questions) -> Outcomes:
    """Runs the server's held-out texts and all questions through the base model with one adapter.

    Raises:
      ModelError: the adapter is broken, so that a loss is not finite.
    """
    losses, targets = held_out_outcomes(lora, adapter_D, held_out)
    if not all(map(math.isfinite, losses)):
        raise ModelError("the held-out loss is not finite, so the training diverged: lower server.learning_rate.")
    right = {}
    for name, (options, answers) in questions.items():
        picks = choice_picks(lora, adapter_D, options)
        right[name] = [pick == answer for pick, answer in zip(picks, answers, strict=True)]
    return Outcomes(losses, targets, right)


def measure_all(
    lora: LoraModel, adapter_D: Tensor, held_out: Sequence[Example], questions: Questions
) -> dict[str, Outcomes]:
    """The base model, the untouched adapter (they must agree) and this run."""
    zero_D = torch.zeros_like(lora.initial_D)
    models = {"base model": zero_D, "zero update": lora.initial_D, "this run": adapter_D}
    return {name: measure(lora, vector_D, held_out, questions) for name, vector_D in models.items()}
