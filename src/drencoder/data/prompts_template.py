"""How a record becomes the one text that a model sees, without a chat template. Chat templates: `chat_template`.

A record holds `instruction` and `response`, and perhaps `context`, `system` and the earlier turns of a conversation (`history`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import final

PROMPT_ENDING = "\nAnswer:"
"""Closes every prompt, whatever its language, so that the reply always starts at the same cue."""

LETTERS = ("A", "B", "C", "D")
"""The response of a multiple-choice record is one of these."""

LETTER_CONTINUATIONS = tuple(f" {letter}" for letter in LETTERS)
"""What follows a multiple-choice prompt: score these four. Each is one token of the embedded tokenizer."""

PLAIN_TEMPLATE = (
    "{{ START }}{% set turns = namespace(first=true) %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'].strip() + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '' if turns.first else '\\n\\n' }}{% set turns.first = false %}"
    "{{ message['content'].strip() + '\\nAnswer:' }}"
    "{% else %}{{ ' ' + message['content'].strip() }}{{ eos_token if loop.last else '' }}{% endif %}{% endfor %}"
)
"""`PlainTemplate` as a chat template, which is saved with an adapter; START stands for what a tokenizer puts before a text."""


@final
@dataclass(frozen=True)
class Rendered:
    """One text, and which of its characters a model learns to write.

    `targets` are half-open ranges of characters, in order. With `ends` the tokenizer's end token follows the text and is
    learned, too. With `control`, control tokens in the text are meant as such: a template wrote them.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    ends: bool = True
    control: bool = False


def render(record: Mapping[str, str]) -> tuple[str, str]:
    """`(prompt, response)` of a record's last turn, without a chat template; the text is one after the other.

    The response begins with its separating space. A record that asks nothing is a text alone: its prompt is empty.
    """
    earlier = "".join(f"{user}{PROMPT_ENDING} {reply}\n\n" for user, reply in history_of(record))
    asked, response = asked_of(record), record["response"].strip()
    system = record.get("system", "").strip()
    if not (earlier or asked or system):
        return "", response
    return (f"{system}\n" if system else "") + earlier + asked + PROMPT_ENDING, " " + response


def render_pair(prompt: str, response: str) -> Rendered:
    """A prompt and its response as one text, of which the response and the end are learned."""
    return Rendered(prompt + response, ((len(prompt), len(prompt) + len(response)),))


def asked_of(record: Mapping[str, str]) -> str:
    """What a user says in a record's last turn: the instruction and, on a line of its own, the context."""
    parts = (record["instruction"].strip(), record.get("context", "").strip())
    return "\n".join(part for part in parts if part)


def history_of(record: Mapping[str, str]) -> list[tuple[str, str]]:
    """The earlier turns of a conversation, each what the user and what the assistant said."""
    turns = json.loads(record["history"]) if record.get("history") else []
    return [(user.strip(), reply.strip()) for user, reply in turns]


def pack_history(turns: Sequence[tuple[str, str]]) -> str:
    """Earlier turns as the text that a record's `history` holds; `history_of` reads it."""
    return json.dumps([list(turn) for turn in turns], ensure_ascii=False) if turns else ""


def are_learned(record: Mapping[str, str]) -> list[bool]:
    """Whether each reply is learned: those of the earlier turns, and the response, which always is.

    `unlearned` of a record has the other turns' places, counted from the last one, -1, so that they hold when the earliest turns are cut.
    """
    turns, unlearned = len(history_of(record)), json.loads(record.get("unlearned") or "[]")
    return [place - turns not in unlearned for place in range(turns + 1)]


@final
@dataclass(frozen=True)
class PlainTemplate:
    """Records as plain text: instruction, context, "Answer:" and the response."""

    def prompt(self, record: Mapping[str, str]) -> Rendered:
        """The text after which a model writes its response."""
        return Rendered(render({**record, "response": ""})[0], (), ends=False)

    def render(self, record: Mapping[str, str], *, whole: bool = True) -> Rendered:
        """A record's text. All replies are learned that `are_learned` names; the end as well unless the response is not `whole`."""
        prompt, response = render(record)
        targets, place = [], len(record.get("system", "").strip())
        place += bool(place)
        for user, reply in history_of(record):
            place += len(user) + len(PROMPT_ENDING)
            targets.append((place, place + 1 + len(reply)))
            place = targets[-1][1] + 2
        targets.append((len(prompt), len(prompt) + len(response)))
        return Rendered(prompt + response, tuple(compress(targets, are_learned(record))), ends=whole)
