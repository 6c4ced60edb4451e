"""The "random" encoder: every round a fresh random part of the update, by a fast orthonormal transform.

Legend: N clients, D adapter values, K code values, S segments, d_l and k_l size and code share of segment l.

Subsampled randomised Hadamard transform (Ailon & Chazelle 2009; Tropp 2011, arXiv 1011.1595), in blocks:
random signs, an orthonormal Hadamard transform of each block, k_l random coordinates of segment l.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from drencoder.encoders import contract
from drencoder.encoders.contract import Encoder, Fact
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.request import EncoderRequest, SavedState
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed

# Of a code, spread evenly whatever the prior says: the prior is of the start, and later rounds move other tensors.
UNIFORM_SHARE = 0.6

# Largest Hadamard block: 64 x 64, so that a transform is two products with a 64 x 64 matrix.
_LOG_BLOCK = 12
# Smallest block that still mixes well enough to be preferred to a mixture of sizes.
_LOG_EVEN = 8
# Values transformed at a time: one megabyte of float32, so that a piece stays in the processor's cache.
_PIECE = 1 << 18


def allocate_code(segments: tuple[Segment, ...], code_size: int, energy_S: Tensor | None, floor: float) -> Tensor:
    """k_S int64: how many of the `code_size` coordinates each segment gets; sums to it, 0 <= k_l <= d_l.

    Inside a segment the prior is i.i.d. and any orthonormal projection is as good as any other; all that
    the prior can tell is the allocation. With variance v_l = energy_l / d_l a code captures sum k_l v_l in
    expectation, and its noise costs the same in every coordinate. So for *one* round and a prior
    that is believed, the best allocation at a given K is greedy at any noise level: fill the segment of the
    largest v_l, then the next. That never touches the others again. Over many rounds of fresh sketches a
    direction of segment l is seen at rate p_l = k_l / d_l and what is left of its error falls like
    exp(-c p_l), so the best rates solve v_l exp(-c p_l) = constant: logarithmic water-filling,
    between uniform (late, small v_l) and greedy (early). c depends on step sizes nobody knows
    beforehand; used is the rule between, p_l proportional to v_l (k_l to energy), capped at d_l. It captures
    sum_l (energy_l / total)^2 K / d_l of the energy, never less than uniform's K / D. A share
    `floor` of the code is spread uniformly, and every segment gets at least one coordinate if K allows:
    LoRA's A has no gradient while B = 0 and must not be frozen out for ever. `energy_S` None: uniform.
    """
    size_S = torch.tensor([segment.size for segment in segments], dtype=torch.float64)
    total = float(size_S.sum())
    if not 1 <= code_size <= total:
        raise EncoderError(f"code_size is {code_size}, expected 1 to {int(total)}, the size of the adapter")
    if not 0.0 <= floor <= 1.0:
        raise EncoderError(f"floor is {floor}, expected a share between 0 and 1")
    weight_S = size_S / total
    if energy_S is not None:
        if energy_S.shape != size_S.shape or not bool((energy_S >= 0).all()) or not 0 < energy_S.sum() < math.inf:
            raise EncoderError(f"energy_S must be {len(segments)} numbers >= 0 with a positive, finite sum")
        energy_S = energy_S.to("cpu", torch.float64)
        weight_S = floor * weight_S + (1.0 - floor) * energy_S / energy_S.sum()
    low_S = torch.zeros_like(size_S)
    if floor > 0.0 and code_size >= len(segments):
        low_S += 1.0
    return _round_to_sum(_fill(weight_S, low_S, size_S, code_size), size_S, code_size)


def _fill(weight_S: Tensor, low_S: Tensor, high_S: Tensor, total: int) -> Tensor:
    """clamp(c * weight, low, high) with c such that the sum is `total` (bisection; the sum rises with c)."""
    below, above = 0.0, 1.0
    weight_S = weight_S.where(weight_S > 1e-12 * weight_S.max(), 0.0)  # smaller ones are beyond what bisection resolves
    reachable_S = torch.where(weight_S > 0, high_S, low_S)
    if float(reachable_S.sum()) <= total:
        # Weightless segments share what the others cannot hold, by their size.
        rest_S = (high_S - reachable_S).clamp(min=0.0)
        return reachable_S + rest_S * ((total - reachable_S.sum()) / rest_S.sum().clamp(min=1e-300))
    while float((above * weight_S).clamp(low_S, high_S).sum()) < total:
        above *= 2.0
    for _ in range(100):
        middle = (below + above) / 2.0
        if float((middle * weight_S).clamp(low_S, high_S).sum()) < total:
            below = middle
        else:
            above = middle
    return (above * weight_S).clamp(low_S, high_S)


def _round_to_sum(real_S: Tensor, high_S: Tensor, total: int) -> Tensor:
    """Largest-remainder rounding to integers that sum to `total` and stay below `high_S`."""
    whole_S = (real_S + 1e-9).floor()
    order_S = torch.argsort(real_S - whole_S, descending=True, stable=True)
    while (missing := total - int(whole_S.sum())) > 0:
        open_S = order_S[(whole_S < high_S)[order_S]][:missing]
        whole_S[open_S] += 1.0
    return whole_S.to(torch.int64)


@dataclass(frozen=True)
class _Run:
    """`count` neighbouring blocks of 2 ** `log_size` values, from `start` on."""

    start: int
    log_size: int
    count: int


def _tile(segments: tuple[Segment, ...]) -> tuple[_Run, ...]:
    """Cuts every segment into power-of-two blocks that cross no border, so that the transform is exactly
    orthonormal for any size. Neighbours of the same size become one run.

    A size with a large power of two in it is cut evenly (1536 = 3 x 512, as LoRA's sizes mostly are, which makes
    a whole adapter one run); others largest first, down to blocks of 1 that stay unmixed.
    """
    runs: list[_Run] = []
    for segment in segments:
        position = segment.start
        largest = _LOG_BLOCK
        if (even := (segment.size & -segment.size).bit_length() - 1) >= _LOG_EVEN:
            largest = min(even, _LOG_BLOCK)
        while position < segment.stop:
            log_size = min(largest, (segment.stop - position).bit_length() - 1)
            count = (segment.stop - position) >> log_size
            if runs and runs[-1].log_size == log_size:
                runs[-1] = _Run(runs[-1].start, log_size, runs[-1].count + count)
            else:
                runs.append(_Run(position, log_size, count))
            position += count << log_size
    return tuple(runs)


@lru_cache(maxsize=32)
def _hadamard(log_size: int, device: torch.device) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix of 2 ** log_size rows (Sylvester's), float32."""
    matrix = torch.ones(1, 1, device=device)
    for _ in range(log_size):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(matrix.shape[0])


def _transform(values_ND: Tensor, log_size: int) -> Tensor:
    """The orthonormal Hadamard transform of neighbouring blocks of 2 ** log_size values; its own inverse."""
    left = _hadamard(log_size // 2, values_ND.device)
    right = _hadamard(log_size - log_size // 2, values_ND.device)
    blocks = values_ND.reshape(-1, left.shape[0], right.shape[0])
    return (left @ (blocks @ right)).view(values_ND.shape)


@dataclass(frozen=True)
class _Piece:
    """Columns [start, stop) of an update, whole blocks; and of the code, [first, last) with their positions
    `index` and signs, for one round."""

    start: int
    stop: int
    log_size: int
    first: int
    last: int
    index: Tensor
    sign: Tensor

    def rows(self, count: int) -> Iterator[slice]:
        """The rows of a cohort, as many at a time as fit the cache."""
        step = max(1, _PIECE // (self.stop - self.start))
        return (slice(row, row + step) for row in range(0, count, step))


@final
@dataclass(frozen=True)
class RandomSketch:
    """code = s P u with P (K, D) orthonormal, fresh for each seed; decode(c) = P^T W c / s.

    s = sqrt(D / K), one constant for the whole code, so that E|code|^2 = |update|^2 for uniform allocation
    (or an isotropic update): a clip norm means the same for code and update. The privacy proof does not
    rest on it. W weighs segment l by w_l = (K / D) / (k_l / d_l), so that the expectation of decode(encode(u)) over
    seeds is (K / D) u: whatever the allocation, it changes the variance of the direction and not the direction. (Plain
    projection, w_l = 1, pulls the step towards large segments; with it the quickstart learned far less, docs/log.md.)
    With uniform allocation w_l = 1 up to rounding, and decode(encode(u)) is the orthogonal projection P^T P u. For
    any fixed u the expectation of |P u|^2 over seeds is sum_l (k_l / d_l) |u_l|^2, exactly.
    """

    segments: tuple[Segment, ...]
    code_S: tuple[int, ...]  # k_l

    name: ClassVar[str] = "random"
    linear: ClassVar[bool] = True

    @classmethod
    def build(
        cls,
        segments: tuple[Segment, ...],
        code_size: int,
        prior: GaussianPrior | None = None,
        floor: float = UNIFORM_SHARE,
    ) -> "RandomSketch":
        """Allocates `code_size` coordinates by the prior's energies (`allocate_code`); EncoderError if it
        is not within 1..D."""
        contract.check_segments(segments)
        energy_S = None if prior is None else prior.energy_S
        return cls(segments, tuple(allocate_code(segments, code_size, energy_S, floor).tolist()))

    def __post_init__(self) -> None:
        contract.check_segments(self.segments)
        sizes = [segment.size for segment in self.segments]
        fits = len(self.code_S) == len(sizes) and all(
            0 <= k <= size for k, size in zip(self.code_S, sizes, strict=True)
        )
        if not fits or sum(self.code_S) < 1:
            raise EncoderError("the sketch's allocation does not fit the segments; make it with RandomSketch.build")

    @cached_property
    def update_size(self) -> int:
        return self.segments[-1].stop

    @cached_property
    def code_size(self) -> int:
        return sum(self.code_S)

    @property
    def scale(self) -> float:
        """s of the class docstring."""
        return math.sqrt(self.update_size / self.code_size)

    def expected_capture(self, energy_S: Tensor) -> float:
        """Expected share of |u|^2 that survives, for an update (or prior) of these energies."""
        size_S = torch.tensor([segment.size for segment in self.segments], dtype=torch.float64)
        rate_S = torch.tensor(self.code_S, dtype=torch.float64) / size_S
        energy_S = energy_S.to("cpu", torch.float64)
        return float((rate_S * energy_S).sum() / energy_S.sum())

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return self.project(update_ND, seed).mul_(self.scale)

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        weighted_NK = contract.check_code(self, code_NK) * (self.decode_weight_K.to(code_NK.device) / self.scale)
        return self.lift(weighted_NK, seed)

    def project(self, update_ND: Tensor, seed: int) -> Tensor:
        """P u: `encode` without its scale."""
        update_ND = contract.check_update(self, update_ND)
        code_NK = update_ND.new_empty(update_ND.shape[0], self.code_size)
        for piece in self._pieces(seed, update_ND.device):
            for rows in piece.rows(len(update_ND)):
                mixed = _transform(update_ND[rows, piece.start : piece.stop] * piece.sign, piece.log_size)
                code_NK[rows, piece.first : piece.last] = mixed.index_select(1, piece.index)
        return contract.mark_non_finite(code_NK, update_ND)

    def lift(self, code_NK: Tensor, seed: int) -> Tensor:
        """P^T c: lift(project(u)) is the orthogonal projection, whatever the allocation."""
        code_NK = contract.check_code(self, code_NK)
        update_ND = code_NK.new_empty(code_NK.shape[0], self.update_size)
        for piece in self._pieces(seed, code_NK.device):
            for rows in piece.rows(len(code_NK)):
                part = code_NK[rows, piece.first : piece.last]
                sparse = part.new_zeros(len(part), piece.stop - piece.start).index_copy_(1, piece.index, part)
                torch.mul(_transform(sparse, piece.log_size), piece.sign, out=update_ND[rows, piece.start : piece.stop])
        return update_ND

    @cached_property
    def decode_weight_K(self) -> Tensor:
        """w_l of each code value, float32 (K,); see the class docstring."""
        k_S = torch.tensor(self.code_S)
        size_S = torch.tensor([segment.size for segment in self.segments], dtype=torch.float64)
        weight_S = (self.code_size / self.update_size) * size_S / k_S.clamp(min=1)
        return weight_S.repeat_interleave(k_S).to(torch.float32)

    def describe(self) -> dict[str, Fact]:
        facts = contract.common_facts(
            self, public=True, memory_bytes=self.update_size + 96 * self.code_size + 16 * _PIECE
        )
        rates = [k / segment.size for k, segment in zip(self.code_S, self.segments, strict=True)]
        return facts | {"rate_min": min(rates), "rate_max": max(rates)}

    def state(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _strata(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every code value: its segment, and the first position and the width of its stratum."""
        code_S = torch.tensor(self.code_S)
        size_S = torch.tensor([segment.size for segment in self.segments])
        segment_K = torch.repeat_interleave(torch.arange(len(self.segments)), code_S)
        rank_K = torch.arange(self.code_size) - (code_S.cumsum(0) - code_S)[segment_K]
        size_K, many_K = size_S[segment_K], code_S[segment_K]
        low_K = rank_K * size_K // many_K
        return segment_K, low_K, (rank_K + 1) * size_K // many_K - low_K

    @cached_property
    def _columns(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, log_size) of pieces of whole blocks, at most `_PIECE` values wide."""
        columns = []
        for run in _tile(self.segments):
            width = (_PIECE >> run.log_size) << run.log_size
            stop = run.start + (run.count << run.log_size)
            columns += [(at, min(at + width, stop), run.log_size) for at in range(run.start, stop, width)]
        return tuple(columns)

    def _pieces(self, seed: int, device: torch.device) -> Iterable[_Piece]:
        """The round's map, piece by piece; kept for one round where it is small, since a core's rows come one by one."""
        if self.update_size > _PIECE:
            return self._make_pieces(seed, device)
        key = (seed, device)
        if key not in self._kept:
            self._kept.clear()
            self._kept[key] = tuple(self._make_pieces(seed, device))
        return self._kept[key]

    def _make_pieces(self, seed: int, device: torch.device) -> Iterator[_Piece]:
        """Everything is drawn on the CPU, so that all devices agree."""
        index_K, byte, lasts = self._drawn(seed, device)
        table = (1.0 - 2.0 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.float32)).to(device)
        first = 0
        for (start, stop, log_size), last in zip(self._columns, lasts, strict=True):
            packed = byte[start // 8 : (stop + 7) // 8].to(torch.int32)
            sign = table.index_select(0, packed).view(-1)[start % 8 :][: stop - start]
            yield _Piece(start, stop, log_size, first, last, index_K[first:last] - start, sign)
            first = last

    def _drawn(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
        """The round's coordinates (K,), its signs, eight to a byte, and where each piece's coordinates end; kept for one round."""
        key = (seed, device)
        if key not in self._rounds:
            generator = torch.Generator().manual_seed(derive_seed(seed, "sketch"))
            index_K = self._draw_index(generator)
            # Eight signs from each random byte, by table: ten times faster than eight draws.
            byte = torch.randint(256, (self.update_size // 8 + 1,), dtype=torch.uint8, generator=generator)
            stops = torch.tensor([stop for _, stop, _ in self._columns])
            lasts: list[int] = torch.searchsorted(index_K, stops).tolist()
            self._rounds.clear()
            self._rounds[key] = index_K.to(device), byte.to(device), lasts
        return self._rounds[key]

    @cached_property
    def _rounds(self) -> dict[tuple[int, torch.device], tuple[Tensor, Tensor, list[int]]]:
        return {}

    @cached_property
    def _kept(self) -> dict[tuple[int, torch.device], tuple[_Piece, ...]]:
        return {}

    def _draw_index(self, generator: torch.Generator) -> Tensor:
        """The round's coordinates (K,) int64, rising.

        They are stratified: segment l is cut into k_l strata, one coordinate comes from each, and the whole
        is turned by a random shift. Every coordinate is in with probability k_l / d_l exactly, none is in
        twice, and no block is missed by chance; O(K) random numbers, where a permutation takes O(D).
        """
        segment_K, low_K, width_K = self._strata
        start_S = torch.tensor([segment.start for segment in self.segments])
        size_S = torch.tensor([segment.size for segment in self.segments])
        jitter_K = (torch.rand(self.code_size, dtype=torch.float64, generator=generator) * width_K).long()
        shift_S = (torch.rand(len(self.segments), dtype=torch.float64, generator=generator) * size_S).long()
        index_K = start_S[segment_K] + (low_K + jitter_K + shift_S[segment_K]) % size_S[segment_K]
        return index_K.sort().values


def make_random(request: EncoderRequest, state: SavedState) -> Encoder:
    """The registry's "random": allocated by stage 1's prior, uniformly without one."""
    contract.no_state("random", state)
    return RandomSketch.build(request.segments, request.required_size(), request.prior)
