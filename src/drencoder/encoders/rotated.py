"""Few bits a value: a code is turned at random, and each value goes to the nearest of a few levels of a standard normal.

Legend: N codes, K code values, b bits of a level.

A code's own values are very unlike each other: one scale for all of them spends its levels on the largest. After a random
rotation every value is close to normal with the code's root mean square, whatever the code was, and the best levels are
known: those of Max (1960, https://doi.org/10.1109/TIT.1960.1057548) and Lloyd (1982). So do DRIVE (Vargaftik et al. 2021,
https://arxiv.org/abs/2105.08339) and EDEN (Vargaftik et al. 2022, https://arxiv.org/abs/2108.08842), which scale what is sent so
that its mean over rotations is the code. Ours has the code's own *length*, since a clip bounds the length and is paid for by
noise; its mean is cos * code, cos the root of the levels' mean square, the same for every code: a slightly shorter step, in no
other direction.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.encoders.random_sketch import RandomSketch
from drencoder.models.adapter_layout import Segment
from drencoder.rng import derive_seed


class Rotation:
    """An orthonormal map of K values, the same for all who know `seed`: signs and Hadamard blocks, a permutation, and both again.

    Twice, because a block is 4,096 values at most, and a K that is no power of two ends in small ones.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._blocks = RandomSketch((Segment("code", 0, (size,)),), (size,))
        self._seeds = derive_seed(seed, "first"), derive_seed(seed, "second")
        generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
        self._order_K = torch.randperm(size, generator=generator)
        self._back_K = self._order_K.argsort()

    def turn(self, code_NK: Tensor) -> Tensor:
        first, second = self._seeds
        return self._blocks.project(self._blocks.project(code_NK, first)[:, self._order_K.to(code_NK.device)], second)

    def turn_back(self, turned_NK: Tensor) -> Tensor:
        first, second = self._seeds
        return self._blocks.lift(self._blocks.lift(turned_NK, second)[:, self._back_K.to(turned_NK.device)], first)


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits values, rising, whose nearest has the least mean squared distance from a standard normal.

    Each is the mean of what is nearest to it (Lloyd's condition, iterated to 1e-12). 1 bit: +-sqrt(2 / pi).
    """
    half = 2 ** (bits - 1)
    positive = [(i + 0.5) * 3.0 / half for i in range(half)]
    while True:
        means = [_mean_between(low, high) for low, high in _cells(positive)]
        apart = max(abs(a - b) for a, b in zip(means, positive, strict=True))
        positive = means
        if apart < 1e-12:
            return *(-value for value in reversed(positive)), *positive


def _cells(positive: Sequence[float]) -> list[tuple[float, float]]:
    """From where to where each of these values above zero is the nearest."""
    return list(pairwise([0.0, *((a + b) / 2 for a, b in pairwise(positive)), math.inf]))


def _mean_between(low: float, high: float) -> float:
    """Of a standard normal, given that it lies there; 0 <= low < high."""
    mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    return (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi) / mass


def quantise(code_NK: Tensor, bits: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Lengths (N,) float64, and level_NK int8 from -2^(bits-1) to 2^(bits-1) - 1; a zero code has length 0 and levels 0.

    Finite codes of any size, float32; a length may be beyond float32's range.
    """
    half, table = 2 ** (bits - 1), torch.tensor(levels(bits), device=code_NK.device)
    largest_N1 = code_NK.abs().amax(dim=1, keepdim=True)
    # Before anything is squared: squares of the smallest and largest floats are none.
    unit_NK = torch.where(largest_N1 > 0, code_NK / largest_N1, 0.0)
    norm_N1 = unit_NK.double().norm(dim=1, keepdim=True)
    spread_NK = rotation.turn((unit_NK / norm_N1.clamp(min=1.0)).float()) * math.sqrt(code_NK.shape[1])
    level_NK = torch.bucketize(spread_NK, (table[1:] + table[:-1]) / 2) - half
    length_N1 = norm_N1 * largest_N1.double()
    return length_N1[:, 0], torch.where(length_N1 > 0, level_NK, 0).to(torch.int8)


def unit(level_K: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.float32]:
    """The direction, of length 1, that these levels stand for; still turned."""
    value_K = np.array(levels(bits))[level_K.astype(np.int64) + 2 ** (bits - 1)]
    return (value_K / np.linalg.norm(value_K)).astype(np.float32)
