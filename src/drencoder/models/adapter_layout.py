"""LoRA tensors <-> one flat vector <-> per-module matrices.

Legend: D adapter values; leading dimensions (clients N, say) pass through every function. A vector is
float32 and in the order of `AdapterLayout.segments`, which depends on the tensors' names only.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drencoder.errors import ModelError
from drencoder.reading import natural_order

_EXACT_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """One LoRA tensor's place in the flat vector: `vector[start:stop].reshape(shape)`."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module: the weight change is `scale * B @ A`.

    `A` is (..., rank, in) and `B` is (..., out, rank); for embeddings and convolutions the shapes are
    PEFT's own.
    """

    module: str
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class AdapterLayout:
    """Where each adapter tensor lies in the flat vector. Segments tile [0, size) without gaps."""

    segments: tuple[Segment, ...]

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "AdapterLayout":
        """Orders tensors by module (numbers inside names counted as numbers), A before B.

        Raises:
          ModelError: there is no tensor at all.
        """
        if not shapes:
            raise ModelError("the adapter has no tensors: check adapter.targets against the model's module names.")
        segments, start = [], 0
        for name in sorted(shapes, key=natural_order):
            segments.append(Segment(name, start, tuple(shapes[name])))
            start = segments[-1].stop
        return cls(tuple(segments))

    @property
    def size(self) -> int:
        """Adapter values D."""
        return self.segments[-1].stop

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Joins tensors (..., *shape) into a float32 vector (..., D). Lossless for 16- and 32-bit floats.

        Raises:
          ModelError: a tensor is missing, left over, of another shape, or not a 16- or 32-bit float.
        """
        if missing := [segment.name for segment in self.segments if segment.name not in tensors]:
            raise ModelError(f"adapter tensor {missing[0]!r} is missing: save the adapter again.")
        if left_over := set(tensors) - {segment.name for segment in self.segments}:
            raise ModelError(f"adapter tensor {min(left_over)!r} has no place in the layout: same recipe?")
        parts = []
        for segment in self.segments:
            tensor = tensors[segment.name]
            lead = tensor.ndim - len(segment.shape)
            if lead < 0 or tuple(tensor.shape[lead:]) != segment.shape:
                raise ModelError(
                    f"adapter tensor {segment.name!r} has shape {tuple(tensor.shape)}, the layout says "
                    f"{segment.shape}: use the adapter's own recipe."
                )
            if tensor.dtype not in _EXACT_IN_FLOAT32:
                raise ModelError(
                    f"adapter tensor {segment.name!r} is {tensor.dtype}: use float32, bfloat16 or float16."
                )
            parts.append(tensor.reshape(*tensor.shape[:lead], segment.size).float())
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Splits a vector (..., D) into views (..., *shape), by name.

        Raises:
          ModelError: the last dimension is not D.
        """
        if vector.shape[-1] != self.size:
            raise ModelError(f"the vector has {vector.shape[-1]} values, the layout {self.size}: same recipe?")
        return {
            segment.name: vector[..., segment.start : segment.stop].reshape(*vector.shape[:-1], *segment.shape)
            for segment in self.segments
        }

    def pairs(self, vector: Tensor) -> Iterator[LoraPair]:
        """Yields the A and B of each module, as views into a vector (..., D) of values or of gradients."""
        tensors = self.unflatten(vector)
        for name, tensor in tensors.items():
            match = _LORA_NAME.fullmatch(name)
            if match and match["side"] == "A":
                partner = f"{match['module']}.lora_{match['kind'] or ''}B{match['tail']}"
                yield LoraPair(match["module"], tensor, tensors[partner])


_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?P<tail>.*)")
