"""A tokenizer's chat template, or one from a file: records become its messages, and of its text the replies are learned.

Templates run in the sandbox of transformers (`apply_chat_template`), which a tokenizer brings along; this file imports nothing of
it. A template's text contains control tokens. Control tokens in a record's own words must stay words: they are rendered with a
mark inside, behind their first letter, which `tokenization` takes out again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, final

from drencoder.data.prompts_template import (
    PLAIN_TEMPLATE,
    PlainTemplate,
    Rendered,
    are_learned,
    asked_of,
    history_of,
    render,
)
from drencoder.errors import DataError
from drencoder.reading import cut, read_text, reason

MARK = "\ue000"
"""Breaks up a control token in a user's text. A private-use character; where a text has it already, it is replaced."""

TEMPLATES = ("auto", "chat", "plain")
"""What `data.template` can be beside a file."""

NO_TEMPLATE = "data.template = 'chat', but this model's tokenizer has no chat template: set data.template = 'plain', or give a .jinja file."

_START, _END = "\ue001", "\ue002"  # around replies, to find them in a rendered text
_PRIVATE = re.compile(f"[{MARK}{_START}{_END}]")
_PROBE = {"instruction": "What is asked?", "response": "What is replied."}


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches each control token of a tokenizer, the longest first; None if it has none."""
    tokens = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    tokens |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False)}
    tokens.discard("")
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def mark_control_tokens(text: str, control: re.Pattern[str] | None) -> str:
    """The text with `MARK` inside of each control token, so that none of them is one any more."""
    text = _PRIVATE.sub("\ufffd", text)
    return control.sub(lambda match: match[0][0] + MARK + match[0][1:], text) if control else text


@final
@dataclass(frozen=True)
class ChatTemplate:
    """Records as a chat template's messages: system, user, assistant.

    Args:
      tokenizer: of transformers; it runs the template.
      source: the template's text; None = the tokenizer's own.
      name: of the template, for messages.
    """

    tokenizer: Any
    source: str | None
    name: str
    control: re.Pattern[str] | None

    def prompt(self, record: Mapping[str, str]) -> Rendered:
        """The text after which a model writes its response."""
        return Rendered(self._apply(self._messages(record)[:-1], prompt=True), (), ends=False, control=True)

    def render(self, record: Mapping[str, str], *, whole: bool = True) -> Rendered:
        """A record's text. All replies that `are_learned` names are learned with the control token that ends their turn.

        A template that ends a turn with no control token leaves that to the tokenizer's end token. A response that is not
        `whole` ends nothing.

        Raises:
          DataError: the template refuses the record's messages, or does not show what was replied.
        """
        if not render(record)[0]:  # a text that asks nothing
            return PlainTemplate().render(record, whole=whole)
        messages = self._messages(record)
        text, replies = self._apply(messages), [m["content"] for m in messages if m["role"] == "assistant"]
        prompt = self._apply(messages[:-1], prompt=True)
        start = len(prompt) if text.startswith(prompt) else None
        if len(replies) == 1 and start is not None and text.startswith(replies[0], start):
            spans = [(start, start + len(replies[0]))]
        else:
            spans = self._find_replies(messages, text)
            if start is not None and start <= spans[-1][0]:  # a template may begin a reply itself, with a space, say
                spans[-1] = (start, spans[-1][1])
        closed = [(first, self._end_of_turn(text, last)) for first, last in spans]
        ends = closed[-1][1] == spans[-1][1]
        if not whole:
            closed[-1], ends = spans[-1], False
        learned = tuple(compress(closed, are_learned(record)))
        return Rendered(text[: closed[-1][1]], learned, ends=ends, control=True)

    def _messages(self, record: Mapping[str, str]) -> list[dict[str, str]]:
        system = record.get("system", "").strip()
        turns = [("system", system)] if system else []
        for user, reply in [*history_of(record), (asked_of(record), record["response"].strip())]:
            turns += [("user", user), ("assistant", reply)]
        return [{"role": role, "content": mark_control_tokens(words, self.control)} for role, words in turns]

    def _end_of_turn(self, text: str, place: int) -> int:
        """Where the control token ends that closes a turn whose words end at `place`; `place` if there is none."""
        found = self.control.search(text, place) if self.control else None
        return found.end() if found and not text[place : found.start()].strip() else place

    def _find_replies(self, messages: Sequence[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """Where the replies stand in `text`: the messages are rendered again with marks around each reply."""
        marked = self._apply(
            [{**m, "content": _START + m["content"] + _END} if m["role"] == "assistant" else m for m in messages]
        )
        spans, clean, start = [], "", 0
        for piece in re.split(f"([{_START}{_END}])", marked):
            if piece == _START:
                start = len(clean)
            elif piece == _END:
                spans.append((start, len(clean)))
            else:
                clean += piece
        if clean != text or len(spans) != sum(m["role"] == "assistant" for m in messages):
            raise DataError(
                f"data.template: {self.name} does not show a reply as it is, so what is to be learned cannot be found: set "
                "data.template = 'plain', or give a template that does."
            )
        return spans

    def _apply(self, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # of jinja, of the sandbox or of the template's own; its text may quote a message
            words, kind = str(error).strip(), type(error).__name__
            known = words in str(self.source or self.tokenizer.chat_template) or kind == "TemplateSyntaxError"
            why = words.splitlines()[0] if words and known else kind
            raise DataError(
                f"data.template: {self.name} refuses a record's messages ({why}): set data.template = 'plain', give another "
                "template, or change the records (some templates take no system message, or only turns that alternate)."
            ) from None


Template = PlainTemplate | ChatTemplate


def open_template(name: str, tokenizer: Any) -> Template:
    """The template that `data.template` names: `auto`, `chat`, `plain` or a file.

    Raises:
      DataError: there is none, the file cannot be read, or the template cannot show a question and its answer.
    """
    own = getattr(tokenizer, "chat_template", None)
    if name == "plain" or (name == "auto" and not own):
        return PlainTemplate()
    if name == "chat" and not own:
        raise DataError(NO_TEMPLATE)
    source, words = None, "the tokenizer's chat template"
    if name not in TEMPLATES:
        source, words = read_template(Path(name)), f"the template {name}"
    template = ChatTemplate(tokenizer, source, words, control_pattern(tokenizer))
    template.render(_PROBE)
    template.prompt(_PROBE)
    return template


def read_template(path: Path) -> str:
    """The text of a template file. Raises DataError if it cannot be read."""
    try:
        return read_text(path)
    except ValueError as error:
        raise DataError(f"data.template = '{cut(path)}', {error}: convert the file to UTF-8.") from None
    except OSError as error:
        raise DataError(
            f"data.template = '{cut(path)}' cannot be read ({reason(error)}): give auto, chat, plain or a .jinja file."
        ) from None


def saved_template(template: Template, start: str) -> str | None:
    """What is saved as the tokenizer's chat template with an adapter, so that others ask as the model was taught; None: its own.

    `start` is the text that a tokenizer puts before every text, such as "<s>".
    """
    if isinstance(template, ChatTemplate):
        return template.source
    return PLAIN_TEMPLATE.replace("START", json.dumps(start, ensure_ascii=False))
