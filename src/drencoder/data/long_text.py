"""Where words that are far too long for a model can lose their middle, so that only what may be kept of them is tokenised. No torch.

A cut is safe where no token of the vocabulary reaches across it: then what stands before it has the same tokens whatever stands
behind it, and the other way round. Tokenizers merge letters and take spaces to the word that follows, so the place between a letter
and a space is such a cut in most of them. Whether it is, their vocabulary says (`safe_delimiters`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from tokenizers.decoders import ByteLevel

from drencoder.data.chat_template import mark_control_tokens
from drencoder.data.prompts_template import Rendered, history_of, pack_history

_DELIMITERS = " \n。，0123456789"
_TAIL = 1024  # characters behind the middle, so that the end meets what follows as before
_SEARCHED = 4096  # characters that are searched for a place to cut
_CHARACTERS_OF_A_TOKEN = 8  # more than most tokens have
_WINDOW = 64  # characters on each side of a cut that are looked at
_MARGIN = 16  # tokens

Places = Callable[[str], list[tuple[int, int]]]
"""A text -> the range of characters of each of its tokens."""

_LONG = 16  # characters for each token that is kept: longer words may lose their middle
_PARTS = ("system", "instruction", "context", "response")
Part = str | tuple[int, int]
"""A part of a record: a field, or (turn, speaker) of its history."""


def is_long(record: Mapping[str, str], most: int) -> bool:
    """Returns whether a record has words that may lose their middle where `most` tokens are kept."""
    return max(map(len, record.values())) > _LONG * most


def without_middles(
    record: Mapping[str, str],
    most: int,
    delimiters: str,
    control: re.Pattern[str] | None,
    render: Callable[[Mapping[str, str]], Rendered],
    places: Places,
) -> Mapping[str, str]:
    """Returns the record without the middle of words that are far too long; the same object where nothing can be left out.

    A million characters take seconds to tokenise, several times for each use of a record. Every part that was shortened still has more
    than `most` tokens, so that whoever shortens the record to `most` tokens cuts the same parts at the same places.

    Args:
      most: how many tokens are kept of a record.
      delimiters: what `safe_delimiters` says.
      control: matches control tokens; words that have one stay whole.
      render: a record -> its text.
    """
    for part, words in _long_parts(record, _LONG * most):
        middle = None
        if mark_control_tokens(words, control) == words:
            middle = find_middle(words, delimiters, most, places)
        if middle is not None:
            shorter = _with_words(record, part, words[: middle[0]] + words[middle[1] :])
            if _is_without(render(record), render(shorter), words, middle):
                record = shorter
    return record


def _long_parts(record: Mapping[str, str], longer_than: int) -> Iterator[tuple[Part, str]]:
    if len(record.get("history", "")) > longer_than:
        for number, turn in enumerate(history_of(record)):
            yield from (((number, speaker), words) for speaker, words in enumerate(turn) if len(words) > longer_than)
    for part in _PARTS:
        words = record.get(part, "").strip()
        if len(words) > longer_than:
            yield part, words


def _with_words(record: Mapping[str, str], part: Part, words: str) -> Mapping[str, str]:
    """The record with other words in one part."""
    if isinstance(part, str):
        return {**record, part: words}
    turns = [list(turn) for turn in history_of(record)]
    turns[part[0]][part[1]] = words
    return {**record, "history": pack_history([(user, reply) for user, reply in turns])}


def safe_delimiters(vocabulary: Iterable[str]) -> str:
    """Returns those of space, line break, two marks of Chinese and the digits that no token has behind a letter.

    Args:
      vocabulary: all tokens that words can have, as the tokenizer writes them: byte-level ("Ġ" for a space), with "▁" for a space, or plain.
    """
    tokens = list(vocabulary)
    if any(token.startswith("Ġ") for token in tokens):
        bytes_of = ByteLevel()
        tokens = [bytes_of.decode([token]) for token in tokens]
    text = "\0".join(tokens).replace("▁", " ")
    return "".join(one for one in _DELIMITERS if not re.search(rf"(?:[^\W\d_]|\ufffd){one}", text))


def find_middle(words: str, delimiters: str, most: int, places: Places) -> tuple[int, int] | None:
    """Returns the characters (first, last) that can be left out of `words` without any effect on the first `most` tokens and the last ones.

    None where the words are not far longer than that, or have no safe place to cut where one is needed.
    """
    first, border = _CHARACTERS_OF_A_TOKEN * most, re.compile(rf"[^\W\d_](?=[{delimiters}][^\W\d_])")
    end = border.search(words, max(0, len(words) - _TAIL)) if delimiters else None
    while end is not None and 2 * first + _SEARCHED + _TAIL < len(words):
        start = border.search(words, first, first + _SEARCHED)
        if start is None:
            return None
        if len(places(words[: start.end()])) > most + _MARGIN:
            middle = start.end(), end.end()
            return middle if _are_borders(words, *middle, places) else None
        first *= 2
    return None


def _is_without(whole: Rendered, short: Rendered, words: str, middle: tuple[int, int]) -> bool:
    """Whether the template shows the words as they are, so that `short` is `whole` without their middle."""
    place = whole.text.find(words)
    first, last = place + middle[0], place + middle[1]
    targets = tuple((_moved(start, first, last), _moved(end, first, last)) for start, end in whole.targets)
    return place >= 0 and short == replace(whole, text=whole.text[:first] + whole.text[last:], targets=targets)


def _moved(place: int, first: int, last: int) -> int:
    return place if place <= first else place - (last - first)


def _are_borders(words: str, first: int, last: int, places: Places) -> bool:
    """Whether tokens end at both places, and where the two meet once the middle is gone."""
    left, middle = words[first - _WINDOW : first], words[first : first + _WINDOW]
    end, right = words[last - _WINDOW : last], words[last : last + _WINDOW]
    return not any(
        start < _WINDOW < stop
        for before, behind in ((left, middle), (end, right), (left, right))
        for start, stop in places(before + behind)
    )
