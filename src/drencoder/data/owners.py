"""Whose record it is: one spelling for each owner, whatever file, type or keyboard the name came from. No torch.

A person's records must belong to one client. Files spell one name in several ways: a table's empty cells turn the number `3`
into `3.0`, a form leaves a space at the end, one program writes `é` as one letter and another as two. `owner_key` gives all of
these the same key. Where two keys could still be one person, `check_spellings` refuses the data: to guess wrong in one
direction doubles what a person gives, in the other it makes one client of two people.
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from drencoder.errors import DataError

_WHOLE = re.compile(r"(-?\d+)\.0*")  # a whole number with decimal places
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,9})?", re.ASCII)


def owner_key(value: Any) -> str:
    """Returns the key of the owner that a record names: `3`, `3.0` and `" 3 "` have the same.

    The text is in Unicode's normal form NFC, without invisible characters, white space at the ends, and more than one space
    between words. A whole number has no decimal places.

    Raises:
      DataError: the value names nobody: it is empty, not a number (NaN), or neither text nor a number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{type(value).__name__} where an owner's name is expected: give text or a number.")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(
                "a number that is not finite where an owner's name is expected: give the name, or drop the record."
            )
        value = int(value) if value.is_integer() else value
    key = str(value)
    if not key.isascii():
        visible = "".join(letter for letter in key if unicodedata.category(letter) != "Cf")
        key = unicodedata.normalize("NFC", visible)
    key = " ".join(key.split())
    if not key:
        raise DataError("an empty name where an owner's is expected: give the name, or drop the record.")
    whole = _WHOLE.fullmatch(key)
    return whole[1] if whole else key


def owner_of(record: Mapping[str, Any], number: int, field: str, knob: str, where: str) -> str:
    """Returns the key of the owner whom `field` of a record names. `number` counts from 1, through all files of `where` in their order.

    Raises:
      DataError: the record has no such field, or it names nobody (`owner_key`). `knob` is the setting that names the field.
    """
    if field not in record:
        raise DataError(
            f"record {number} of {where} has no field {field!r}, or no text or number in it: set {knob} to a field of every record."
        )
    try:
        return owner_key(record[field])
    except DataError as error:
        raise DataError(f"record {number} of {where}, field {field!r}: {error}") from None


def check_spellings(keys: Iterable[str], field: str, where: str) -> None:
    """Checks that no two owners' keys could be one person: alike but for upper and lower case, or as numbers; and that they are
    names, not a table's column of true and false.

    `field` and `where` are named in the message, the owners are not.

    Raises:
      DataError: some could, or all are true or false.
    """
    keys = set(keys)
    if keys and {key.casefold() for key in keys} <= {"true", "false"}:
        raise DataError(
            f"{field!r} of {where} has nothing but true and false where an owner's name is expected: name a field that does."
        )
    alike: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        alike[_folded(key)].add(key)
    doubtful = [spellings for spellings in alike.values() if len(spellings) > 1]
    if doubtful:
        raise DataError(
            f"{sum(map(len, doubtful))} names in {field!r} of {where} may be only {len(doubtful)} owner{'s' * (len(doubtful) > 1)}: they are alike but for "
            "upper and lower case, the ways to write one number, or forms of the same letters. Write each owner in one way; give different "
            "owners names that differ in more."
        )


def _folded(key: str) -> str:
    """What all spellings of one name have in common."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", key).casefold())
    if not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text)
    sign, digits, exponent = number.as_tuple()
    significant = "".join(map(str, digits)).lstrip("0")
    bare = significant.rstrip("0")
    return f"{'-' if sign else ''}{bare}e{int(exponent) + len(significant) - len(bare)}" if bare else "0"
