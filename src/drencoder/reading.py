"""What came from outside: how it is read within limits, and how much of it a message may show. No torch.

A file, an option or another machine's message may hold anything: bytes that are not UTF-8, thousands of digits or brackets, a
NUL in a name, codes that a terminal obeys. The readers of all rooms parse with these functions, and their messages echo
values with `shown`.
"""

import json
import os
import re
import reprlib
import tomllib
from pathlib import Path
from typing import Any

_MOST_NESTED = 64
_MOST_DIGITS = 300  # of a whole number: a longer one is beyond what a float can be
_MOST_TOML = 1 << 20  # characters; recipes have a few thousand
_VALUE_LENGTH = 120
_LONG_WORD = re.compile(r"\S{200,}")
_MESSAGE_LENGTH = 1000
# tomllib's time is quadratic in the parts of a dotted key: one of 100 kB takes half a minute.
_LONG_KEY = re.compile(r"""(?<![^\s.\[{,])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")


# --- echoing -----------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """Returns the text with every character that a terminal would obey, or cannot encode, written as an escape.

    Line breaks stay, and so does all that Unicode counts as printable.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )


def cut(text: object, most: int = _VALUE_LENGTH) -> str:
    """Returns the text as one printable line of at most `most` characters; of a longer one the middle is left out."""
    whole = str(text)
    if len(whole) > 2 * most:  # so that a text of megabytes costs nothing
        whole = whole[:most] + whole[-most:]
    line = printable(whole).replace("\n", "\\n")
    if len(line) <= most and len(whole) == len(str(text)):
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


def shown(value: object) -> str:
    """Returns any value as a message quotes it: its `repr`, as one printable line of at most 120 characters."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= _VALUE_LENGTH and value.isprintable() else f"'{cut(value)}'"
    try:
        return cut(_SHORT.repr(value))
    except (ValueError, RecursionError):  # a number whose digits Python does not write
        return f"a {type(value).__name__} with a number of thousands of digits"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict = 3, 80, 80, 8, 8
_SHORT.maxlong = 80


def one_line(message: object) -> str:
    """Returns a message as the one line that a command ends with: at most 1,000 characters, and no word above 200."""
    return cut(_LONG_WORD.sub(lambda word: cut(word[0]), str(message)), _MESSAGE_LENGTH)


# --- reading -----------------------------------------------------------------------------------------


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10. ValueError for a number of thousands of digits."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Returns a file's bytes.

    Args:
      most: how many bytes it may have.

    Raises:
      OSError: it cannot be read; `strerror` says why, for a name that no file can have, too.
      ValueError: it has more bytes than `most`; the message says so.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if most is None else file.read(most + 1)
    except ValueError:  # a NUL in the name
        raise OSError(22, "no file can have this name", str(path)) from None
    if most is not None and len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


def read_text(path: Path, most: int | None = None) -> str:
    """Returns a file's text. Raises as `read_bytes`, and ValueError with the line of a byte that is not UTF-8."""
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def reason(error: OSError | ValueError) -> str:
    """Returns why one of these functions could not read a file, as a message says it in brackets."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else cut(error)


class NotJsonError(ValueError):
    """A text that is not JSON; `line` is where it ceases to be, counted from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Returns the value of a JSON text (bytes: UTF-8).

    Args:
      finite: whether NaN and Infinity, which Python writes and JSON has not, are refused.

    Raises:
      ValueError: it is not JSON (then a NotJsonError), is nested more than 64 levels deep, has a whole number of more than 300 digits, or
        an object that names a value twice, so that two readers could take two values; the message says which and quotes nothing of the text.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text,
            parse_int=_whole_number,
            parse_constant=_refuse_constant if finite else None,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        raise NotJsonError(f"not valid JSON ({error.msg}, column {error.colno})", error.lineno) from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _MOST_NESTED:
        _check_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Returns the tables of a TOML text. Raises ValueError as `parse_json`, and for more than 1 MiB or keys of many parts."""
    text = text.removeprefix("\ufeff")  # a byte order mark, as some editors write it
    if len(text) > _MOST_TOML:
        raise ValueError(f"more than {_MOST_TOML:,} characters")
    if _LONG_KEY.search(text):
        raise ValueError("a key of more than 16 parts")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML ({cut(error)})") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError:
        raise ValueError("a number of too many digits, or a date that there is none of") from None
    _check_depth(tables)
    return tables


_TOO_DEEP = f"nested more than {_MOST_NESTED} levels deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has two values of one name")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word}, which is no number of JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of more than {_MOST_DIGITS} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Raises ValueError if lists and tables are nested too deeply, or a whole number has too many digits."""
    level = [value]
    for _ in range(_MOST_NESTED + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, int) and abs(item) >= 1 << 1000:
                raise ValueError(f"a whole number of more than {_MOST_DIGITS} digits")
        if not below:
            return
        level = below
    raise ValueError(_TOO_DEEP)
