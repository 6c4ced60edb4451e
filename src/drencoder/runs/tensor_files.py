"""The bytes of the tensors in a safetensors file, without torch: what an auditor's digests are of."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError
from drencoder.reading import natural_order, parse_json

_LONGEST_HEADER = 100_000_000  # as the format's own library


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file: `dtype` in the format's words (F32, BF16 ...), little-endian `data`."""

    dtype: str
    data: bytes


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, Any]]:
    """(name -> tensor, the facts that drencoder keeps in a checkpoint's header; empty for other files).

    Raises:
      ArtifactError: the file is missing or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): restore it from a copy of the run.") from None
    try:
        return _parsed(data)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ArtifactError(f"{path} is damaged: restore it from a copy of the run.") from None


def _parsed(data: bytes) -> tuple[dict[str, StoredTensor], Mapping[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    if length > min(_LONGEST_HEADER, len(data) - 8):
        raise ValueError
    header, body = parse_json(data[8 : 8 + length]), data[8 + length :]
    facts = parse_json(header.pop("__metadata__", {}).get("drencoder", "{}"))
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError
        tensors[name] = StoredTensor(entry["dtype"], body[start:stop])
    if not isinstance(facts, dict):
        raise ValueError
    return tensors, facts


def adapter_digest(path: Path) -> str:
    """SHA-256 of a PEFT adapter's values in the order of the flat adapter vector.

    Raises:
      ArtifactError: the file is missing or damaged.
    """
    tensors, _ = read_tensors(path)
    try:
        names = sorted(tensors, key=natural_order)
    except ValueError:  # a number of thousands of digits
        raise ArtifactError(f"{path} is damaged: restore it from a copy of the run.") from None
    return hashlib.sha256(b"".join(tensors[name].data for name in names)).hexdigest()
