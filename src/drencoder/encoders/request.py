"""What an encoder is made from, and what that needs of training gradients.

Legend: D adapter values, J directions, S segments.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drencoder.encoders.contract import check_segments
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, PublicUpdates
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment

SavedState = Mapping[str, Tensor] | None
"""`Encoder.state()` of the encoder to restore; None to make a new one."""

StepCallback = Callable[[int, float, float | None], None]
"""Called with step, training loss and, when just measured, validation loss."""


class TrainingGradients(Protocol):
    """Gradients that an encoder can be trained on: synthetic ones of a prior, or FedCG's real ones."""

    def __len__(self) -> int: ...
    @property
    def size(self) -> int: ...
    def rows(self, indices: Iterable[int]) -> Tensor: ...
    def energy_S(self, segments: tuple[Segment, ...]) -> Tensor: ...


@dataclass(frozen=True)
class EncoderRequest:
    """Everything that an encoder may be made from. All of it is public except `real`.

    Args:
      code_size: values of a code, as planned. None is allowed for an encoder whose code size follows from the adapter.
      prior: stage 1's Gaussian prior, if there was a stage 1.
      public: updates of public text.
      rank: directions that the structured prior keeps per side of a tensor.
      explore: share of the code that looks at fresh random directions, for encoders that know others.
      history_JD: directions (J, D) of aggregates that were released before.
      real: FedCG: gradients of clients to train on. NOT private.
      on_step: told about training steps.
      name: the encoder's, as the registry has it.
    """

    segments: tuple[Segment, ...]
    code_size: int | None = None
    prior: GaussianPrior | None = None
    seed: int = 0
    public: PublicUpdates | None = None
    rank: int = 64
    explore: float = 0.25
    history_JD: Tensor | None = None
    real: TrainingGradients | None = None
    on_step: StepCallback | None = None
    name: str = ""

    def required_size(self) -> int:
        """`code_size`; EncoderError if it is None."""
        if self.code_size is None:
            raise EncoderError(f"the {self.name} encoder needs a code_size; give the number of values to send")
        return self.code_size

    def check_fixed_size(self, size: int) -> None:
        """EncoderError if another code size was asked for than `size`, the encoder's only one."""
        if self.code_size not in (None, size):
            raise EncoderError(
                f"code_size is {self.code_size}, but the {self.name} encoder of this adapter always sends {size} values; leave "
                "code_size out or choose the random encoder"
            )

    def required_public(self) -> PublicUpdates:
        """`public`; EncoderError if it is None."""
        if self.public is None:
            raise EncoderError(f"the {self.name} encoder is made from updates of public text; set prior.public")
        return self.public

    def structured_prior(self) -> MatrixNormalPrior:
        """Directions of public text. The tensors' energies are those of the clients' moments where stage 1 measured them.

        EncoderError without public updates.
        """
        prior = self.required_public().prior(self.segments, self.rank)
        return prior if self.prior is None else prior.with_energies(self.prior.energy_S)

    def released_directions(self) -> Tensor:
        """The rows (J, D) of `history_JD` that are not zero: before a run's first step all of them are."""
        if self.history_JD is None:
            return torch.zeros(0, check_segments(self.segments))
        return self.history_JD[self.history_JD.any(dim=1)]
