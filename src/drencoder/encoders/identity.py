"""The encoder that sends the whole update: what plain DP-LoRA does, and the yardstick for the others.

Legend: N clients, D adapter values (here K = D).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

from torch import Tensor

from drencoder.encoders.contract import Encoder, Fact, check_code, check_segments, check_update, common_facts, no_state
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.models.adapter_layout import Segment


@final
@dataclass(frozen=True)
class IdentityEncoder:
    """code = update, decode = code; a float32 argument is returned itself, not a copy."""

    segments: tuple[Segment, ...]

    name: ClassVar[str] = "identity"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_segments(self.segments)

    @cached_property
    def update_size(self) -> int:
        return check_segments(self.segments)

    @property
    def code_size(self) -> int:
        return self.update_size

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return check_update(self, update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        return check_code(self, code_NK)

    def describe(self) -> dict[str, Fact]:
        return common_facts(self, public=True, memory_bytes=4 * self.update_size)

    def state(self) -> dict[str, Tensor]:
        return {}


def make_identity(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "identity"."""
    no_state("identity", state)
    return IdentityEncoder(request.segments)
