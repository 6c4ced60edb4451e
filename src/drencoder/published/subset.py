"""Encoders that send some of the update's values as they are: "ffa" (LoRA's B only) and "top-k" (a public mask).

Legend: N clients, D adapter values, K code values.

Which places are sent is public and the same for every client, so the map is linear and its noise falls on K values only.

* "ffa" is FFA-LoRA (Sun et al. 2024, https://arxiv.org/abs/2403.12313): A stays at its random start, and B alone is
  trained, clipped and noised, which keeps the noises of A and B from being multiplied. For `local.upload = "gradient"` this
  is the method exactly. In longer local training A moves inside a client, and its part is dropped when the update is
  encoded.
* "top-k" is sparsification before the noise (Fed-SMP: Hu et al. 2022, https://arxiv.org/abs/2202.07178) with one mask for all, which
  nobody's private text chose: the places where public text has the largest mean squared update.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.encoders import contract
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment


@final
@dataclass(frozen=True, eq=False)
class SubsetEncoder:
    """code = the update's values at index_K, decode = those values there and zero elsewhere: orthonormal rows.

    The map is the same in every round (seeds are ignored), and values at other places are never learned.

    Args:
      index_K: places to send, int64, rising.
      name: the encoder's, "ffa" or "top-k".
      provenance: whose public text chose the places; empty if none did.
    """

    segments: tuple[Segment, ...]
    index_K: Tensor
    name: str
    provenance: str = ""

    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        size, index_K = contract.check_segments(self.segments), self.index_K
        rising = index_K.dtype == torch.int64 and index_K.dim() == 1 and bool((index_K.diff() > 0).all())
        if not rising or not len(index_K) or not 0 <= int(index_K[0]) <= int(index_K[-1]) < size:
            raise EncoderError(
                f"the {self.name} encoder got {tuple(index_K.shape)} places of type {index_K.dtype}; give one or more "
                f"rising int64 places from 0 to {size - 1}"
            )

    @classmethod
    def lora_b(cls, segments: tuple[Segment, ...]) -> "SubsetEncoder":
        """FFA-LoRA: all values of the B tensors and none of A's. EncoderError if there is no B."""
        places = [torch.arange(segment.start, segment.stop) for segment in segments if contract.is_lora_b(segment)]
        if not places:
            raise EncoderError(
                f"none of the {len(segments)} adapter tensors is the B of a LoRA pair; the ffa encoder needs linear layers"
            )
        return cls(segments, torch.cat(places), "ffa")

    @classmethod
    def top(cls, public: PublicUpdates, segments: tuple[Segment, ...], code_size: int) -> "SubsetEncoder":
        """The `code_size` places of the largest mean squared value, every public update at norm 1; ties go to earlier places.

        EncoderError unless 1 <= code_size <= D, or if the updates are not of this adapter, not finite or all zero.
        """
        size = contract.check_segments(segments)
        if not 1 <= code_size <= size:
            raise EncoderError(f"code_size is {code_size}, expected 1 to {size}, the size of the adapter")
        update_ND = public.update_ND.float()
        if update_ND.dim() != 2 or update_ND.shape[1] != size:
            raise EncoderError(
                f"the top-k encoder got public updates of shape {tuple(update_ND.shape)}, not (updates, {size}); compute "
                "them for this adapter"
            )
        energy_D = functional.normalize(update_ND, dim=1).square().mean(dim=0)
        if not 0.0 < float(energy_D.sum()) < torch.inf:
            raise EncoderError(
                f"the public updates have a mean energy of {float(energy_D.sum()):g}; give finite ones, not all zero"
            )
        index_K = energy_D.argsort(descending=True, stable=True)[:code_size].sort().values
        return cls(segments, index_K, "top-k", f"public: {public.declared} ({len(update_ND)} updates)")

    @cached_property
    def update_size(self) -> int:
        return contract.check_segments(self.segments)

    @property
    def code_size(self) -> int:
        return len(self.index_K)

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        update_ND = contract.check_update(self, update_ND)
        return contract.mark_non_finite(update_ND.index_select(1, self.index_K.to(update_ND.device)), update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        code_NK = contract.check_code(self, code_NK)
        update_ND = code_NK.new_zeros(len(code_NK), self.update_size)
        return update_ND.index_copy_(1, self.index_K.to(code_NK.device), code_NK)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the places: a code of another mask can be told from this one's."""
        return hashlib.blake2b(self.index_K.numpy().tobytes(), digest_size=8).hexdigest()

    def describe(self) -> dict[str, Fact]:
        facts: dict[str, Fact] = {"fingerprint": self.fingerprint}
        if self.provenance:  # places that public text chose go down to every client, four bytes each
            facts |= {"provenance": self.provenance, "basis_bytes": 4 * self.code_size}
        return contract.common_facts(self, public=True, memory_bytes=12 * self.code_size) | facts

    def state(self) -> dict[str, Tensor]:
        """The places and where they are from: a resumed run must not choose again."""
        return {"index": self.index_K, "provenance": contract.tensor_of_text(self.provenance)}

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor], name: str) -> "SubsetEncoder":
        """The encoder of `state`; EncoderError if it is of another layout or malformed."""
        with contract.restoring(name, segments):
            return cls(segments, state["index"], name, contract.text_of_tensor(state["provenance"]))


def make_ffa(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "ffa"."""
    if state:
        return SubsetEncoder.from_state(request.segments, state, "ffa")
    return SubsetEncoder.lora_b(request.segments)


def make_top_k(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "top-k"."""
    if state:
        return SubsetEncoder.from_state(request.segments, state, "top-k")
    return SubsetEncoder.top(request.required_public(), request.segments, request.required_size())
