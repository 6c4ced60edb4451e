"""The "kronecker" encoder: the closed-form optimum for a matrix-normal prior, without training.

Legend: N clients, D adapter values, K code values, S segments. A tensor lies on its long side: (A, B) with A <= B,
turned if need be. Of one side, L is the length, Q the known directions, C the leading coordinates in use.

If tensor l has the second moment energy_l (U_l (x) V_l) and tensors are independent, the eigenvectors of the whole adapter's
second moment are products of one of U_l and one of V_l, with eigenvalue energy_l u_i v_j. The best linear encoder
keeps the K largest of *all* tensors (Karhunen-Loeve transform; choosing across components by variance is reverse
water-filling: Cover & Thomas 2006, Elements of Information Theory, section 10.3.3) and what it loses is the sum of the others.
A code is thus a staircase cut out of each rotated tensor P' G Q. Encoding costs two thin products per tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from drencoder.encoders import contract
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.matrix_normal_prior import MatrixNormalPrior, SecondMoment, matrix_shape
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment


@final
@dataclass(frozen=True, eq=False)
class _Basis:
    """The first C eigenvectors of a side's second moment, as the columns of an orthogonal map that is never formed.

    Up to Q they are the known directions. Beyond, where the prior is isotropic, any orthonormal completion is right, and this
    one costs no L x L matrix: columns Q to C - 1 of the block reflector H = I - W N W' with W = Q - E S, which
    maps E S to Q (Schreiber & Parlett 1988, https://doi.org/10.1137/0725014). E is the first Q unit vectors, S minus the polar
    factor of Q's top block, for which N = (I - (E'Q)' S)^-1 is well-conditioned always.
    `reflector` holds S and N; it is None if the known directions are enough.
    """

    vectors_LQ: Tensor
    count: int  # C
    reflector: Tensor | None = None  # (2, Q, Q)

    @classmethod
    def of(cls, moment: SecondMoment, count: int) -> "_Basis":
        known = moment.vectors_LQ.shape[1]
        if count <= known:
            return cls(moment.vectors_LQ[:, :count].contiguous(), count)
        top_QQ = moment.vectors_LQ[:known].double()
        left_QQ, _, right_QQ = torch.linalg.svd(top_QQ)
        polar_QQ = -(left_QQ @ right_QQ)
        inner_QQ = torch.linalg.inv(torch.eye(known, dtype=torch.float64) - top_QQ.T @ polar_QQ)
        return cls(moment.vectors_LQ, count, torch.stack([polar_QQ, inner_QQ]).float())

    def coordinates(self, values: Tensor) -> Tensor:
        """values (..., L) -> (..., C)."""
        vectors_LQ, reflector = self._on(values)
        known = values @ vectors_LQ
        if reflector is None:
            return known
        size = vectors_LQ.shape[1]
        mixed = (known - values[..., :size] @ reflector[0]) @ reflector[1]
        rest = values[..., size : self.count] - mixed @ vectors_LQ[size : self.count].T
        return torch.cat([known, rest], dim=-1)

    def combine(self, coordinates: Tensor) -> Tensor:
        """The transpose: coordinates (..., C) -> values (..., L)."""
        vectors_LQ, reflector = self._on(coordinates)
        size = vectors_LQ.shape[1]
        values = coordinates[..., :size] @ vectors_LQ.T
        if reflector is None:
            return values
        rest = coordinates[..., size:]
        mixed = (rest @ vectors_LQ[size : self.count]) @ reflector[1]
        values -= mixed @ vectors_LQ.T
        values[..., :size] += mixed @ reflector[0].T
        values[..., size : self.count] += rest
        return values

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        if like.device.type == "cpu":
            return self.vectors_LQ, self.reflector
        if like.device not in self._copies:
            reflector = None if self.reflector is None else self.reflector.to(like.device)
            self._copies[like.device] = self.vectors_LQ.to(like.device), reflector
        return self._copies[like.device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor | None]]:
        return {}  # on a graphics card: the bases are larger than what is encoded with them

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        kept = {f"{prefix}.vectors": self.vectors_LQ, f"{prefix}.count": torch.tensor(self.count)}
        return kept if self.reflector is None else kept | {f"{prefix}.reflector": self.reflector}

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor], prefix: str, length: int) -> "_Basis":
        vectors_LQ, count = kept[f"{prefix}.vectors"], int(kept[f"{prefix}.count"])
        reflector = kept.get(f"{prefix}.reflector")
        known = vectors_LQ.shape[1]
        complete = count <= known if reflector is None else reflector.shape == (2, known, known)
        if len(vectors_LQ) != length or not complete or not count <= length:
            raise ValueError(f"{prefix} has vectors of shape {tuple(vectors_LQ.shape)} for {count} of {length}")
        return cls(vectors_LQ, count, reflector)


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """One tensor's share of the code: row i of its rotated matrix gives its first `count_A[i]` values, falling in i."""

    segment: Segment
    count_A: Tensor
    short: _Basis
    long: _Basis

    @property
    def turned(self) -> bool:
        return _turned(self.segment)

    @cached_property
    def index_k(self) -> Tensor:
        """Places of this part's code values in its rotated matrix, which is flat and `long.count` wide."""
        staircase = torch.arange(self.long.count)[None, :] < self.count_A[: self.short.count, None]
        return staircase.flatten().nonzero()[:, 0]

    def _index_on(self, device: torch.device) -> Tensor:
        if device not in self._indices:
            self._indices[device] = self.index_k.to(device)
        return self._indices[device]

    @cached_property
    def _indices(self) -> dict[torch.device, Tensor]:
        return {}

    def encode(self, update_ND: Tensor) -> Tensor:
        """(N, k): rotated, and the staircase taken out."""
        values = update_ND[:, self.segment.start : self.segment.stop].reshape(-1, *matrix_shape(self.segment))
        values_NAB = values.transpose(1, 2) if self.turned else values
        core_NCR = self.short.coordinates(self.long.coordinates(values_NAB).transpose(1, 2))
        core_NV = core_NCR.transpose(1, 2).flatten(1)
        return core_NV.index_select(1, self._index_on(core_NV.device))

    def decode(self, code_Nk: Tensor) -> Tensor:
        """(N, d_l): the transpose."""
        count = len(code_Nk)
        core_NV = code_Nk.new_zeros(count, self.short.count * self.long.count)
        core_NV.index_copy_(1, self._index_on(code_Nk.device), code_Nk)
        core_NCR = core_NV.view(count, self.short.count, self.long.count).transpose(1, 2)
        values_NAB = self.long.combine(self.short.combine(core_NCR).transpose(1, 2))
        return (values_NAB.transpose(1, 2) if self.turned else values_NAB).reshape(count, self.segment.size)


@dataclass(frozen=True, eq=False)
class _Levels:
    """Groups of coordinates of equal variance: per tensor one for each row i and known direction j (a single coordinate), and
    one for row i and all directions that are not known; flat, tensors in order, i before j."""

    variance_G: Tensor
    size_G: Tensor
    shape_S: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, prior: MatrixNormalPrior, sent: Sequence[bool] | None = None) -> "_Levels":
        """Coordinates of tensors that are not `sent` come after all others, also after those that the prior never saw move."""
        variances, sizes, shapes = [], [], []
        taken = sent or [True] * len(prior.segments)
        for segment, row, column, energy, take in zip(
            prior.segments, prior.rows, prior.columns, prior.energy_S.tolist(), taken, strict=True
        ):
            short, long = (column, row) if _turned(segment) else (row, column)
            unknown = short.length - len(short.values_Q)
            short_A = torch.cat([short.values_Q, short.values_Q.new_full((unknown,), short.floor)])
            long_J = torch.cat([long.values_Q, long.values_Q.new_tensor([long.floor])])
            size_J = torch.ones(len(long_J), dtype=torch.int64)
            size_J[-1] = long.length - len(long.values_Q)
            variance_AJ = energy * torch.outer(short_A, long_J)
            variances.append((variance_AJ if take else torch.full_like(variance_AJ, -1.0)).flatten())
            sizes.append(size_J.repeat(len(short_A)))
            shapes.append((len(short_A), len(long_J)))
        return cls(torch.cat(variances), torch.cat(sizes), tuple(shapes))

    @property
    def order_G(self) -> Tensor:
        """Largest variance first; ties as they lie, which makes every row of a tensor fill from its beginning."""
        return torch.argsort(self.variance_G, descending=True, stable=True)

    def taken(self, code_size: int) -> Tensor:
        """taken_G int64: how many coordinates of each group are among the `code_size` largest."""
        order_G = self.order_G
        size_G = self.size_G[order_G]
        taken_G = torch.empty_like(size_G)
        before_G = size_G.cumsum(0) - size_G
        taken_G[order_G] = torch.minimum((code_size - before_G).clamp(min=0), size_G)
        return taken_G


def _turned(segment: Segment) -> bool:
    height, width = matrix_shape(segment)
    return height > width


@final
@dataclass(frozen=True, eq=False)
class KroneckerEncoder:
    """code = B' u, decode(c) = B c, B (D, K) orthonormal: the orthogonal projection onto the prior's first K eigenvectors.

    The map is the same in every round (seeds are ignored): what lies outside is never learned, however long a run. |code| <=
    |update|, with equality for updates inside the basis. variance_K is the prior's variance of each code value, float64.
    """

    segments: tuple[Segment, ...]
    parts: tuple[_Part, ...]
    variance_K: Tensor
    energy: float  # the prior's expected |u|^2
    provenance: str

    name: ClassVar[str] = "kronecker"
    linear: ClassVar[bool] = True

    @classmethod
    def build(cls, prior: MatrixNormalPrior, code_size: int, sent: Sequence[bool] | None = None) -> "KroneckerEncoder":
        """The best `code_size` coordinates under the prior; ties go to the earlier tensor, row and direction.

        Args:
          sent: which of the tensors a code may be about; None: all.

        EncoderError unless 1 <= code_size <= D, the values of what is sent.
        """
        contract.check_segments(prior.segments)
        levels = _Levels.of(prior, sent)
        size = int(levels.size_G[levels.variance_G >= 0].sum())
        if not 1 <= code_size <= size:
            raise EncoderError(
                f"code_size is {code_size}, expected 1 to {size}, the size of the adapter's tensors that are sent"
            )
        taken_G = levels.taken(code_size)
        parts, variances, at = [], [], 0
        for segment, row, column, shape in zip(prior.segments, prior.rows, prior.columns, levels.shape_S, strict=True):
            group = slice(at, at := at + shape[0] * shape[1])
            count_A = taken_G[group].view(shape).sum(dim=1)
            if bool(count_A.any()):
                short, long = (column, row) if _turned(segment) else (row, column)
                bases = _Basis.of(short, int((count_A > 0).sum())), _Basis.of(long, int(count_A.max()))
                parts.append(_Part(segment, count_A, *bases))
                variances.append(levels.variance_G[group].repeat_interleave(taken_G[group]))
        energy = float((levels.size_G * levels.variance_G.clamp(min=0.0)).sum())
        return cls(prior.segments, tuple(parts), torch.cat(variances), energy, prior.origin.sentence)

    @cached_property
    def update_size(self) -> int:
        return self.segments[-1].stop

    @property
    def code_size(self) -> int:
        return len(self.variance_K)

    @property
    def distortion(self) -> float:
        """Expected |u - decode(encode(u))|^2 of the prior's own gradients."""
        return max(0.0, self.energy - float(self.variance_K.sum()))

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        update_ND = contract.check_update(self, update_ND)
        code_NK = update_ND.new_empty(len(update_ND), self.code_size)
        for part, first, last in self._places:
            code_NK[:, first:last] = part.encode(update_ND)
        return contract.mark_non_finite(code_NK, update_ND)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        code_NK = contract.check_code(self, code_NK)
        update_ND = code_NK.new_zeros(len(code_NK), self.update_size)
        for part, first, last in self._places:
            update_ND[:, part.segment.start : part.segment.stop] = part.decode(code_NK[:, first:last])
        return update_ND

    @cached_property
    def _places(self) -> tuple[tuple[_Part, int, int], ...]:
        """Every part with its range [first, last) of the code."""
        places, first = [], 0
        for part in self.parts:
            places.append((part, first, first := first + len(part.index_k)))
        return tuple(places)

    @cached_property
    def basis_bytes(self) -> int:
        """Bytes of the bases, which every client needs before its first message: part of the downlink."""
        return sum(
            tensor.numel() * tensor.element_size()
            for part in self.parts
            for basis in (part.short, part.long)
            for tensor in basis.tensors("").values()
        )

    @cached_property
    def fingerprint(self) -> str:
        """See `contract.fingerprint_of`."""
        return contract.fingerprint_of(self.state())

    def describe(self) -> dict[str, Fact]:
        largest = max(part.segment.size for part in self.parts)
        memory = self.basis_bytes + 12 * self.code_size + 32 * largest
        return contract.common_facts(self, public=True, memory_bytes=memory) | {
            "basis_bytes": self.basis_bytes,
            "tensors_reached": len(self.parts),
            "expected_capture": 1.0 - self.distortion / self.energy,
            "provenance": self.provenance,
            "fingerprint": self.fingerprint,
        }

    def state(self) -> dict[str, Tensor]:
        """The bases in use and who gets how many values: the map itself, so that a resumed run or a client needs no
        prior, and no two linear-algebra libraries can disagree about it."""
        kept = {
            "variance": self.variance_K,
            "energy": torch.tensor(self.energy, dtype=torch.float64),
            "provenance": contract.tensor_of_text(self.provenance),
            "tensors": torch.tensor([self.segments.index(part.segment) for part in self.parts]),
        }
        for number, part in enumerate(self.parts):
            kept |= {f"{number}.counts": part.count_A.to(torch.int32)}
            kept |= part.short.tensors(f"{number}.short") | part.long.tensors(f"{number}.long")
        return kept

    @classmethod
    def from_state(cls, segments: tuple[Segment, ...], state: Mapping[str, Tensor]) -> "KroneckerEncoder":
        """The encoder of `state`; EncoderError if it is of another layout or malformed."""
        contract.check_segments(segments)
        with contract.restoring(cls.name, segments):
            parts = []
            for number, place in enumerate(state["tensors"].tolist()):
                segment, count_A = segments[place], state[f"{number}.counts"].long()
                short, long = sorted(matrix_shape(segment))
                bases = (
                    _Basis.from_tensors(state, f"{number}.short", short),
                    _Basis.from_tensors(state, f"{number}.long", long),
                )
                parts.append(_Part(segment, count_A, *bases))
            variance_K, provenance = state["variance"], contract.text_of_tensor(state["provenance"])
            energy = float(state["energy"])
            if sum(len(part.index_k) for part in parts) != len(variance_K):
                raise ValueError(f"{len(variance_K)} variances do not fit the counts")
        return cls(segments, tuple(parts), variance_K, energy, provenance)


def make_kronecker(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "kronecker"."""
    if state:
        return KroneckerEncoder.from_state(request.segments, state)
    return KroneckerEncoder.build(request.structured_prior(), request.required_size())
