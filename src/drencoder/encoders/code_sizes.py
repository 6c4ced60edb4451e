"""How large adapters, codes and messages are, without torch: a plan is answered in a second.

Legend: D adapter values, K code values.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from drencoder.errors import EncoderError

BITS_PER_VALUE = {
    "float32": 32, "rotated4": 4, "rotated2": 2, "rotated1": 1, "integer16": 16, "integer24": 24, "integer32": 32
}  # fmt: skip
NOISY_RATIO = 64.0  # noise dominates where k* < D / 64
SMALL_RATIO = 10.0  # of a code in four bits: fewer bytes than 1/64 of the values take in 32, header included
FEW_COORDINATES = 512.0
HEADER_BYTES = 20  # of every message, see encoders.wire
_SCALE_BYTES = 4  # of a message of rotated levels
CELL = 64  # side of the image patch behind one cell of the auto-encoder's code grid
_IMAGE_CODE = 64  # channels of a code cell
_SIGNAL, _SIGNAL_CELL, _SIGNAL_CHANNELS = (
    "autoencoder-cnn1d",
    256,
    8,
)  # signal values behind a cell of the code, its channels
AUTOENCODERS = ("autoencoder", "autoencoder-published", _SIGNAL, "autoencoder-unet")
"""The auto-encoders by name; all but the 1-D CNN read an update as an image."""


def image_shape(update_size: int) -> tuple[int, int]:
    """(H, W) of the auto-encoder's input: multiples of 64 between 1:1 and 4:1 with the least padding.

    8,388,608 values (LLaMA-7B, r = 8, q/k/v/o) give (4096, 2048).
    """
    cells = -(-update_size // CELL**2)
    widths = range(math.ceil(math.sqrt(cells) / 2), math.isqrt(cells) + 1)
    width = min(widths, key=lambda w: (-(-cells // w) * w, -w))
    return -(-cells // width) * CELL, width * CELL


def input_shape(name: str, update_size: int) -> tuple[int, ...]:
    """What an auto-encoder's network reads for one update: (1, H, W), or for the 1-D CNN (1, L) with L a multiple of 256.

    EncoderError for an unknown auto-encoder.
    """
    if name not in AUTOENCODERS:
        raise EncoderError(f"there is no auto-encoder {name!r}; choose one of {', '.join(AUTOENCODERS)}")
    return (1, -(-update_size // _SIGNAL_CELL) * _SIGNAL_CELL) if name == _SIGNAL else (1, *image_shape(update_size))


def code_shape(name: str, update_size: int) -> tuple[int, ...]:
    """An auto-encoder's code: (64, H/64, W/64), 1/64 of the padded values, or (8, L/256), 1/32, for the 1-D CNN."""
    _, *sides = input_shape(name, update_size)
    if name == _SIGNAL:
        return _SIGNAL_CHANNELS, sides[0] // _SIGNAL_CELL
    return (_IMAGE_CODE, *(side // CELL for side in sides))


def noise_dominates(update_size: int, k_star: float) -> bool:
    """Whether noise, and not the size of a code, limits a run: k* < D / 64."""
    return k_star < update_size / NOISY_RATIO


def few_coordinates(k_star: float) -> bool:
    """Whether a round learns so few coordinates that LoRA's A had better start at directions of public text: k* < 512.

    Measured on both sides of it (73 and 148; 1,698 and more, adapters of 32,768 and 315,392 values; docs/log.md), not derived.
    """
    return k_star < FEW_COORDINATES


def auto_ratio(update_size: int, k_star: float, wire_dtype: str = "float32") -> float:
    """D / K of the code that a plan can use: 2, 10 or 64.

    Where noise does not dominate the code is what limits the run: 2, about as many values as LoRA's B tensors have. Where it
    does, 64; or, for codes of B alone in four bits and fewer, 10: a fifth of B in 1/80 of DP-LoRA's bytes. Measured
    (docs/results/utility.md, docs/log.md), not derived.
    """
    if not noise_dominates(update_size, k_star):
        return 2.0
    return SMALL_RATIO if BITS_PER_VALUE[wire_dtype] <= 4 else NOISY_RATIO


@dataclass(frozen=True)
class AdapterShape:
    """The shapes (out, in) of the matrices that get a LoRA pair, and the pairs' rank: all that a code size follows from."""

    matrices: Sequence[Sequence[int]]
    rank: int

    @property
    def update_size(self) -> int:
        """D, values of the adapter."""
        return self.rank * sum(sum(shape) for shape in self.matrices)

    @property
    def lora_b_size(self) -> int:
        """Values of LoRA's B tensors."""
        return self.rank * sum(out for out, _ in self.matrices)


def size_by_ratio(adapter: AdapterShape, ratio: float) -> int:
    """K = D / ratio, rounded, at least 1: the rule of most encoders."""
    return max(1, round(adapter.update_size / ratio))


def size_of_autoencoder(name: str, adapter: AdapterShape, ratio: float) -> int:
    """The network's rate of the padded update."""
    return math.prod(code_shape(name, adapter.update_size))


def size_of_cores(adapter: AdapterShape, ratio: float) -> int:
    """rank x rank values of each B, or fewer where B has fewer rows."""
    return adapter.rank * sum(min(out, adapter.rank) for out, _ in adapter.matrices)


def size_of_power(adapter: AdapterShape, ratio: float) -> int:
    """As many whole directions as fit into D / ratio values."""
    rank = adapter.rank
    tensors = [tensor for out, width in adapter.matrices for tensor in ((False, rank, width), (True, out, rank))]
    counts = power_ranks(tensors, size_by_ratio(adapter, ratio))
    return sum(min(height, width) * count for (_, height, width), count in zip(tensors, counts, strict=True))


def power_ranks(tensors: Sequence[tuple[bool, int, int]], code_size: int) -> list[int]:
    """How many directions the "power" encoder projects each tensor's long side onto.

    A direction of a tensor costs as many code values as its short side is long. Tensors take one after the other, in turns,
    until the next one's would not fit: LoRA's B before its A, whose gradient is zero at the start, and long ones before
    short ones, so that the sum depends on no order of the tensors. None gets more than its long side has dimensions.

    Args:
      tensors: of each, whether it is a B, and its shape as a matrix.

    Raises:
      EncoderError: `code_size` does not hold one direction of the first tensor.
    """
    short, long = [min(shape) for _, *shape in tensors], [max(shape) for _, *shape in tensors]
    order = sorted(range(len(tensors)), key=lambda place: (not tensors[place][0], -long[place], -short[place]))
    ranks, left, queue = [0] * len(tensors), code_size, deque(order)
    while queue and short[queue[0]] <= left:
        place = queue.popleft()
        ranks[place], left = ranks[place] + 1, left - short[place]
        if ranks[place] < long[place]:
            queue.append(place)
    if not any(ranks):
        raise EncoderError(
            f"code_size is {code_size}, but one direction of one tensor already takes {short[order[0]]} values; lower "
            "encoder.ratio"
        )
    return ranks


def stage1_values(source: str, update_size: int, num_matrices: int, epochs: int) -> int:
    """Values that one client uploads in stage 1, headers apart.

    "moments": two statistics for each of A and B, per adapted matrix and epoch. "gradients" (FedCG): the whole
    gradient, per epoch. "none": nothing. EncoderError for another source.
    """
    values = {"moments": 4 * num_matrices, "gradients": update_size, "none": 0}
    if source not in values:
        raise EncoderError(f"there is no stage 1 of source {source!r}; choose one of {', '.join(values)}")
    return epochs * values[source]


def message_bytes(size: int, wire_dtype: str) -> int:
    """Bytes of one message of `size` values, header and scale included."""
    scale = _SCALE_BYTES if wire_dtype.startswith("rotated") else 0
    return HEADER_BYTES + scale + -(-size * BITS_PER_VALUE[wire_dtype] // 8)


def plain_lora_bytes(uploads: float, update_size: int, wire_dtype: str) -> int:
    """Bytes of `uploads` whole adapters, headers apart: in float32 beside codes in float32, in 16 bits beside smaller ones.

    Plain LoRA is what one would do without an encoder; nobody sends it in fewer bits, so a code's bits are its own gain.
    """
    return round(uploads * update_size * max(16, BITS_PER_VALUE[wire_dtype]) / 8)


def bytes_text(count: float) -> str:
    """A number of bytes with a decimal unit, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
