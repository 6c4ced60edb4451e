"""Who takes part when: the samplers whose law the accounting relies on.

A *slot* is one release to which clients contribute: slot 0 is stage 1 (the prior's query), slots
1..T are the rounds. Every uniform number is 53 bits of SHAKE-256 over (key, purpose, indices), so
cohorts are unpredictable without the key, the same on every platform, and never share a generator
with anything else. One million clients take about 20 ms.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from drencoder.errors import PrivacyError

KEY_BYTES = 32
_RATE_SLACK = 1e-9  # twenty rates of 0.05 sum to 1 + 2e-16; that is still one


class Sampler(Protocol):
    """Draws the cohort of a slot."""

    def cohort(self, slot: int, attempt: int = 0) -> list[int]:
        """Ascending client numbers in [0, population)."""
        ...


@dataclass(frozen=True)
class PoissonSampler:
    """Every client joins every slot independently with that slot's rate (central trust).

    The cohort is the secret that amplifies privacy: `key` must come from `secrets` and must not be
    written anywhere. `attempt` is mixed in when `fresh_attempts` is set, so that a slot which is
    released once more after a crash is a fresh draw of the same mechanism and composes with the first;
    replayed runs (tests) leave it out and get the identical cohort.
    """

    key: bytes = field(repr=False)
    population: int
    rates: Mapping[int, float]
    fresh_attempts: bool = True

    def __post_init__(self) -> None:
        _check(self.key, self.population, self.rates)

    def cohort(self, slot: int, attempt: int = 0) -> list[int]:
        """Clients of `slot`; variable in number, and sometimes none."""
        rate = _rate(self.rates, slot)
        u_N = _uniforms(self.key, "poisson", (slot, attempt if self.fresh_attempts else 0), self.population)
        return np.flatnonzero(u_N < rate).tolist()


@dataclass(frozen=True)
class CappedSampler:
    """Bernoulli cohorts in which nobody takes part more often than there are blocks (local trust).

    `blocks` splits the slots. In each block every client draws one uniform number and joins the slot
    whose interval [sum of the rates before it, + its rate) holds that number, or none. So each slot's
    membership is Bernoulli(rate), independent across clients, and a client joins at most one slot of a
    block. A function of (key, slot) alone: `attempt` changes nothing, since a second, different cohort
    would let a client take part twice.
    """

    key: bytes = field(repr=False)
    population: int
    rates: Mapping[int, float]
    blocks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        _check(self.key, self.population, self.rates)
        for block in self.blocks:
            total = math.fsum(_rate(self.rates, slot) for slot in block)
            if total > 1 + _RATE_SLACK:
                raise PrivacyError(
                    f"The sampling rates of slots {block[0]} to {block[-1]} sum to {total:.4g}, more than 1, "
                    f"but a client joins at most one of them: raise the participation cap above "
                    f"{len(self.blocks)}, lower the sampling rate, or plan fewer rounds."
                )

    def cohort(self, slot: int, attempt: int = 0) -> list[int]:
        """Clients of `slot`, whatever the attempt."""
        rate = _rate(self.rates, slot)
        index, block = next((i, b) for i, b in enumerate(self.blocks) if slot in b)
        start = math.fsum(_rate(self.rates, s) for s in block[: block.index(slot)])
        # Written like the next slot's start, not as start + rate: else an ulp could belong to both.
        stop = math.fsum([*(_rate(self.rates, s) for s in block[: block.index(slot)]), rate])
        u_N = _uniforms(self.key, "capped", (index,), self.population)
        return np.flatnonzero((u_N >= start) & (u_N < stop)).tolist()


@dataclass(frozen=True)
class UnitSampler:
    """A site's draw among its own units: each joins a slot with chance `rate`, whatever other units there are.

    A unit is named by a number of its own, and its uniform number is 53 bits of SHAKE-256 over (key, slot, site, unit): no unit's
    part depends on which or how many others the site has. The draw is the secret that amplifies privacy against everybody, the
    server too. So `key` comes from `secrets`, serves one draw and is forgotten; replayed runs (tests) derive it from the seed.
    """

    key: bytes = field(repr=False)

    def joining(self, units: Sequence[int], rate: float, slot: int, site: int) -> list[int]:
        """Those of `units` that are in the slot, in their order; variable in number, and sometimes none."""
        _check(self.key, 1, {slot: rate})
        return [unit for unit in units if _uniforms(self.key, "unit", (slot, site, unit), 1)[0] < rate]


@lru_cache(maxsize=64)
def binomial_quantile(chance: float, count: int, rate: float) -> int:
    """The smallest number that a binomial draw stays at or below with probability `chance`."""
    from scipy.stats import binom

    return int(binom.ppf(chance, count, rate))


def split_blocks(slots: tuple[int, ...], cap: int) -> tuple[tuple[int, ...], ...]:
    """Splits the schedule into min(cap, number of slots) consecutive blocks of nearly equal length."""
    count = min(cap, len(slots))
    edges = [len(slots) * i // count for i in range(count + 1)]
    return tuple(slots[a:b] for a, b in itertools.pairwise(edges))


def _uniforms(key: bytes, purpose: str, indices: tuple[int, ...], count: int) -> npt.NDArray[np.float64]:
    prefix = key + "\x1f".join([purpose, *map(str, indices)]).encode()
    words = np.frombuffer(hashlib.shake_256(prefix).digest(8 * count), dtype="<u8")
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _rate(rates: Mapping[int, float], slot: int) -> float:
    if slot not in rates:
        raise PrivacyError(f"Slot {slot} is not in the schedule, which has slots {min(rates)} to {max(rates)}.")
    return rates[slot]


def _check(key: bytes, population: int, rates: Mapping[int, float]) -> None:
    if len(key) != KEY_BYTES:
        raise PrivacyError(f"The sampling key has {len(key)} bytes; it must have {KEY_BYTES}.")
    if population < 1:
        raise PrivacyError(f"The population is {population}; it must be at least 1 client.")
    for slot, rate in rates.items():
        if not 0 < rate <= 1:
            raise PrivacyError(f"The sampling rate of slot {slot} is {rate}; it must lie in (0, 1].")
