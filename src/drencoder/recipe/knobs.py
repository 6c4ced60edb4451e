"""How a knob of a recipe is declared, and how its value is checked. No torch, no TOML.

A section of a recipe is a frozen dataclass that derives from `Checked`; each of its fields is a `knob` with a default, a
help text and bounds, declared once and used for reading, checking and documenting alike.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, get_type_hints

from drencoder.errors import RecipeError
from drencoder.reading import cut, shown
from drencoder.recipe.removed import reject_removed_value

Table = tuple[tuple[str, str], ...]
"""The type of a knob that is a table of texts, as ((key, value), ...): `{ key = "value" }` in a recipe."""


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declares a knob: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones."""
    bounds = {"low": low, "above": above, "high": high, "below": below, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **bounds})


class Checked:
    """Checks every knob of a section against its declaration when the section is made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]
            where = f"{type(self).__name__.lower()}.{declared.name}"
            value = coerce(where, getattr(self, declared.name), hints[declared.name])
            object.__setattr__(self, declared.name, value)
            _check_bounds(where, value, declared.metadata)


_LONGEST_TEXT = 4096  # characters
_LEAST, _MOST = 1e-30, 1e30  # of a number that is not 0: squares and ratios of such numbers are finite
_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text in quotes"}
_LISTS = {tuple[str, ...]: "texts", tuple[int, ...]: "whole numbers", tuple[float, ...]: "numbers"}


def coerce(where: str, value: Any, kind: Any) -> Any:
    """Brings a TOML value to the declared type, or says what was expected."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            raise RecipeError(f"{where} has more digits than a number can have: write one below 1e308.") from None
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        if not -(1 << 63) <= value < 1 << 63:
            raise RecipeError(f"{where} = {shown(value)} is out of range: a whole number has at most 18 digits here.")
        return value
    if kind is str and isinstance(value, str):
        return _checked_text(where, value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind == tuple[str, ...] and isinstance(value, str):
        return (value,)
    if kind in _LISTS and isinstance(value, list | tuple):
        item_kind = kind.__args__[0]
        return tuple(coerce(f"{where}[{i}]", item, item_kind) for i, item in enumerate(value))
    if kind == Table and (isinstance(value, Mapping) or value == () or _is_table(value)):
        pairs = value.items() if isinstance(value, Mapping) else value
        return tuple(sorted((str(key), coerce(f"{where}.{key}", item, str)) for key, item in pairs))
    expected = "a table of texts" if kind == Table else _WORDS.get(kind) or f"a list of {_LISTS[kind]}"
    raise RecipeError(f"{where} = {shown(value)} is not {expected}: write {expected}.")


def _checked_text(where: str, text: str) -> str:
    """Refuses what no file name, table or terminal can have: control characters, bytes that are no text, and whole books."""
    if len(text) > _LONGEST_TEXT:
        raise RecipeError(
            f"{where} = {shown(text)} has {len(text):,} characters: at most {_LONGEST_TEXT:,} are allowed."
        )
    for letter in text:
        if (letter < " " and letter not in "\t\n") or "\x7f" <= letter < "\xa0" or "\ud800" <= letter <= "\udfff":
            raise RecipeError(
                f"{where} = {shown(text)} has the character {cut(letter)}, which no text may have: remove it."
            )
    return text


def _is_table(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)


def _check_bounds(where: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Checks a value, every item of a list, or every key of a table, against its declared bounds."""
    items = value if isinstance(value, tuple) else (value,)
    for item in [pair[0] for pair in items] if value and _is_table(value) else items:
        if bounds["choices"] and item not in bounds["choices"]:
            reject_removed_value(where, item)
            raise RecipeError(f"{where} = {shown(item)} is not known: choose one of {', '.join(bounds['choices'])}.")
        if isinstance(item, int | float) and not isinstance(item, bool):
            _check_number(where, item, bounds)


def _check_number(where: str, value: float, bounds: Mapping[str, Any]) -> None:
    if not math.isfinite(value):
        raise RecipeError(f"{where} = {value} is not finite: give a finite number.")
    if value and not _LEAST <= abs(value) <= _MOST:
        raise RecipeError(
            f"{where} = {value} is out of range: numbers of a recipe are 0 or between {_LEAST:g} and {_MOST:g}."
        )
    for name, broken, words in (
        ("low", lambda bound: value < bound, "at least"),
        ("above", lambda bound: value <= bound, "above"),
        ("high", lambda bound: value > bound, "at most"),
        ("below", lambda bound: value >= bound, "below"),
    ):
        if bounds[name] is not None and broken(bounds[name]):
            raise RecipeError(f"{where} = {value} is out of range: it must be {words} {bounds[name]:g}.")
