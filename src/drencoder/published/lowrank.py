"""Low-rank encoders, "core" and "power": each tensor's long side is projected onto a few directions.

Legend: N clients, D adapter values, K code values, S segments. A tensor lies on its long side: (A, B) with A <= B, turned if need
be. Of its B-side, Q known directions, F fresh random ones, C = Q + F.

A tensor G is sent as G [known | fresh], A x C values; the directions are orthonormal and public, so that the map is linear.

* "core" is the idea of Fed-SB (Singhal et al. 2025, https://arxiv.org/abs/2502.15436): weight change B R A of which only the small
  core R is trained. Here U (out x r), the leading left singular directions of public text's B-gradients, stands for
  B: from each module U'G_B, r x r values, which is the gradient of R in U R A. A is never trained. Unlike Fed-SB's, U follows
  the public text's gradients whenever the encoder is refreshed.
* "power" is in the spirit of PowerSGD (Vogels et al. 2019, https://arxiv.org/abs/1905.13727), whose two-phase exchange of P = G Q and
  then G'P would be two charged queries. One is made here: G Q, with Q from the momentum of aggregates that were released
  before, which is post-processing. All that was released lies in the span of earlier Q, so that an iteration on it alone could
  never leave the first one: a share of each Q is fresh and random in every round, all of it as long as there is no momentum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from drencoder.encoders import contract
from drencoder.encoders.code_sizes import power_ranks
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, matrix_shape
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed

# Singular values below this share of the largest are rounding, not directions.
_RESOLUTION = 1e-5


@final
@dataclass(frozen=True, eq=False)
class LowRankEncoder:
    """code = [G_l Q_l for every tensor l], decode = [c_l Q_l']: an orthogonal projection, |code| <= |update|.

    Args:
      known: per tensor, directions (B, Q) float32 with orthonormal columns.
      fresh: per tensor, how many directions each round's seed adds, orthogonal to the known ones.
      name: the encoder's, "core" or "power".
      provenance: whose public text gave the directions; empty if none did.
    """

    segments: tuple[Segment, ...]
    known: tuple[Tensor, ...]
    fresh: tuple[int, ...]
    name: str
    provenance: str = ""

    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        contract.check_segments(self.segments)
        if len(self.known) != len(self.segments) or len(self.fresh) != len(self.segments):
            raise EncoderError(
                f"the {self.name} encoder got directions for {len(self.known)} and {len(self.fresh)} of "
                f"{len(self.segments)} tensors; give them for each"
            )
        for segment, known_BQ, fresh in zip(self.segments, self.known, self.fresh, strict=True):
            long = max(matrix_shape(segment))
            if known_BQ.dim() != 2 or len(known_BQ) != long or not 0 <= fresh <= long - known_BQ.shape[1]:
                raise EncoderError(
                    f"the {self.name} encoder got {tuple(known_BQ.shape)} known and {fresh} fresh directions for "
                    f"{segment.name!r} with a long side of {long}; build it for this adapter"
                )
        if self.code_size < 1:
            raise EncoderError(f"the {self.name} encoder has no direction of any tensor; give at least one")

    @classmethod
    def core(cls, prior: MatrixNormalPrior) -> "LowRankEncoder":
        """The B tensors' leading directions under the prior, as many as B has columns; nothing of A.

        Directions that the prior does not know (its rank is smaller, or it saw no gradient there) are filled up at random,
        always the same. EncoderError if there is no B.
        """
        known: list[Tensor] = []
        for place, (segment, row, column) in enumerate(zip(prior.segments, prior.rows, prior.columns, strict=True)):
            height, width = matrix_shape(segment)
            if not contract.is_lora_b(segment):
                known.append(torch.zeros(max(height, width), 0))
                continue
            leading_BQ = (row if height > width else column).vectors_LQ[:, :width]
            missing = width - leading_BQ.shape[1]
            known.append(
                torch.cat([leading_BQ, _orthogonal_to(leading_BQ, missing, derive_seed(0, "core", place))], dim=1)
            )
        return cls(prior.segments, tuple(known), (0,) * len(known), "core", prior.origin.sentence)

    @classmethod
    def power(
        cls, segments: tuple[Segment, ...], code_size: int, momentum_D: Tensor | None, explore: float
    ) -> "LowRankEncoder":
        """Known directions are the momentum's leading right singular vectors: what a power iteration on it tends to.

        How many directions a tensor gets follows from its shape and `code_size` alone (`code_sizes.power_ranks`). A share `explore` of
        them, and one at least, is fresh. EncoderError if `code_size` does not hold one direction, or the momentum is not
        a finite (D,).
        """
        size = contract.check_segments(segments)
        momentum_D = torch.zeros(size) if momentum_D is None else momentum_D.float()
        if momentum_D.shape != (size,) or not bool(momentum_D.isfinite().all()):
            raise EncoderError(
                f"momentum of shape {tuple(momentum_D.shape)} is no finite vector of {size} values; give the run's own"
            )
        tensors = [(contract.is_lora_b(segment), *matrix_shape(segment)) for segment in segments]
        known, fresh = [], []
        for segment, rank in zip(segments, power_ranks(tensors, code_size), strict=True):
            most = rank - max(1, round(explore * rank)) if rank else 0
            known_BQ = _leading(_on_long_side(momentum_D[None], segment)[0], most)
            known.append(known_BQ)
            fresh.append(rank - known_BQ.shape[1])
        return cls(segments, tuple(known), tuple(fresh), "power")

    @cached_property
    def update_size(self) -> int:
        return contract.check_segments(self.segments)

    @cached_property
    def code_size(self) -> int:
        return sum(last - first for _, first, last in self._places)

    @cached_property
    def _places(self) -> tuple[tuple[int, int, int], ...]:
        """Every tensor in use, by its number, with its range [first, last) of the code."""
        places, at = [], 0
        for number, segment in enumerate(self.segments):
            count = self.known[number].shape[1] + self.fresh[number]
            if count:
                places.append((number, at, at := at + min(matrix_shape(segment)) * count))
        return tuple(places)

    def _directions(self, number: int, seed: int, like: Tensor) -> Tensor:
        """(B, C) of one tensor in the round of this seed, made on the CPU so that every device has the same."""
        known_BQ = self.known[number]
        random_BF = _orthogonal_to(known_BQ, self.fresh[number], derive_seed(seed, self.name, number))
        return torch.cat([known_BQ, random_BF], dim=1).to(like.device)

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        update_ND = contract.check_update(self, update_ND)
        code_NK = update_ND.new_empty(len(update_ND), self.code_size)
        for number, first, last in self._places:
            values_NAB = _on_long_side(update_ND, self.segments[number])
            code_NK[:, first:last] = (values_NAB @ self._directions(number, seed, update_ND)).flatten(1)
        return contract.mark_non_finite(code_NK, update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        code_NK = contract.check_code(self, code_NK)
        update_ND = code_NK.new_zeros(len(code_NK), self.update_size)
        for number, first, last in self._places:
            segment, direction_BC = self.segments[number], self._directions(number, seed, code_NK)
            code_NAC = code_NK[:, first:last].unflatten(1, (min(matrix_shape(segment)), direction_BC.shape[1]))
            _on_long_side(update_ND, segment).copy_(code_NAC @ direction_BC.T)
        return update_ND

    @cached_property
    def fingerprint(self) -> str:
        """See `contract.fingerprint_of`."""
        return contract.fingerprint_of(self.state())

    def describe(self) -> dict[str, Fact]:
        basis_bytes = sum(4 * known_BQ.numel() for known_BQ in self.known)
        widest = max(
            known_BQ.shape[0] * (known_BQ.shape[1] + fresh)
            for known_BQ, fresh in zip(self.known, self.fresh, strict=True)
        )
        facts: dict[str, Fact] = {
            "basis_bytes": basis_bytes, "known_directions": sum(known_BQ.shape[1] for known_BQ in self.known),
            "fresh_directions": sum(self.fresh), "tensors_reached": len(self._places), "fingerprint": self.fingerprint,
        }  # fmt: skip
        if self.provenance:
            facts["provenance"] = self.provenance
        memory = basis_bytes + 16 * widest + 8 * self.code_size
        return contract.common_facts(self, public=True, memory_bytes=memory) | facts

    def state(self) -> dict[str, Tensor]:
        """The map itself, but for the fresh directions, which are the round's seed's."""
        kept = {f"{number}.known": known_BQ for number, known_BQ in enumerate(self.known)}
        return kept | {"fresh": torch.tensor(self.fresh), "provenance": contract.tensor_of_text(self.provenance)}

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor], name: str) -> "LowRankEncoder":
        """The encoder of `state`; EncoderError if it is of another layout or malformed."""
        with contract.restoring(name, segments):
            known = tuple(state[f"{number}.known"] for number in range(len(segments)))
            fresh, provenance = tuple(state["fresh"].tolist()), contract.text_of_tensor(state["provenance"])
        return cls(segments, known, fresh, name, provenance)


def _on_long_side(update_ND: Tensor, segment: Segment) -> Tensor:
    """One tensor's values (N, A, B), A <= B, as a view."""
    height, width = matrix_shape(segment)
    values = update_ND[:, segment.start : segment.stop].unflatten(1, (height, width))
    return values.transpose(1, 2) if height > width else values


def _leading(values_AB: Tensor, most: int) -> Tensor:
    """(B, Q), Q <= most: the leading right singular vectors, without those that are rounding."""
    if not most or not bool(values_AB.any()):
        return values_AB.new_zeros(values_AB.shape[1], 0)
    _, singular, directions = torch.linalg.svd(values_AB, full_matrices=False)
    count = min(most, int((singular > _RESOLUTION * singular[0]).sum()))
    return directions[:count].T.contiguous()


def _orthogonal_to(known_BQ: Tensor, count: int, seed: int) -> Tensor:
    """(B, count) random orthonormal columns, orthogonal to the known ones: the same for the same seed."""
    length, known = known_BQ.shape
    if not count:
        return known_BQ[:, :0]
    random_BF = torch.randn(length, count, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(torch.cat([known_BQ, random_BF], dim=1)).Q[:, known:]


def make_core(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "core"."""
    if state:
        return LowRankEncoder.from_state(request.segments, state, "core")
    widths = [matrix_shape(segment)[1] for segment in request.segments if contract.is_lora_b(segment)]
    prior = request.required_public().prior(request.segments, max(widths, default=1))
    return LowRankEncoder.core(prior)


def make_power(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "power"."""
    if state:
        return LowRankEncoder.from_state(request.segments, state, "power")
    history_JD = request.released_directions()
    momentum_D = history_JD[0] if len(history_JD) else None
    return LowRankEncoder.power(request.segments, request.required_size(), momentum_D, request.explore)
