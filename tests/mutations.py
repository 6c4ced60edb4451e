"""Seeded damage to documents: of their bytes, and of the values in them. The same seed gives the same damage everywhere."""

import json
import os
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**29, 10**399, -(10**399), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"),
    "", " ", "x", "\0", "\ud800", "\x1b[2J", "[/x]", "..", "../../x", "a" * 300, "9" * 400, "nan", "0x10", [], {}, [None], [[]],
    {"": None}, {"a": {"b": 1}}, [1, "a"], "a\nb", "a" * 100_000,
)  # fmt: skip
"""Values of every kind, where another one was meant."""


def number_of_mutations(default: int) -> int:
    """How many: `DRENCODER_MUTATIONS` in the environment says how many instead, thousands say."""
    return int(os.environ.get("DRENCODER_MUTATIONS", default))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One kind of damage that disks, editors and people do."""
    place, kind = chance.randrange(max(1, len(data))), chance.randrange(8)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + chance.randbytes(chance.randint(1, 9)) + data[place:]
    if kind == 3:
        return data[:place] + data[place + chance.randint(1, 40) :]
    if kind == 4:
        return chance.choice(WHOLE)
    if kind == 5:  # a value of another kind
        for old in chance.sample([b'"', b"1", b"{", b"true", b"0."], 5):
            if (found := data.find(old, place)) >= 0:
                return data[:found] + chance.choice(PIECES) + data[found + len(old) :]
    if kind == 6:
        lines = data.split(b"\n")
        chance.shuffle(lines)
        return b"\n".join(lines)
    return data + data[place:]


WHOLE = [
    b"", b"null", b"[]", b"{}", b"0\n", b'{"a": 1}\n', b"[" * 900, b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900, b"\xff\xfe",
    b"\x00" * 64, b"9" * 400, b"9" * 5000, b"a = " + b"[" * 900, b"a." * 50_000 + b"a = 1", b'"' + b"a" * 100_000 + b'" = 1',
    b"[[" + b"a." * 50_000 + b"a]]", b"a = 0x" + b"f" * 9000, b"\xef\xbb\xbf{}", b"\r\n" * 9,
]  # fmt: skip
PIECES = [
    b"null",
    b"[]",
    b'"x"',
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"9" * 5000,
    b"[" * 900,
    b"\\u0000",
    b"\\ud800",
    b"\xc3",
]


def restructured(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one of its parts replaced, left out, doubled or added."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places or chance.random() < 0.05:
        return chance.choice(ODD)
    holder, key = chance.choice(places)
    kind = chance.randrange(5)
    if kind <= 2:
        holder[key] = chance.choice(ODD)
    elif kind == 3:
        del holder[key]
    elif isinstance(holder, dict):
        holder[chance.choice(["", "more", "a" * 300, "\0"])] = chance.choice(ODD)
    else:
        holder.insert(key, holder[key])
    return value


def _places(value: Any) -> Any:
    """(table or list, key or index) of every part, the outer ones first."""
    level = [value]
    while level:
        below = []
        for item in level:
            pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
            yield from ((item, key) for key, _ in pairs)
            below += [inner for _, inner in pairs if isinstance(inner, dict | list)]
        level = below


def as_json(value: Any) -> bytes:
    """As Python writes it: NaN and lone surrogates included."""
    return json.dumps(value).encode()


def mutations_of(data: bytes, chance: random.Random) -> bytes:
    """Damage to the bytes, or where the document is JSON or lines of JSON, as often to a value in it."""
    if chance.random() < 0.5:
        return mutated(data, chance)
    try:
        return as_json(restructured(json.loads(data), chance))
    except ValueError:
        pass
    lines = data.splitlines()
    number = chance.randrange(max(1, len(lines)))
    try:
        lines[number] = as_json(restructured(json.loads(lines[number]), chance))
    except (ValueError, IndexError):
        return mutated(data, chance)
    return b"\n".join(lines) + b"\n"
