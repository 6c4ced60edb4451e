"""Tokenised training examples and how they become one padded batch.

Legend: K clients (1 outside cohort training), R examples of each, L tokens. Padding is on the right, where
causal attention never looks, so no attention mask is needed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drencoder.data.chat_template import (
    MARK,
    Template,
    control_pattern,
    mark_control_tokens,
    open_template,
    saved_template,
)
from drencoder.data.long_text import is_long, safe_delimiters, without_middles
from drencoder.data.prompts_template import PlainTemplate, Rendered, history_of, pack_history, render_pair
from drencoder.errors import DataError

_LEAST_ROOM = 8  # tokens that a chat template must leave for a question and its answer
_REMEMBERED = 100_000  # characters of a record from which on its tokens are kept
_TRIES = 8  # shortenings of one record; each takes away what is too much, up to how tokens meet at a cut

Text = Mapping[str, str] | tuple[str, str]
"""A record, or a prompt and its response that are a text of their own and need no template."""


@dataclass(frozen=True)
class Example:
    """Token ids of one text. Those from `prompt_length` on are predicted, but for the positions in `given`.

    `given` are positions of a user's later turns, which a model reads and does not learn to write.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    given: tuple[int, ...] = ()

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - self.prompt_length - len(self.given)


@dataclass(frozen=True)
class Tokenised:
    """What became of one record: an example, or None where its response is empty."""

    example: Example | None
    cut: bool = False  # words were left out, so that it fits
    marked: bool = False  # its words have control tokens in them, which stay words


@dataclass(frozen=True)
class Batch:
    """`input_ids` (K*R, L) int64; `predicted` (K*R, L) bool: token l is a target, predicted from l - 1."""

    input_ids: Tensor
    predicted: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.predicted.to(device))


@dataclass(frozen=True)
class _Fitted:
    """A record that was shortened until it fits, as far as that can be done, and its example of any length."""

    record: Text
    example: Example | None
    marked: bool
    whole: bool = True  # its response has its end
    cut: bool = False


@dataclass(frozen=True)
class RecordTokenizer:
    """Records as tokens: one text, one tokenisation. Where a token stands in the text says whether it is learned.

    The tokens are those that transformers gives for the rendered text, so that an adapter meets in use what it was trained on.

    Args:
      tokenizer: of transformers. Fast ones say where a token stands; for others it is found by tokenising the text's beginnings.
      end_id: the token after a text; learned.
      max_tokens: no example is longer.
      start: tokens that every text of this model begins with, if any; a chat template writes them itself.
      template: how a record becomes a text.
    """

    tokenizer: Any
    end_id: int
    max_tokens: int
    start: tuple[int, ...] = ()
    template: Template = field(default_factory=PlainTemplate)

    @classmethod
    def open(
        cls, tokenizer: Any, *, template: str, max_tokens: int, end_id: int, start: tuple[int, ...]
    ) -> "RecordTokenizer":
        """With the template that `data.template` names.

        Raises:
          DataError: the template cannot be had or used, or leaves no room for a record in `max_tokens`.
        """
        tokeniser = cls(tokenizer, end_id, max_tokens, start, open_template(template, tokenizer))
        taken = len(tokeniser.prompt({"instruction": "?", "response": ""}))
        if not isinstance(tokeniser.template, PlainTemplate) and taken + _LEAST_ROOM > max_tokens:
            raise DataError(
                f"data.max_tokens = {max_tokens} leaves no room for a record, since the chat template itself takes {taken} "
                f"tokens: set data.max_tokens to {taken + _LEAST_ROOM} or more, or data.template = 'plain'."
            )
        return tokeniser

    def prompt(self, record: Mapping[str, str]) -> list[int]:
        """The tokens after which the model writes the response: for generation and evaluation."""
        return self._encode(self.template.prompt(record))[0] or [self.end_id]

    @cached_property
    def stop_id(self) -> int:
        """The token that ends a response: the end token, or that which a chat template writes behind a reply."""
        example = self.tokenise({"instruction": "?", "response": "!"}).example
        return example.tokens[-1] if example is not None else self.end_id

    def tokenise(self, record: Text) -> Tokenised:
        """Tokenises a record. An empty response gives no example: a client must not train on a bare end token.

        A text of more than `max_tokens` loses, as far as is needed, the earliest turns of a conversation, then the end of the
        context, then the end of a response or of an instruction that takes more than half of the room. A response without its end
        is not taught to end there.
        """
        if not isinstance(record, tuple) and sum(map(len, record.values())) > _REMEMBERED:
            return self._remembered(tuple(record.items()))
        return self._tokenise(record)

    @cached_property
    def _remembered(self) -> Callable[[tuple[tuple[str, str], ...]], Tokenised]:
        """`_tokenise` for the items of a long record; a client that is asked again does not wait for it again."""
        return lru_cache(maxsize=256)(lambda items: self._tokenise(dict(items)))

    def _tokenise(self, record: Text) -> Tokenised:
        if not (record[1] if isinstance(record, tuple) else record["response"]).strip():
            return Tokenised(None)
        fitted = self._fit(record)
        if fitted.example is None:  # words that are no token at all
            return Tokenised(None)
        return Tokenised(self._limit(fitted.example), fitted.cut or self._surplus(fitted.example) > 0, fitted.marked)

    def examples(self, records: Iterable[Text], *, owner: str = "") -> list[Example]:
        """Tokenises the records of one owner; records with an empty response are left out.

        Raises:
          DataError: no record is left, and `owner` names whose they are. Without a name that is no error: a client without
            text sends a zero update.
        """
        examples = [one.example for one in map(self.tokenise, records) if one.example is not None]
        if owner and not examples:
            raise DataError(
                f"{owner} has no usable text: every record's response is empty. Give it at least one record with a "
                "non-empty response."
            )
        return examples

    def option(self, record: Mapping[str, str]) -> Example:
        """A record as `tokenise` has it, without what ends its response: an option of a question, to be scored."""
        fitted = self._fit(record)
        bare, _ = self._example(self._render(fitted.record, whole=False))
        assert fitted.example is not None
        assert bare is not None
        num_end = len(fitted.example.tokens) - len(bare.tokens)
        if num_end <= 0 or fitted.example.tokens[: len(bare.tokens)] != bare.tokens:
            return self._limit(bare)
        whole = self._limit(fitted.example)
        return replace(whole, tokens=whole.tokens[:-num_end])

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with the template that its model was taught under, in transformers' files.

        Raises:
          OSError: the files cannot be written.
        """
        own = self.tokenizer.chat_template
        try:
            self.tokenizer.chat_template = saved_template(self.template, self._written_start()) or own
            self.tokenizer.save_pretrained(str(folder))
        except OSError:
            raise
        except Exception as error:  # what the tokenizers library raises for a full disk is no OSError
            raise OSError(str(error)) from None
        finally:
            self.tokenizer.chat_template = own

    def _written_start(self) -> str:
        """What a text begins with that gives, by itself, the tokens which this tokenizer puts before a text, and the first word's own.

        Some put a space before a text's first word, and none behind a start token that is written out.
        """
        start, tokens = self.tokenizer.decode(list(self.start)), [*self.start, *self._places("a", control=False)[0]]
        return next((one for one in (start, f"{start} ") if self._places(f"{one}a", control=True)[0] == tokens), start)

    # --- a record that is too long ----------------------------------------------------------------

    def _fit(self, record: Text) -> _Fitted:
        if isinstance(record, tuple) or not is_long(record, self.max_tokens):
            return self._fit_whole(record)
        short = without_middles(
            record,
            self.max_tokens,
            self._delimiters,
            self._control,
            self._render,
            lambda text: self._places(text, control=False)[1],
        )
        fitted = self._fit_whole(short)
        if short is not record and self._surplus(fitted.example) > 0:  # then `_limit` takes what stands before the end
            fitted = self._fit_whole(record)
        return fitted

    def _fit_whole(self, record: Text) -> _Fitted:
        fitted = _Fitted(record, *self._example(self._render(record)))
        for _ in range(_TRIES):
            surplus = self._surplus(fitted.example)
            if surplus <= 0 or isinstance(fitted.record, tuple):
                break
            shorter, whole = self._shorten(fitted.record, surplus)
            if shorter == fitted.record:
                break
            whole = whole and fitted.whole
            example, marked = self._example(self._render(shorter, whole=whole))
            fitted = _Fitted(shorter, example, marked or fitted.marked, whole, cut=True)
        return fitted

    def _surplus(self, example: Example | None) -> int:
        return len(example.tokens) - self.max_tokens if example else 0

    def _shorten(self, record: Mapping[str, str], surplus: int) -> tuple[Mapping[str, str], bool]:
        """The record with about `surplus` tokens less, and whether its response keeps its end."""
        turns = history_of(record)
        if turns:
            while turns and surplus > 0:
                surplus -= sum(map(self._count, turns.pop(0)))
            return {**record, "history": pack_history(turns)}, True
        if record.get("context", "").strip():
            return {**record, "context": self._beginning(record["context"], surplus)}, True
        asked, said = self._count(record["instruction"]), self._count(record["response"])
        room = asked + said - surplus
        if room < 2:
            return {**record, "system": self._beginning(record.get("system", ""), surplus)}, True
        most = max(room // 2, room - said)
        if asked > most:
            return {**record, "instruction": self._beginning(record["instruction"], asked - most)}, True
        return {**record, "response": self._beginning(record["response"], surplus)}, False

    def _count(self, text: str) -> int:
        return len(self._places(text.strip(), control=False)[0])

    def _beginning(self, text: str, less: int) -> str:
        """A text without its last `less` tokens."""
        text = text.strip()
        tokens, places = self._places(text, control=False)
        keep = len(tokens) - less
        if keep <= 0:
            return ""
        end = places[keep - 1][1] if places else len(text) * keep // len(tokens)
        return text[: min(end, len(text) - 1)].rstrip()

    def _limit(self, example: Example) -> Example:
        """At most `max_tokens` of an example: takes from the prompt's beginning, behind `start`, then from the end."""
        keep = len(self.start) if example.tokens[: len(self.start)] == self.start else 0
        less = max(0, min(self._surplus(example), example.prompt_length - keep - 1))
        tokens = (example.tokens[:keep] + example.tokens[keep + less :])[: self.max_tokens]
        given = tuple(place - less for place in example.given if place - less < len(tokens))
        return Example(tokens, example.prompt_length - less, given)

    # --- one text -> tokens -----------------------------------------------------------------------

    def _render(self, record: Text, *, whole: bool = True) -> Rendered:
        return render_pair(*record) if isinstance(record, tuple) else self.template.render(record, whole=whole)

    def _example(self, rendered: Rendered) -> tuple[Example | None, bool]:
        """The example of a rendered text, of any length, and whether its words have control tokens in them."""
        tokens, learned, marked = self._encode(rendered)
        if True not in learned:
            return None, marked
        last = len(learned) - learned[::-1].index(True)
        tokens, learned = tokens[:last], learned[:last]
        if rendered.ends:
            tokens, learned = [*tokens, self.end_id], [*learned, True]
        if learned[0]:  # something must stand before the first predicted token
            tokens, learned = [self.end_id, *tokens], [False, *learned]
        first = learned.index(True)
        given = tuple(place for place in range(first, len(learned)) if not learned[place])
        return Example(tuple(tokens), first, given), marked

    def _encode(self, rendered: Rendered) -> tuple[list[int], list[bool], bool]:
        """Tokens, whether each of them is learned, and whether the text's words have control tokens in them."""
        text, targets, control = rendered.text, rendered.targets, rendered.control
        marked = MARK in text if control else bool(self._control and self._control.search(text))
        tokens, places = self._places(text, control=control)
        if marked and not control and (not places or self._special & set(tokens)):
            # The tokenizer does not tell words from control tokens, even where it is asked to.
            ends = [match.start() + 2 for match in self._control.finditer(text)] if self._control else []
            text = mark_control_tokens(text, self._control)
            targets = tuple(tuple(at + sum(end <= at for end in ends) for at in span) for span in targets)
            tokens, places = self._places(text, control=False)
            control = True
        if not places:
            learned = self._learned_of_beginnings(text, tokens, targets)
        else:
            learned = [
                any(first < end and (start < last or start == end <= last) for first, last in targets)
                for start, end in places
            ]
            if marked and control:
                kept = [end - start != 1 or text[start] != MARK for start, end in places]
                tokens = [token for token, keep in zip(tokens, kept, strict=True) if keep]
                learned = [one for one, keep in zip(learned, kept, strict=True) if keep]
        begin = [] if rendered.control else list(self.start)
        return [*begin, *tokens], [*[False] * len(begin), *learned], marked

    def _places(self, text: str, *, control: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text without special ones around it, and the range of characters of each; no ranges if they are not known.

        With `control`, control tokens in the text are meant as such.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            text = text.replace(MARK, " ")
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), []
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=not control,
            verbose=False,  # it would print how many tokens a text has that is longer than the model allows
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _learned_of_beginnings(
        self, text: str, tokens: Sequence[int], targets: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Which tokens are learned, by how many tokens the text has in common with its beginning up to each place."""

        def num_before(place: int) -> int:
            if place >= len(text):
                return len(tokens)
            head = self._places(text[:place], control=True)[0]
            pairs = zip(head, tokens, strict=False)
            return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(head), len(tokens)))

        ranges = [range(num_before(first), num_before(last)) for first, last in targets]
        return [any(place in one for one in ranges) for place in range(len(tokens))]

    @cached_property
    def _delimiters(self) -> str:
        """Where words can be cut without any effect on the tokens of either side; none where nobody knows where a token stands."""
        if not getattr(self.tokenizer, "is_fast", False):
            return ""
        vocabulary = self.tokenizer.get_vocab()
        return safe_delimiters(token for token in vocabulary if not (self._control and self._control.fullmatch(token)))

    @cached_property
    def _control(self) -> Any:
        return control_pattern(self.tokenizer)

    @cached_property
    def _special(self) -> set[int]:
        """Control tokens, but for the unknown token: it stands for words."""
        return set(getattr(self.tokenizer, "all_special_ids", ())) - {getattr(self.tokenizer, "unk_token_id", None)}


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
            if example.given:
                predicted[line, list(example.given)] = False
    return Batch(input_ids, predicted)
