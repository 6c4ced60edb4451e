"""What turns updates into messages beside the encoders of a recipe: stage 1's statistics, plain updates, and a wrapper.

Legend: N clients, E epochs, D adapter values, K values of a message.

All have the members of `encoders.contract.Encoder`, so that a query needs no case for any of them. The two of stage 1
have nothing to decode: their messages are the answer.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.gaussian_prior import moment_statistics
from drencoder.models.adapter_layout import Segment


class _Stage1:
    """What both encoders of stage 1 share: no tensors to save, no way back, and messages that may be added up."""

    linear = True

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        return code_NK

    def describe(self) -> dict[str, Fact]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}


@final
@dataclass(frozen=True)
class MomentsEncoder(_Stage1):
    """(N, E D) -> (N, 2 E S): two moments per LoRA tensor and epoch, see `gaussian_prior.moment_statistics`."""

    segments: tuple[Segment, ...]
    epochs: int = 1
    name = "moments"

    @property
    def update_size(self) -> int:
        return self.epochs * self.segments[-1].stop

    @property
    def code_size(self) -> int:
        return 2 * self.epochs * len(self.segments)

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return moment_statistics(update_ND, self.segments, self.epochs)


@final
@dataclass(frozen=True)
class UpdatesEncoder(_Stage1):
    """(N, D) -> the same: updates as they are. Only FedCG's non-private stage 1 sends them."""

    update_size: int
    name = "gradients"
    segments: tuple[Segment, ...] = ()

    @property
    def code_size(self) -> int:
        return self.update_size

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return update_ND


@dataclass(frozen=True)
class WrappedEncoder:
    """What an encoder around another one has of it: all but how it encodes and decodes."""

    encoder: Encoder

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def linear(self) -> bool:
        return self.encoder.linear

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.encoder.segments

    @property
    def update_size(self) -> int:
        return self.encoder.update_size

    @property
    def code_size(self) -> int:
        return self.encoder.code_size

    def describe(self) -> dict[str, Fact]:
        return self.encoder.describe()

    def state(self) -> dict[str, Tensor]:
        return self.encoder.state()


@final
@dataclass(frozen=True)
class RelativeEncoder(WrappedEncoder):
    """An encoder whose codes are taken relative to the code of a zero update, so that zero has the zero code."""

    @cached_property
    def _zeros(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}  # seed and device -> the code (1, K) of a zero update there, so that a client's zero gives zero to the last bit

    def _zero_1K(self, seed: int, device: torch.device) -> Tensor:
        if (seed, device) not in self._zeros:
            zero_1D = torch.zeros(1, self.update_size, device=device)
            self._zeros[seed, device] = self.encoder.encode(zero_1D, seed)
        return self._zeros[seed, device]

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return self.encoder.encode(update_ND, seed) - self._zero_1K(seed, update_ND.device)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        return self.encoder.decode(code_NK + self._zero_1K(seed, code_NK.device), seed)
