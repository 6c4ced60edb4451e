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

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed

__all__ = ["MatrixNormalPrior", "Origin", "PublicUpdates", "SecondMoment", "matrix_shape", "top_directions"]

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
    def estimate(cls, rows_XL: Tensor, rank: int, shrinkage: float) -> "SecondMoment":
        """Of rows' / |rows|^2, its `rank` largest directions kept and the others averaged; then a share `shrinkage` of
        the isotropic one is mixed in. All-zero rows give the isotropic one."""
        length = rows_XL.shape[1]
        total = float(torch.linalg.vector_norm(rows_XL, dtype=torch.float64)) ** 2
        if total == 0.0:
            return cls.isotropic(length)
        vectors_LQ, second_Q = top_directions(rows_XL, min(rank, length))
        values_Q = (1.0 - shrinkage) * second_Q / total + shrinkage / length
        rest = length - len(values_Q)
        floor = max(0.0, 1.0 - float(values_Q.sum())) / rest if rest else 0.0
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
      declared: in the words of who ran it, whose text the updates are of.
      source: "public" (text the server may look at).
      updates: how many there were.
      rank: directions kept per side at most.
      shrinkage: share of the isotropic second moment mixed into each side.
      centred: whether a mean was taken out.
      energies: where the tensors' energies are from: "same" (as all else), or "moments" (a charged release of the clients').
    """

    declared: str
    source: str
    updates: int
    rank: int
    shrinkage: float
    centred: bool = False
    energies: str = "same"

    def __post_init__(self) -> None:
        if not self.declared.strip():
            raise EncoderError(
                f"declared is {self.declared!r}: a structured prior needs the provenance of its updates in words; say "
                "which public or server-held text they are of"
            )
        if self.rank < 1 or not 0.0 <= self.shrinkage <= 1.0:
            raise EncoderError(
                f"rank is {self.rank} and shrinkage {self.shrinkage}; give a rank of 1 or more and a share from 0 to 1"
            )

    @property
    def sentence(self) -> str:
        """One line for people."""
        energies = "" if self.energies == "same" else f"; energies: {self.energies}"
        return f"{self.source}: {self.declared} ({self.updates} updates){energies}"


@final
@dataclass(frozen=True, eq=False)
class MatrixNormalPrior:
    """N(M_l, spread_l * (U_l (x) V_l)) for each tensor l, independent of the others.

    `rows` are the U_l, `columns` the V_l; spread_S float64 >= 0 is the expected |G_l - M_l|^2; mean_D float32, None: zero.
    Without a mean (the default) U and V are second moments about zero, so what all updates share is in them as well,
    and the best linear encoder follows from them alone.
    """

    segments: tuple[Segment, ...]
    rows: tuple[SecondMoment, ...]
    columns: tuple[SecondMoment, ...]
    spread_S: Tensor
    origin: Origin
    mean_D: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = [(row.length, column.length) for row, column in zip(self.rows, self.columns, strict=True)]
        if lengths != [matrix_shape(segment) for segment in self.segments]:
            raise EncoderError(
                f"the prior's {len(lengths)} pairs of second moments do not fit the adapter's {len(self.segments)} "
                "tensors; estimate it with this adapter's layout"
            )
        _check_energies(self.spread_S, self.segments)

    @classmethod
    def from_updates(
        cls,
        update_ND: Tensor,
        segments: tuple[Segment, ...],
        *,
        declared: str,
        rank: int = 64,
        shrinkage: float = 0.0,
        centred: bool = False,
        source: str = "public",
    ) -> "MatrixNormalPrior":
        """Estimates the prior from N updates of text that the server may look at; `declared` says which.

        U_l is proportional to sum_i G_i G_i' and V_l to sum_i G_i' G_i: unbiased for a matrix-normal G, and the two
        mode-wise eigenbases of the truncated HOSVD (De Lathauwer et al. 2000, https://doi.org/10.1137/S0895479896305696)
        for any other. A tensor without any energy (LoRA's A while B = 0) is isotropic of energy zero. `centred` takes
        the mean of the updates out first. Deterministic.

        EncoderError: not (N, D) with N >= 1 (2 if centred), values that are not finite, all zero, or no provenance.
        """
        origin = Origin(declared, source, len(update_ND), rank, shrinkage, centred)
        _check_updates(update_ND, segments, 2 if centred else 1)
        mean_D = update_ND.float().mean(dim=0) if centred else None
        degrees = len(update_ND) - 1 if centred else len(update_ND)
        rows, columns, spreads = [], [], []
        for segment in segments:
            part_NV = update_ND[:, segment.start : segment.stop].float()
            if mean_D is not None:
                part_NV = part_NV - mean_D[segment.start : segment.stop]
            height, width = matrix_shape(segment)
            part_NAB = part_NV.reshape(-1, height, width)
            rows.append(SecondMoment.estimate(part_NAB.transpose(1, 2).reshape(-1, height), rank, shrinkage))
            columns.append(SecondMoment.estimate(part_NAB.reshape(-1, width), rank, shrinkage))
            spreads.append(float(torch.linalg.vector_norm(part_NV, dtype=torch.float64)) ** 2 / degrees)
        spread_S = torch.tensor(spreads, dtype=torch.float64)
        return cls(segments, tuple(rows), tuple(columns), spread_S, origin, mean_D)

    def with_energies(self, energy_S: Tensor, source: str = "moments") -> "MatrixNormalPrior":
        """The same directions with other energies: `GaussianPrior.energy_S` of the clients' charged moments, say.

        A tensor's mean is scaled with its spread; one of which nothing was known becomes isotropic of that energy. Only
        ratios between tensors matter to encoders. EncoderError unless S finite numbers >= 0 of positive sum.
        """
        _check_energies(energy_S, self.segments)
        energy_S = energy_S.to("cpu", torch.float64)
        known_S = self.energy_S > 0
        factor_S = torch.where(known_S, energy_S / self.energy_S.clamp(min=1e-300), 0.0)
        spread_S = torch.where(known_S, self.spread_S * factor_S, energy_S)
        mean_D = self.mean_D
        if mean_D is not None:
            sizes = torch.tensor([segment.size for segment in self.segments])
            mean_D = mean_D * factor_S.sqrt().to(mean_D.dtype).repeat_interleave(sizes)
        return replace(self, spread_S=spread_S, mean_D=mean_D, origin=replace(self.origin, energies=source))

    @cached_property
    def energy_S(self) -> Tensor:
        """Expected |u_l|^2 per segment, float64 (S,), the mean's share included."""
        if self.mean_D is None:
            return self.spread_S
        parts = [self.mean_D[segment.start : segment.stop] for segment in self.segments]
        return self.spread_S + torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64).square() for p in parts])

    def draw_row(self, seed: int, index: int) -> Tensor:
        """Synthetic gradient number `index` (D,) float32 of this seed; always the same one."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "matrix-normal", index))
        values_D = torch.randn(self.segments[-1].stop, generator=generator)
        for segment, row, column, spread in zip(
            self.segments, self.rows, self.columns, self.spread_S.tolist(), strict=True
        ):
            part_AB = values_D[segment.start : segment.stop].view(matrix_shape(segment))
            part_AB.copy_(row.root(column.root(part_AB).T).T * math.sqrt(spread))
        return values_D if self.mean_D is None else values_D.add_(self.mean_D)

    def facts(self) -> dict[str, str | int | float | bool]:
        """Public facts for plan and certificate: kind, `Origin`, and the bytes that `tensors` takes."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        return {"kind": "matrix-normal", **asdict(self.origin), "bytes": size}

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors for a safetensors file of the run folder; the origin as UTF-8 bytes of JSON."""
        header = {"segments": [segment.name for segment in self.segments], "origin": asdict(self.origin)}
        kept = {
            "header": torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8),
            "spread": self.spread_S,
            "floors": torch.tensor(
                [[row.floor, column.floor] for row, column in zip(self.rows, self.columns, strict=True)],
                dtype=torch.float64,
            ),
        }
        if self.mean_D is not None:
            kept["mean"] = self.mean_D
        for side, moments in (("rows", self.rows), ("columns", self.columns)):
            for number, moment in enumerate(moments):
                kept[f"{number}.{side}.vectors"], kept[f"{number}.{side}.values"] = moment.vectors_LQ, moment.values_Q
        return kept

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor], segments: tuple[Segment, ...]) -> "MatrixNormalPrior":
        """The prior of `tensors`; EncoderError if it is of another layout or malformed."""
        try:
            header = json.loads(bytes(kept["header"].tolist()))
            origin = Origin(**header["origin"])
            floors = kept["floors"].tolist()
            sides = [
                tuple(
                    SecondMoment(kept[f"{n}.{side}.vectors"], kept[f"{n}.{side}.values"], floors[n][place])
                    for n in range(len(segments))
                )
                for place, side in enumerate(("rows", "columns"))
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EncoderError(f"the saved structured prior is malformed ({error!r}); restore or refit it") from None
        if header["segments"] != [segment.name for segment in segments]:
            raise EncoderError(
                f"the saved structured prior is over {len(header['segments'])} tensors of another adapter, not over this "
                f"one's {len(segments)}; it belongs to another run"
            )
        return cls(segments, sides[0], sides[1], kept["spread"], origin, kept.get("mean"))


def _check_energies(energy_S: Tensor, segments: tuple[Segment, ...]) -> None:
    fits = energy_S.shape == (len(segments),) and bool((energy_S >= 0).all())
    if not fits or not 0 < float(energy_S.sum()) < math.inf:
        raise EncoderError(
            f"energies of shape {tuple(energy_S.shape)} and sum {float(energy_S.sum()):g} are no {len(segments)} numbers "
            ">= 0 with a positive, finite sum; give one per tensor"
        )


def _check_updates(update_ND: Tensor, segments: tuple[Segment, ...], least: int) -> None:
    size = segments[-1].stop
    if update_ND.dim() != 2 or update_ND.shape[1] != size or len(update_ND) < least:
        raise EncoderError(
            f"a structured prior needs {least} or more updates of {size} values, got shape {tuple(update_ND.shape)}; "
            "stack the updates of public text for this adapter"
        )
    if not bool(update_ND.isfinite().all()) or not bool(update_ND.any()):
        raise EncoderError(
            f"{int((~update_ND.isfinite()).sum())} values of the public updates are not finite and "
            f"{int((update_ND != 0).sum())} are not zero; leave broken updates out and give text with replies to learn"
        )
