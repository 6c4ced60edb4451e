"""Where the randomness of rounding and noise comes from."""

import os
from typing import Protocol

import numpy as np

from drencoder.privacy.plan import Noise
from drencoder.rng import derive_seed
from drencoder.secure_aggregation.discrete import Words


class NoiseSource(Protocol):
    """Randomness for rounding and noise; `kind` says whether anybody could compute it again."""

    kind: Noise

    def words(self, *indices: int) -> Words:
        """A stream of uniform 64-bit words. `indices` (slot, client) name the stream of a replayable source."""
        ...


class SecureNoise:
    """Randomness from the operating system's generator, never the same twice."""

    kind: Noise = "secure"

    def words(self, *indices: int) -> Words:
        return lambda count: np.frombuffer(os.urandom(8 * count), dtype="<u8").astype(np.uint64, copy=False)


class ReplayNoise:
    """Randomness that the seed gives again, stream by stream: for tests. A run with it has NO guarantee."""

    kind: Noise = "replay"

    def __init__(self, run_seed: int | str) -> None:
        self._run_seed = run_seed

    def words(self, *indices: int) -> Words:
        generator = np.random.Philox(derive_seed(self._run_seed, "discrete-noise", *indices))
        return lambda count: np.atleast_1d(generator.random_raw(count))
