"""What contributors of a round under secure aggregation draw as their shares of noise, listened to by the auditor.

Legend: V values of a sum.
"""

from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.privacy.mechanism import NoiseSource
from drencoder.privacy.plan import Noise
from drencoder.secure_aggregation.discrete import Words
from drencoder.secure_aggregation.quantise import Quantiser


@final
class Overheard:
    """A source of noise that makes shares once more from the words that contributors draw: of all, or of the contributor `only`.

    `drew` has those who drew a whole share, in the order in which they did, and `total_V` (V,) int64 the sum of these shares in steps.
    """

    def __init__(self, source: NoiseSource, quantiser: Quantiser, only: int | None = None) -> None:
        self._source, self._quantiser, self._only = source, quantiser, only
        self._now, self._words = -1, list[npt.NDArray[np.uint64]]()
        self.kind: Noise = source.kind
        self.drew: list[int] = []
        self.total_V: npt.NDArray[np.int64] = np.zeros(quantiser.values, dtype=np.int64)

    def words(self, *indices: int) -> Words:
        """The source's own; those for (slot, contributor) begin with a share. See `NoiseSource.words`."""
        words = self._source.words(*indices)
        if len(indices) != 2 or self._only not in (None, indices[1]):  # a third index is a unit, whose code is rounded
            return words
        self.finish()
        self._now = indices[1]

        def kept(count: int) -> npt.NDArray[np.uint64]:
            self._words.append(words(count))
            return self._words[-1]

        return kept

    def finish(self) -> None:
        """Adds the share of the contributor that drew last; not if it drew less than one."""
        heard, self._words = iter(self._words), []
        try:
            self.total_V += self._quantiser.noise(lambda _count: next(heard))
        except (StopIteration, ValueError):  # too few words, or otherwise many
            return
        self.drew.append(self._now)

    @property
    def total_K(self) -> Tensor:
        """`total_V` in units of the code, float64."""
        return torch.from_numpy(self.total_V * np.float64(self._quantiser.step))
