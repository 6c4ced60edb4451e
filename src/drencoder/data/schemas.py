"""Record schemas: which fields of a row ask, which reply. One schema for a whole file, recognised by its first row's fields.

Values stay the texts that they are. A number, a null or something nested where a text belongs is an error with its place.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from drencoder.data.formats import Row, kind_of
from drencoder.data.prompts_template import pack_history
from drencoder.errors import DataError
from drencoder.reading import parse_json

Record = dict[str, str]

ROLES = ("instruction", "context", "response", "category", "system", "messages", "text")
"""What a field can be for a record: the keys of `data.fields`."""

_MADE = ("history", "unlearned")  # what a record has beside: made here, whatever a row calls so
_ASKED = ("instruction", "prompt", "question", "query", "input")
_REPLIES = ("response", "output", "completion", "answer")
_OPTIONAL = {"context": ("context", "input"), "category": ("category",), "system": ("system", "system_prompt")}
_TALKS = {
    "chat messages": ("messages",),
    "ShareGPT conversations": ("conversations",),
    "prompt and completion as messages": ("prompt", "completion"),
}
_BESIDE_MESSAGES = {role: _OPTIONAL[role] for role in ("category", "system")}
_NAMES = {
    ("instruction", "response"): "Dolly",
    ("instruction", "output"): "Alpaca",
    ("prompt", "completion"): "prompt and completion",
    ("question", "answer"): "question and answer",
}
_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
_SINGLE = (str, int, float, bool, Decimal)
_LONE = re.compile("[\ud800-\udfff]")
_USUAL_NAMES = frozenset(
    [
        "a",
        "answers",
        "article",
        "author",
        "body",
        "chosen",
        "comment",
        "content",
        "context",
        "conversation",
        "data",
        "description",
        "dialogue",
        "document",
        "examples",
        "highlights",
        "id",
        "inputs",
        "label",
        "labels",
        "messages",
        "name",
        "note",
        "notes",
        "passage",
        "q",
        "query",
        "question",
        "reference",
        "rejected",
        "reply",
        "sentence",
        "source",
        "subject",
        "summary",
        "target",
        "targets",
        "test",
        "text",
        "title",
        "topic",
        "train",
        "translation",
        "user",
    ]
)
"""Names of fields that a message may show. In a table without a header, or an object of persons, other names are somebody's words."""


@dataclass(frozen=True)
class Records:
    """The records of a file in one shape: `instruction`, `context`, `response`, `category`, and what else a row has.

    `schema` names what was recognised and from which fields; `changed` records had characters that are no text (halves of a
    surrogate pair), which were replaced, or messages that nothing replies to, which were left out.
    """

    records: list[Record]
    schema: str
    changed: int = 0


def to_records(
    rows: Iterable[Row],
    fields: Mapping[str, str],
    *,
    origin: str,
    strict: bool = True,
    owners: Mapping[str, str] | None = None,
) -> Records:
    """Brings rows into one shape.

    Args:
      rows: of one source.
      fields: role -> field, for roles that are not recognised by their names (`data.fields`). If the first row has none of these
        fields, and `strict` is not asked for, they are those of another source.
      origin: the source, for messages.
      owners: field -> the knob that takes it to name a record's owner. A record has their values as they are, or lacks the field, whatever else they are.

    Raises:
      DataError: there is no row, no schema fits, or a row has no text where one belongs, or an owner that is neither text nor a
        number; the message names its place.
    """
    roles: dict[str, tuple[str, ...]] = {}
    schema, records, changed = "", [], 0
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: {kind_of(row)} instead of a record with named fields.")
        row = _with_parts(row, (*fields.values(), *(owners or {})))
        if not roles:
            mapped = fields if strict or any(field in row for field in fields.values()) else {}
            roles, schema = _recognise(row, mapped, where)
        for field, knob in (owners or {}).items():
            _check_names_an_owner(row, field, knob, where)
        record, whole = _record(row, roles, where)
        for field in owners or {}:
            if field not in row:
                record.pop(field, None)
            elif field not in _MADE:
                record[field] = _word_of(row[field])
        cleaned = {key: _LONE.sub("\ufffd", value) for key, value in record.items()}
        changed += cleaned != record or not whole
        records.append(cleaned)
    if not records:
        raise DataError(f"{origin} holds no records: give at least one with a question and its answer, or a text.")
    return Records(records, schema, changed)


def _with_parts(row: Mapping[str, Any], fields: Iterable[str]) -> Mapping[str, Any]:
    """The row and, under the whole path, what it holds at paths such as `translation.de` or `answers.text.0`.

    A list that ends before a path's number holds an empty text there: a question without an answer.
    """
    parts = {}
    for path in fields:
        if path in row or "." not in path:
            continue
        value: Any = row
        for name in path.split("."):
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isdecimal():
                value = value[int(name)] if int(name) < len(value) else ""
            elif value != "":
                break
        else:
            parts[path] = value
    return {**row, **parts} if parts else row


def _recognise(row: Mapping[str, Any], fields: Mapping[str, str], where: str) -> tuple[dict[str, tuple[str, ...]], str]:
    """Role -> the fields that have it, and the schema in words."""
    for role, field in fields.items():
        if field not in row:
            raise DataError(f"{where}: no field {field!r}, which data.fields names as {role}: correct data.fields.")
    twice = next((field for field in fields.values() if list(fields.values()).count(field) > 1), None)
    if twice is not None:
        roles_of = " and ".join(role for role, field in fields.items() if field == twice)
        raise DataError(
            f"data.fields names {twice!r} as {roles_of}: one field can be one of them; correct data.fields."
        )
    given = {role: (field,) for role, field in fields.items()}
    if "messages" in given or "text" in given:
        role = "messages" if "messages" in given else "text"
        beside = _BESIDE_MESSAGES if role == "messages" else {"category": ("category",)}
        return {**beside, **given}, f"{role} ({given[role][0]})"
    taken = set(fields.values())
    free = [field for field in row if field not in taken]
    if "instruction" not in given and "response" not in given:
        for title, names in _TALKS.items():
            if names[0] in free and (len(names) == 1 or all(isinstance(row.get(name), list) for name in names)):
                roles = {"messages": names, **_BESIDE_MESSAGES, **given}
                shown = [name for name in (*roles["system"], *names) if name in row]
                return roles, f"{title} ({', '.join(shown)})"
        if {"question", "A", "B", "C", "D"} <= set(free):
            raise DataError(
                f"{where}: questions with options A to D: set data.source = 'mmlu:FOLDER' or 'ceval:FOLDER', or name the fields in "
                "data.fields."
            )
    asked = given.get("instruction") or tuple(name for name in _ASKED if name in free)[:1]
    reply = given.get("response") or tuple(name for name in _REPLIES if name in free)[:1]
    if not (asked and reply):
        if "text" in free and not given:
            return {"text": ("text",), "category": ("category",)}, "plain text (text)"
        raise DataError(f"{where}: {_unknown({name: row[name] for name in free}, asked, reply)}")
    roles = {"instruction": asked, "response": reply, **_OPTIONAL, **given}
    title = "your fields" if given else _NAMES.get((asked[0], reply[0]), f"{asked[0]} and {reply[0]}")
    roles["context"] = tuple(name for name in roles["context"] if name not in asked)
    shown = [
        name for role in ("system", "instruction", "context", "response") for name in roles.get(role, ()) if name in row
    ]
    return roles, f"{title} ({', '.join(shown)})"


def _unknown(free: Mapping[str, Any], asked: tuple[str, ...], reply: tuple[str, ...]) -> str:
    """Says that no schema fits. A file without a header has a record's words in place of names: only usual names are shown."""
    lacking = " and ".join(f"no field {verb}" for verb, found in (("asks", asked), ("replies", reply)) if not found)
    usual = [name for name in free if name.lower() in _USUAL_NAMES | {*_ASKED, *_REPLIES, *ROLES}]
    others = f"{len(free) - len(usual)} of other names" if len(usual) < len(free) else ""
    names = " and ".join(filter(None, (", ".join(usual[:12]), others)))
    example = 'Name others in data.fields, such as { instruction = "title", response = "body" }.'
    if "chosen" in free:  # of a reply that is preferred and one that is not
        role = "messages" if isinstance(free["chosen"], list) else "response" if asked else "text"
        example = f'Of preferences set data.fields = {{ {role} = "chosen" }}.'
    elif any(isinstance(value, Mapping | list) for value in free.values()):
        example += " A part of a nested field has a path, such as 'translation.de' or 'answers.text.0'."
    return (
        f"{lacking}{f' (there are {names})' if names else ''}: known are instruction, prompt or question "
        f"with response, output, completion or answer; messages; conversations; text. {example}"
    )


def _check_names_an_owner(row: Mapping[str, Any], field: str, knob: str, where: str) -> None:
    value = row.get(field, "")
    if field == "response" and field not in row:  # what a record calls its reply, whatever its row calls it
        raise DataError(
            f"{where}: no field 'response', where {knob} expects an owner's name: name one that every record has."
        )
    if isinstance(value, bool) or not isinstance(value, _SINGLE):
        raise DataError(
            f"{where}: {kind_of(value)} in {field!r}, where {knob} expects an owner's name: name a field with a text or a number."
        )


def _record(row: Mapping[str, Any], roles: Mapping[str, tuple[str, ...]], where: str) -> tuple[Record, bool]:
    """A row as a record, and whether nothing of it was left out."""
    used = {field for names in roles.values() for field in names}
    record = {
        str(key): _word_of(value)
        for key, value in row.items()
        if key not in used and key not in (*ROLES, *_MADE) and isinstance(value, _SINGLE)
    }
    whole = True
    parts = {"context": "", "category": "none"}
    for role in ("context", "category", "system"):
        values = [(name, row.get(name)) for name in roles.get(role, ())]
        if role == "category":  # a label, no text: it may be a number
            values = [(name, str(value)) for name, value in values if isinstance(value, str | int | float)]
        words = [_optional_text(value, where, name) for name, value in values]
        joined = "\n".join(filter(None, words))
        if joined or role == "context":
            parts[role] = joined
    if "messages" in roles:
        messages = [turn for name in roles["messages"] for turn in _turns_of(row.get(name), where, name)]
        said, whole = _conversation(messages, where)
        systems = dict.fromkeys(filter(str.strip, (parts.get("system", ""), said["system"])))
        parts |= said | {"system": "\n\n".join(systems)}
    elif "text" in roles:
        parts |= {"instruction": "", "response": _text_of(row, roles["text"][0], where)}
    else:
        for role in ("instruction", "response"):
            parts[role] = _text_of(row, roles[role][0], where)
        turns = row.get("history")
        if isinstance(turns, list) and all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(words, str) for words in turn)
            for turn in turns
        ):
            parts["history"] = pack_history([(user, reply) for user, reply in turns if reply.strip()])
    return record | {key: value for key, value in parts.items() if value or key not in (*_MADE, "system")}, whole


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: no field {field!r}, which the first record has: every record needs it.")
    if not isinstance(row[field], str):
        raise DataError(
            f"{where}: no text in {field!r} but {kind_of(row[field])}: write a text, in quotes{_or_part(row[field], field)}."
        )
    return row[field]


def _optional_text(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: no text in {field!r} but {kind_of(value)}: write a text in quotes, or leave it out{_or_part(value, field)}."
        )
    return value


def _or_part(value: Any, field: str) -> str:
    """How a recipe names a part of a nested value."""
    if isinstance(value, list):
        return f", or name one of the list in data.fields ('{field}.0' is the first)"
    return f", or name a part of it in data.fields ('{field}.NAME')" if isinstance(value, Mapping) else ""


def _word_of(value: Any) -> str:
    return "" if value != value else str(value)  # NaN is how tables write an empty cell


def _turns_of(turns: Any, where: str, field: str) -> Iterable[Any]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a table's cell
        try:
            turns = parse_json(turns)
        except ValueError:
            raise DataError(
                f"{where}: the text in {field!r} is no list of messages in JSON: mend or remove it."
            ) from None
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: {field!r} is {kind_of(turns)} instead of a list of messages.")
    return turns


def _conversation(turns: Iterable[Any], where: str) -> tuple[Record, bool]:
    """Messages as a record: the last reply that is learned is its response, what stands before that question its history.

    Messages that follow each other from one speaker are one, which is not learned if a part of it is not. An empty message, and what
    stands before the first question or after the last reply that is learned, teaches nothing and is left out.
    """
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, start=1)]
    said = [one for one in messages if one.words.strip()]
    system = "\n\n".join(one.words for one in said if one.speaker == "system")
    spoken: list[_Message] = []
    for one in said:
        if one.speaker == "system":
            continue
        if spoken and spoken[-1].speaker == one.speaker:
            before = spoken.pop()
            one = _Message(one.speaker, f"{before.words}\n\n{one.words}", before.learned and one.learned)
        spoken.append(one)
    num_said = len(spoken)
    while spoken and spoken[0].speaker == "assistant":
        spoken.pop(0)
    while spoken and (spoken[-1].speaker == "user" or not spoken[-1].learned):
        spoken.pop()
    pairs = [(spoken[at].words, spoken[at + 1].words) for at in range(0, len(spoken), 2)]
    unlearned = [(at - len(spoken)) // 2 + 1 for at in range(1, len(spoken), 2) if not spoken[at].learned]
    asked, reply = pairs[-1] if pairs else ("", "")
    record = {"instruction": asked, "response": reply, "history": pack_history(pairs[:-1]), "system": system}
    record["unlearned"] = json.dumps(unlearned) if unlearned else ""
    return record, len(spoken) == num_said and len(said) == len(messages)


class _Message(NamedTuple):
    """Who said what, and whether it is to be learned."""

    speaker: str
    words: str
    learned: bool


def _message(turn: Any, where: str) -> _Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: {kind_of(turn)} instead of a message with a role and content.")
    speaker, words = (turn.get(one, turn.get(other)) for one, other in (("role", "from"), ("content", "value")))
    if isinstance(words, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in words
    ):
        words = "".join(part["text"] for part in words)  # as chat templates write parts that are texts
    called = turn.get("tool_calls") or turn.get("function_call") or str(speaker).lower() in _TOOLS
    if called or not isinstance(words, str):
        raise DataError(
            f"{where}: {'a tool' if called else kind_of(words)} instead of a text: drencoder learns no images, sounds or calls of tools. Leave the record out."
        )
    if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
        raise DataError(
            f"{where}: its role is none of {', '.join(_SPEAKERS)}: give it one of them, or leave the record out."
        )
    return _Message(_SPEAKERS[speaker.lower()], words, turn.get("weight") != 0)
