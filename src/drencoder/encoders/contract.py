"""What every encoder is: a public map from adapter updates to codes, and a way back.

Legend: N clients, D adapter values, K code values, S segments.

Implementations are final frozen dataclasses that hold public facts only: no client's update is ever
kept. They may wrap one another and never inherit. Randomness comes from the round's public sketch
seed, so that clients and server agree on the same map; it protects nobody and need not be secret.
An encoder promises nothing about norms: the clip comes after it, in code space.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment

Fact = str | int | float | bool


@runtime_checkable
class Encoder(Protocol):
    """A public pair of maps between updates (N, D) and codes (N, K).

    For every implementation (tests/encoder_contract.py holds each line):

    * `encode` and `decode` accept any floating dtype, N = 0 included, and return float32 on the
      argument's device. The argument is not changed.
    * Row i of the result depends on row i of the argument and on nothing else, up to float32 rounding.
    * Finite, moderate rows (norm below 1e30) give finite rows. `encode` turns an update with any value that is
      not finite into a code of NaN, touching no other row; the clip that follows makes it a counted zero.
    * The same seed gives the same map on every call and device; seeds do not touch global state.
    * `linear` is true exactly if both maps are linear for a fixed seed: the decoding of a sum of codes is
      the sum of the decodings. If it is false, codes have to be decoded client by client.
    * A wrong shape or dtype raises `EncoderError`.
    """

    @property
    def name(self) -> str: ...
    @property
    def linear(self) -> bool: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...
    @property
    def update_size(self) -> int: ...
    @property
    def code_size(self) -> int: ...

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        """code_NK float32; `seed` is the round's public sketch seed (some encoders ignore it)."""
        ...

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        """update_ND float32, with the seed that the code was made with."""
        ...

    def describe(self) -> dict[str, Fact]:
        """Public facts for plan, run folder and certificate: name, linear, update_size, code_size,
        ratio (code_size / update_size), public (needs no data of clients), memory_bytes (working
        memory of `encode` for one update, a bound)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run cannot recompute (safetensors-able); empty for most."""
        ...


def check_segments(segments: tuple[Segment, ...]) -> int:
    """D, the number of values that the segments tile; EncoderError if they leave holes or are empty."""
    size = 0
    for segment in segments:
        if segment.start != size or segment.size < 1:
            raise EncoderError(
                f"segment {segment.name!r} covers [{segment.start}, {segment.stop}) but {size} is the next free "
                f"position; give the layout's segments, complete and in order"
            )
        size = segment.stop
    if size == 0:
        raise EncoderError("there are no adapter values to encode; give a layout with at least one segment")
    return size


def check_update(encoder: Encoder, update_ND: Tensor) -> Tensor:
    """The update as float32 (the same tensor if it is already); EncoderError unless (N, update_size)."""
    return _check(encoder, "update", update_ND, encoder.update_size)


def check_code(encoder: Encoder, code_NK: Tensor) -> Tensor:
    """The code as float32 (the same tensor if it is already); EncoderError unless (N, code_size)."""
    return _check(encoder, "code", code_NK, encoder.code_size)


def _check(encoder: Encoder, what: str, rows: Tensor, size: int) -> Tensor:
    if rows.dim() != 2 or rows.shape[1] != size:
        raise EncoderError(
            f"the {encoder.name} encoder got {what}s of shape {tuple(rows.shape)}, not (clients, {size}); "
            "build the encoder from the layout of this adapter"
        )
    if not rows.is_floating_point():
        raise EncoderError(f"the {encoder.name} encoder got {what}s of type {rows.dtype}; convert them to float32")
    return rows.to(torch.float32)


def mark_non_finite(code_NK: Tensor, update_ND: Tensor) -> Tensor:
    """`code_NK`, with NaN in the rows whose update is not finite; in place.

    A compressing encoder may skip the very value that is broken and hide that its client is. The sum of a row is
    finite exactly if the row is (of moderate size), and times zero it is zero or NaN.
    """
    return code_NK.add_(update_ND.sum(dim=1, keepdim=True).mul_(0.0))


def common_facts(encoder: Encoder, *, public: bool, memory_bytes: int) -> dict[str, Fact]:
    """The facts that every `describe` starts with."""
    return {
        "name": encoder.name, "linear": encoder.linear, "update_size": encoder.update_size,
        "code_size": encoder.code_size, "ratio": encoder.code_size / encoder.update_size, "public": public,
        "memory_bytes": memory_bytes,
    }  # fmt: skip


@contextlib.contextmanager
def restoring(name: str, segments: tuple[Segment, ...]) -> Iterator[None]:
    """Reads saved tensors in its block: EncoderError in one sentence for whatever is missing, foreign or of another shape."""
    try:
        yield
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"the saved {name} encoder does not fit this adapter of {len(segments)} tensors ({error}); restore the one of this run"
        ) from None


def no_state(name: str, state: Mapping[str, Tensor] | None) -> None:
    """Refuses saved tensors for an encoder that has none."""
    if state:
        raise EncoderError(
            f"the {name} encoder keeps no tensors but {len(state)} were saved; restore the one they belong to"
        )


def is_lora_b(segment: Segment) -> bool:
    """Whether the tensor is the B of a LoRA pair, (out, rank), by its name."""
    return ".lora_B." in segment.name


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of an encoder's state: after a refresh, a code of the old map can be told from one of the new."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensor_of_text(text: str) -> Tensor:
    """A text as uint8: safetensors holds numbers only."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def text_of_tensor(tensor: Tensor) -> str:
    """The text of `tensor_of_text`; ValueError if it is none."""
    return bytes(tensor.tolist()).decode()
