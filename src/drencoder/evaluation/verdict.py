"""Did the adapter learn? One sentence from the outcomes of base model and run, text by text. No torch."""

import math
from collections.abc import Mapping
from typing import Any

from drencoder.evaluation.statistics import ratio_of_sums

_FEWEST_TEXTS = 8  # an interval of fewer is itself a guess


def verdict(outcomes: Mapping[str, Mapping[str, Any]], uniform_loss: float, no_evaluation: str) -> str:
    """Compares "this run" with "base model", whose `losses` (nats) and `targets` (tokens) are of the same N texts.

    The interval is that of the paired difference: a ratio estimator over independent texts, 95 %.

    Args:
      uniform_loss: what guessing uniformly over the vocabulary gives, nats a token.
      no_evaluation: the sentence where there is no text.
    """
    base, run = outcomes["base model"], outcomes["this run"]
    if not base["losses"]:
        return no_evaluation
    before, after = (ratio_of_sums(one["losses"], one["targets"]) for one in (base, run))
    changes = [later - earlier for earlier, later in zip(base["losses"], run["losses"], strict=True)]
    change = ratio_of_sums(changes, base["targets"])
    numbers = (
        f"held-out loss {before.value:.3f} -> {after.value:.3f} (95 % interval of the difference {change.low:+.3f} to "
        f"{change.high:+.3f}; guessing uniformly gives {uniform_loss:.3f})"
    )
    if change.count < _FEWEST_TEXTS:
        return f"Whether the adapter learned cannot be told from {change.count} texts: {numbers}."
    if change.high < 0:
        return f"The adapter learned: {numbers}."
    if change.low > 0 or not any(changes):
        return f"The adapter did not learn: {numbers}."
    return f"Whether the adapter learned cannot be told: {numbers}."


def is_uniform_loss(value: Any) -> bool:
    """Whether a number can be the loss of guessing uniformly: the logarithm of a whole number above 1."""
    if type(value) is not float or not 0 < value < 50:
        return False
    size = math.exp(value)
    return size > 1.5 and math.isclose(size, round(size), rel_tol=1e-9)
