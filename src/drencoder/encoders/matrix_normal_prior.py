"""The structured prior: one matrix-normal distribution per LoRA tensor, from the updates of public text.

Legend: N updates, D adapter values, S segments; a tensor is a matrix (A, B); L is the length of one of its sides, of
which Q directions are known; X rows.

A tensor G has the covariance energy * (U (x) V): U over its rows, V over its columns, both of trace 1 (matrix-variate
normal: Dawid 1981, https://doi.org/10.1093/biomet/68.1.265). A scalar prior says nothing about directions; this one's
eigenvectors are products of two short ones, so that they fit into memory where a covariance of D x D never would.

U and V are estimated from updates of text that the server may look at, which costs no privacy; how much energy each tensor
has can come from the clients' charged moments instead (`with_energies`). Nothing here can tell public updates from
private ones: who makes a prior declares where its updates came from, and that sentence goes where the prior goes.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed

# Values of the stacked updates that one singular value decomposition sees at most: 512 rows of 4,096.
_BLOCK_VALUES = 1 << 21
# Directions kept between two blocks, per direction asked for: what a block drops could have grown in the next.
_SPARE = 4
# Directions below this share of the largest second moment are rounding, not directions.
_RESOLUTION = 1e-10


def matrix_shape(segment: Segment) -> tuple[int, int]:
    """(A, B): a tensor as a matrix, its first dimension against all others; a vector is one row."""
    if len(segment.shape) < 2:
        return 1, segment.size
    return segment.shape[0], segment.size // segment.shape[0]


@final
@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Q diag(values) Q' + floor (I - Q Q'): the second moment of one side of a tensor, of trace 1.

    vectors_LQ float32 has orthonormal columns, values_Q float64 falls and is at least `floor`. No L x L matrix is formed.
    """

    vectors_LQ: Tensor
    values_Q: Tensor
    floor: float

    def __post_init__(self) -> None:
        length, known = self.vectors_LQ.shape
        values = self.values_Q.tolist()
        falls = all(first >= second for first, second in pairwise([*values, self.floor]))
        trace = sum(values) + (length - known) * self.floor
        if len(values) != known or not falls or not self.floor >= 0 or not abs(trace - 1.0) < 1e-6:
            raise EncoderError(
                f"a second moment of {known} directions has {len(values)} values, floor {self.floor:g} and trace "
                f"{trace:g}; values must fall to the floor and the trace be 1: estimate it again"
            )

    @classmethod
    def isotropic(cls, length: int) -> "SecondMoment":
        """Knows no direction."""
        return cls(torch.zeros(length, 0), torch.zeros(0, dtype=torch.float64), 1.0 / length)

    @classmethod
    def estimate(cls, rows_XL: Tensor, rank: int) -> "SecondMoment":
        """Of rows' / |rows|^2, its `rank` largest directions kept and the others averaged. All-zero rows give the isotropic one."""
        length = rows_XL.shape[1]
        total = float(torch.linalg.vector_norm(rows_XL, dtype=torch.float64)) ** 2
        if total == 0.0:
            return cls.isotropic(length)
        vectors_LQ, second_Q = top_directions(rows_XL, min(rank, length))
        known, rest = len(second_Q), length - len(second_Q)
        complete = known < rank or known >= len(rows_XL)
        if complete:
            # The known directions hold all there is. A difference from the rows' own energy would be rounding, which is not the
            # same on every processor, and an encoder with values to spare would choose among tensors by it.
            total = float(second_Q.sum())
        values_Q = second_Q / total
        floor = max(0.0, 1.0 - float(values_Q.sum())) / rest if rest and not complete else 0.0
        values_Q = values_Q.clamp(min=floor)  # blocks forget a little of the weak directions
        trace = float(values_Q.sum()) + rest * floor
        return cls(vectors_LQ, values_Q / trace, floor / trace)

    @property
    def length(self) -> int:
        """L."""
        return self.vectors_LQ.shape[0]

    def root(self, values: Tensor) -> Tensor:
        """values (..., L) times the symmetric square root."""
        extra_Q = (self.values_Q.sqrt() - math.sqrt(self.floor)).to(values.dtype)
        known = (values @ self.vectors_LQ) * extra_Q
        return known @ self.vectors_LQ.T + math.sqrt(self.floor) * values


def top_directions(rows_XL: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(vectors_LQ float32, second_Q float64): the first Q <= rank eigenvectors and eigenvalues of rows' rows.

    Thin decompositions of the rows, block by block, each together with the best of those before (incremental SVD: Brand
    2002, https://doi.org/10.1007/3-540-47969-4_47). Exact if one block holds all rows, or L <= 4 rank.
    """
    step = max(_SPARE * rank, _BLOCK_VALUES // rows_XL.shape[1])
    kept = rows_XL[:0]
    for block in rows_XL.split(step):
        _, singular, directions = torch.linalg.svd(torch.cat([kept, block]), full_matrices=False)
        kept = (singular[:, None] * directions)[: _SPARE * rank]
    second = singular.double().square()
    known = min(rank, int((second > _RESOLUTION * second[0]).sum()))
    return directions[:known].T.contiguous(), second[:known]


@final
@dataclass(frozen=True, eq=False)
class PublicUpdates:
    """Updates (N, D) float32 of make-believe clients with public text, and whose text that is, in words."""

    update_ND: Tensor
    declared: str

    def prior(self, segments: tuple[Segment, ...], rank: int) -> "MatrixNormalPrior":
        """The structured prior of these updates, each taken at norm 1: as under a clip that always binds."""
        norm_N1 = torch.linalg.vector_norm(self.update_ND, dim=1, keepdim=True).clamp(min=1e-30)
        return MatrixNormalPrior.from_updates(self.update_ND / norm_N1, segments, declared=self.declared, rank=rank)


@dataclass(frozen=True)
class Origin:
    """Where a structured prior comes from; all of it public, for the certificate.

    Args:
      declared: in the words of who ran it, which public text the updates are of.
      updates: how many there were.
      rank: directions kept per side at most.
      energies: where the tensors' energies are from: "same" (as all else), or "moments" (a charged release of the clients').
    """

    declared: str
    updates: int
    rank: int
    energies: str = "same"

    def __post_init__(self) -> None:
        if not self.declared.strip():
            raise EncoderError(
                f"declared is {self.declared!r}: a structured prior needs the provenance of its updates in words; say "
                "which public or server-held text they are of"
            )
        if self.rank < 1:
            raise EncoderError(f"rank is {self.rank}; give a rank of 1 or more")

    @property
    def sentence(self) -> str:
        """One line for people."""
        energies = "" if self.energies == "same" else f"; energies: {self.energies}"
        return f"public: {self.declared} ({self.updates} updates){energies}"


@final
@dataclass(frozen=True, eq=False)
class MatrixNormalPrior:
    """N(0, energy_l * (U_l (x) V_l)) for each tensor l, independent of the others.

    `rows` are the U_l, `columns` the V_l; energy_S float64 >= 0 is the expected |G_l|^2. U and V are second moments about zero, so
    what all updates share is in them as well, and the best linear encoder follows from them alone.
    """

    segments: tuple[Segment, ...]
    rows: tuple[SecondMoment, ...]
    columns: tuple[SecondMoment, ...]
    energy_S: Tensor
    origin: Origin

    def __post_init__(self) -> None:
        lengths = [(row.length, column.length) for row, column in zip(self.rows, self.columns, strict=True)]
        if lengths != [matrix_shape(segment) for segment in self.segments]:
            raise EncoderError(
                f"the prior's {len(lengths)} pairs of second moments do not fit the adapter's {len(self.segments)} "
                "tensors; estimate it with this adapter's layout"
            )
        _check_energies(self.energy_S, self.segments)

    @classmethod
    def from_updates(
        cls, update_ND: Tensor, segments: tuple[Segment, ...], *, declared: str, rank: int = 64
    ) -> "MatrixNormalPrior":
        """Estimates the prior from N updates of text that the server may look at; `declared` says which.

        U_l is proportional to sum_i G_i G_i' and V_l to sum_i G_i' G_i: unbiased for a matrix-normal G, and the two
        mode-wise eigenbases of the truncated HOSVD (De Lathauwer et al. 2000, https://doi.org/10.1137/S0895479896305696)
        for any other. A tensor without any energy (LoRA's A while B = 0) is isotropic of energy zero. Deterministic.

        EncoderError: not (N, D) with N >= 1, values that are not finite, all zero, or no provenance.
        """
        origin = Origin(declared, len(update_ND), rank)
        _check_updates(update_ND, segments)
        rows, columns, energies = [], [], []
        for segment in segments:
            part_NV = update_ND[:, segment.start : segment.stop].float()
            height, width = matrix_shape(segment)
            part_NAB = part_NV.reshape(-1, height, width)
            rows.append(SecondMoment.estimate(part_NAB.transpose(1, 2).reshape(-1, height), rank))
            columns.append(SecondMoment.estimate(part_NAB.reshape(-1, width), rank))
            energies.append(float(torch.linalg.vector_norm(part_NV, dtype=torch.float64)) ** 2 / len(update_ND))
        return cls(segments, tuple(rows), tuple(columns), torch.tensor(energies, dtype=torch.float64), origin)

    def with_energies(self, energy_S: Tensor) -> "MatrixNormalPrior":
        """The same directions with the energies of the clients' charged moments (`GaussianPrior.energy_S`).

        A tensor of which nothing was known becomes isotropic of that energy. Only ratios between tensors matter to encoders.
        EncoderError unless S finite numbers >= 0 of positive sum.
        """
        _check_energies(energy_S, self.segments)
        return replace(
            self, energy_S=energy_S.to("cpu", torch.float64), origin=replace(self.origin, energies="moments")
        )

    def draw_row(self, seed: int, index: int) -> Tensor:
        """Synthetic gradient number `index` (D,) float32 of this seed; always the same one."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "matrix-normal", index))
        values_D = torch.randn(self.segments[-1].stop, generator=generator)
        for segment, row, column, energy in zip(
            self.segments, self.rows, self.columns, self.energy_S.tolist(), strict=True
        ):
            part_AB = values_D[segment.start : segment.stop].view(matrix_shape(segment))
            part_AB.copy_(row.root(column.root(part_AB).T).T * math.sqrt(energy))
        return values_D


def _check_energies(energy_S: Tensor, segments: tuple[Segment, ...]) -> None:
    fits = energy_S.shape == (len(segments),) and bool((energy_S >= 0).all())
    if not fits or not 0 < float(energy_S.sum()) < math.inf:
        raise EncoderError(
            f"energies of shape {tuple(energy_S.shape)} and sum {float(energy_S.sum()):g} are no {len(segments)} numbers "
            ">= 0 with a positive, finite sum; give one per tensor"
        )


def _check_updates(update_ND: Tensor, segments: tuple[Segment, ...]) -> None:
    size = segments[-1].stop
    if update_ND.dim() != 2 or update_ND.shape[1] != size or not len(update_ND):
        raise EncoderError(
            f"a structured prior needs 1 or more updates of {size} values, got shape {tuple(update_ND.shape)}; "
            "stack the updates of public text for this adapter"
        )
    if not bool(update_ND.isfinite().all()) or not bool(update_ND.any()):
        raise EncoderError(
            f"{int((~update_ND.isfinite()).sum())} values of the public updates are not finite and "
            f"{int((update_ND != 0).sum())} are not zero; leave broken updates out and give text with replies to learn"
        )
