"""The "hybrid" encoder: what the prior knows, what the run has learned, and a fresh random look at everything else.

Legend: N clients, D adapter values, K code values; of these H of the head, J directions, the others of the sketch.

A fixed subspace has a ceiling: what lies outside is never learned. A random sketch has none, but sees K / D of everything. A
hybrid code is [head | directions | sketch]: the head is the Kronecker encoder's leading coordinates; the directions are those of the
server's momentum and of all that it has moved so far (made of released aggregates: post-processing, so they cost nothing), made
orthogonal to the head; the sketch is a new random part, in each round, of what both leave over.

All of it is about LoRA's B tensors alone: A stays as it started, as in FFA-LoRA (Sun et al. 2024,
https://arxiv.org/abs/2403.12313), and the server can take longer steps (measured: docs/log.md).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from drencoder.encoders import contract
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.kronecker import KroneckerEncoder
from drencoder.encoders.random_sketch import UNIFORM_SHARE, RandomSketch, allocate_code
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment

# A direction of which the head leaves less than this share of the length is rounding.
_LEAST = 1e-3


@final
@dataclass(frozen=True, eq=False)
class HybridEncoder:
    """code = [H u | M R_h u | S R u], R_h = I - H'H, R = R_h - M'M; decode(c) = H'c_h + M'c_m + R S'c_s.

    H and M have orthonormal rows and S (`RandomSketch.project`) has them in each round, so that
    |code| <= |update|. The random block is projected, not blown up by the inverse of its share: that would make it unbiased,
    and its noise as many times louder. direction_JD float32.
    """

    head: KroneckerEncoder
    direction_JD: Tensor
    sketch: RandomSketch | None

    name: ClassVar[str] = "hybrid"
    linear: ClassVar[bool] = True

    @classmethod
    def build(cls, head: KroneckerEncoder, directions: Tensor, sketch: RandomSketch | None) -> "HybridEncoder":
        """Takes the head's part out of `directions` (any number of rows, D) and makes them orthonormal.

        Rows that the head or earlier rows explain are left out, so that J may be smaller; zero rows are fine. EncoderError if
        a value is not finite or head and sketch are of different adapters.
        """
        rows_JD = directions.float()
        if rows_JD.dim() != 2 or rows_JD.shape[1] != head.update_size or not bool(rows_JD.isfinite().all()):
            raise EncoderError(
                f"directions of shape {tuple(rows_JD.shape)} are no finite rows of {head.update_size} values; give the "
                "run's own momentum"
            )
        if sketch is not None and sketch.segments != head.segments:
            raise EncoderError("the sketch is of another adapter than the head; build both from one layout")
        length_J = rows_JD.norm(dim=1, keepdim=True)
        rows_JD = rows_JD[length_J[:, 0] > 0] / length_J[length_J[:, 0] > 0]
        rest_JD = rows_JD - head.decode(head.encode(rows_JD, 0), 0)
        kept: list[Tensor] = []
        for row in rest_JD:
            for other in kept:
                row = row - (row @ other) * other
            if float(row.norm()) > _LEAST:
                kept.append(row / row.norm())
        direction_JD = torch.stack(kept) if kept else rows_JD[:0]
        return cls(head, direction_JD, sketch)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.head.segments

    @property
    def update_size(self) -> int:
        return self.head.update_size

    @cached_property
    def code_size(self) -> int:
        return self.head.code_size + len(self.direction_JD) + (self.sketch.code_size if self.sketch else 0)

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        update_ND = contract.check_update(self, update_ND)
        head_NH = self.head.encode(update_ND, seed)
        rest_ND = update_ND - self.head.decode(head_NH, seed)
        direction_JD = self._directions_on(update_ND.device)
        along_NJ = rest_ND @ direction_JD.T
        parts = [head_NH, along_NJ]
        if self.sketch is not None:
            rest_ND = rest_ND - along_NJ @ direction_JD
            parts.append(self.sketch.project(rest_ND, seed))
        return contract.mark_non_finite(torch.cat(parts, dim=1), update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        code_NK = contract.check_code(self, code_NK)
        head, directions = self.head.code_size, len(self.direction_JD)
        direction_JD = self._directions_on(code_NK.device)
        known_ND = self.head.decode(code_NK[:, :head], seed) + code_NK[:, head : head + directions] @ direction_JD
        if self.sketch is None:
            return known_ND
        looked_ND = self.sketch.lift(code_NK[:, head + directions :], seed)
        looked_ND = looked_ND - self.head.decode(self.head.encode(looked_ND, seed), seed)
        looked_ND = looked_ND - (looked_ND @ direction_JD.T) @ direction_JD
        return known_ND.add_(looked_ND)

    def _directions_on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = self.direction_JD.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def describe(self) -> dict[str, Fact]:
        head = self.head.describe()
        memory = int(head["memory_bytes"]) + 4 * self.update_size * (3 + len(self.direction_JD))
        return contract.common_facts(self, public=True, memory_bytes=memory) | {
            "head": self.head.code_size,
            "directions": len(self.direction_JD),
            "random": self.sketch.code_size if self.sketch else 0,
            "basis_bytes": self.head.basis_bytes + 4 * self.direction_JD.numel(),
            "expected_capture": head["expected_capture"],
            "provenance": head["provenance"],
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of everything that does not come from the round's seed."""
        digest = hashlib.blake2b(self.head.fingerprint.encode(), digest_size=8)
        digest.update(self.direction_JD.cpu().contiguous().numpy().tobytes())
        digest.update(repr(self.sketch.code_S if self.sketch else ()).encode())
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        code_S = self.sketch.code_S if self.sketch else ()
        kept = {f"head.{name}": tensor for name, tensor in self.head.state().items()}
        return kept | {"directions": self.direction_JD, "random": torch.tensor(code_S, dtype=torch.int64)}

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor]) -> "HybridEncoder":
        """The encoder of `state`; EncoderError if it is of another layout or malformed."""
        head = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        restored = KroneckerEncoder.from_state(segments, head)
        with contract.restoring(cls.name, segments):
            direction_JD, code_S = state["directions"], tuple(state["random"].tolist())
        return cls(restored, direction_JD, RandomSketch(segments, code_S) if code_S else None)


def make_hybrid(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "hybrid": a share `explore` of the code (a quarter) is the sketch's, the head fills what directions leave.

    EncoderError if LoRA's B tensors hold fewer values than the code, or if there is none.
    """
    if state:
        return HybridEncoder.from_state(request.segments, state)
    segments, code_size = request.segments, request.required_size()
    size_S = torch.tensor([segment.size for segment in segments])
    sent_S = torch.tensor([contract.is_lora_b(segment) for segment in segments])  # the tensors that a code is about
    if not bool(sent_S.any()):
        raise EncoderError(
            f"none of the {len(size_S)} adapter tensors is the B of a LoRA pair; set encoder.name = 'kronecker'"
        )
    most = int((size_S * sent_S).sum())
    if code_size > most:
        raise EncoderError(
            f"code_size is {code_size}, but the tensors that the hybrid encoder sends have {most} values; lower it"
        )
    prior = request.structured_prior()
    random = min(code_size - 1, round(request.explore * code_size))
    history_JD = request.released_directions() * sent_S.repeat_interleave(size_S)
    history_JD = history_JD[: code_size - 1 - random]
    if code_size == most:  # all that is sent, in the prior's coordinates: nothing is left for directions or a sketch
        random, history_JD = 0, history_JD[:0]
    head = KroneckerEncoder.build(prior, code_size - random - len(history_JD), sent_S.tolist())
    without_sketch = HybridEncoder.build(head, history_JD, None)
    # The sketch also takes the place of directions that the head explains, so that the code has the size of the plan.
    random = code_size - without_sketch.code_size
    if not random:
        return without_sketch
    code_S = torch.zeros_like(size_S)
    sent_segments = tuple(segment for segment, sent in zip(segments, sent_S.tolist(), strict=True) if sent)
    code_S[sent_S] = allocate_code(sent_segments, random, None, UNIFORM_SHARE)
    return replace(without_sketch, sketch=RandomSketch(segments, tuple(code_S.tolist())))
