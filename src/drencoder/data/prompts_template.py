"""How a record in Dolly's schema becomes the text that a model sees: one function for training and for benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

PROMPT_ENDING = "\nAnswer:"
"""Closes every prompt, whatever its language, so that the reply always starts at the same cue."""

LETTERS = ("A", "B", "C", "D")
"""The response of a multiple-choice record is one of these."""

LETTER_CONTINUATIONS = tuple(f" {letter}" for letter in LETTERS)
"""What follows a multiple-choice prompt: score these four. Each is one token of the embedded tokenizer."""


def render(record: Mapping[str, str]) -> tuple[str, str]:
    """``(prompt, response)`` of a record with ``instruction``, ``response`` and perhaps ``context``.

    The text of a training example is ``prompt + response`` and then the tokenizer's end-of-text token.
    The response begins with its separating space, so that encoding both parts apart or together is the same.
    """
    parts = [record["instruction"].strip(), record.get("context", "").strip()]
    prompt = "\n".join(part for part in parts if part) + PROMPT_ENDING
    return prompt, " " + record["response"].strip()
