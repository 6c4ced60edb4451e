"""How large adapters, codes and messages are, without torch: a plan is answered in a second.

Legend: D adapter values, K code values.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from drencoder.errors import ModelError

__all__ = ["BYTES_PER_VALUE", "CELL", "HEADER_BYTES", "adapted_matrices", "code_size", "image_shape", "message_bytes"]

BYTES_PER_VALUE = {"float16": 2, "float32": 4}
HEADER_BYTES = 20  # of every message, see encoders.wire
CELL = 64  # side of the image patch behind one cell of the auto-encoder's code grid
_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


def image_shape(update_size: int) -> tuple[int, int]:
    """(H, W) of the auto-encoder's input: multiples of 64 between 1:1 and 4:1 with the least padding.

    8,388,608 values (LLaMA-7B, r = 8, q/k/v/o) give (4096, 2048).
    """
    cells = -(-update_size // CELL**2)
    widths = range(math.ceil(math.sqrt(cells) / 2), math.isqrt(cells) + 1)
    width = min(widths, key=lambda w: (-(-cells // w) * w, -w))
    return -(-cells // width) * CELL, width * CELL


def code_size(encoder: str, update_size: int, ratio: float) -> int:
    """K of an encoder by name; `ratio` is D / K where the encoder lets one choose."""
    if encoder == "identity":
        return update_size
    if encoder == "autoencoder":
        height, width = image_shape(update_size)
        return height * width // CELL
    return max(1, round(update_size / ratio))


def message_bytes(size: int, wire_dtype: str) -> int:
    """Bytes of one message of `size` values, header included."""
    return HEADER_BYTES + size * BYTES_PER_VALUE[wire_dtype]


def adapted_matrices(folder: Path, targets: Sequence[str], layers: Sequence[int]) -> list[list[int]]:
    """Shapes (out, in) of the matrices that get a LoRA pair, from a model folder's safetensors headers.

    No weights are read. A pair of rank r has r * (out + in) values.

    Raises:
      ModelError: the folder has no safetensors file, or no matrix of it is named by `targets`.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file: give a local Hugging Face folder or 'embedded'.")
    found = []
    for file in files:
        for name, shape in _header(file).items():
            module = name.removesuffix(".weight")
            layer = _LAYER.search(name)
            if layers and (layer is None or int(layer[1]) not in layers):
                continue
            if len(shape) == 2 and any(module == target or module.endswith(f".{target}") for target in targets):
                found.append(shape)
    if not found:
        raise ModelError(
            f"adapter.targets = {list(targets)} (layers {list(layers) or 'all'}) names no matrix of {folder}: "
            "name linear modules of this model."
        )
    return found


def _header(file: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from the JSON at a safetensors file's beginning."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:  # the format's own limit
                raise ValueError("header too long")
            entries = json.loads(stream.read(length))
        return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}): copy the model again.") from None
