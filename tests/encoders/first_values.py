"""A toy encoder as a newcomer would add it: this file and one row of the registry.

Legend: N clients, D adapter values, K code values.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from drencoder.encoders.contract import Fact, check_code, check_update, common_facts, mark_non_finite, no_state
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.models.adapter_layout import Segment


@final
@dataclass(frozen=True)
class FirstValues:
    """code = the first K values of the update; decode puts them back, with zeros behind them."""

    segments: tuple[Segment, ...]
    code_size: int

    name: ClassVar[str] = "first-values"
    linear: ClassVar[bool] = True

    @property
    def update_size(self) -> int:
        return self.segments[-1].stop

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        update_ND = check_update(self, update_ND)
        return mark_non_finite(update_ND[:, : self.code_size].clone(), update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        code_NK = check_code(self, code_NK)
        rest = code_NK.new_zeros(len(code_NK), self.update_size - self.code_size)
        return torch.cat([code_NK, rest], dim=1)

    def describe(self) -> dict[str, Fact]:
        return common_facts(self, public=True, memory_bytes=4 * self.update_size)

    def state(self) -> dict[str, Tensor]:
        return {}


def make_first_values(request: EncoderRequest, state: SavedState) -> FirstValues:
    no_state("first-values", state or {})
    return FirstValues(request.segments, request.required_size())
