"""FedCG's door: real gradients that train an encoder, and the permit without which there are none. NOT private.

Legend: N gradients, D adapter values, S segments.

FedCG (CG-FedLLM: Wu et al., arXiv 2405.13746) trains its auto-encoder on gradients that clients upload as they are. It is here
as the published baseline. The type says so: `Autoencoder.fit` refuses it, `Autoencoder.fit_non_private` takes
nothing else, and it comes into being only with a permit that the ledger wrote for a stage 1 without noise, so that ledger
and certificate name the run non-private before an encoder can be trained.
"""

from collections.abc import Iterable
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from drencoder.errors import EncoderError, PrivacyError
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.accounting import NonPrivateEvent
from drencoder.privacy.ledger import Permit
from drencoder.rng import derive_seed

D1_SHARE = 0.3  # of each client's records: D1, which only stage 1 uses (arXiv 2405.13746)

_ONLY_COLLECTED = object()


@final
class RealGradients:
    """Clients' gradients (N, D) float32, as they are: private data that stays in memory. It cannot be pickled or copied.

    `dropped` counts the rows that were left out because a value was not finite.
    """

    __slots__ = ("_values_ND", "dropped")

    def __init__(self, values_ND: Tensor, dropped: int = 0, *, token: object = None) -> None:
        if token is not _ONLY_COLLECTED:
            raise TypeError("RealGradients come from RealGradients.collected with the permit of a non-private stage 1")
        self._values_ND, self.dropped = values_ND, dropped

    @classmethod
    def collected(cls, values_ND: Tensor, permit: Permit) -> "RealGradients":
        """The gradients that clients uploaded in stage 1, one row per client and epoch.

        Raises:
          PrivacyError: the permit is not of slot 0 or its event is not `NonPrivateEvent`: somebody was promised noise.
          EncoderError: not (N, D) of floats, or fewer than 2 finite rows.
          TypeError: no permit.
        """
        if not isinstance(permit, Permit):
            raise TypeError(f"real gradients need a Permit of the ledger, not {type(permit).__name__}")
        if not isinstance(permit.event, NonPrivateEvent) or permit.slot != 0:
            raise PrivacyError(
                f"real gradients cannot be collected under the charge of slot {permit.slot} "
                f"({type(permit.event).__name__}): it promises noise or is no stage 1; plan the run with a "
                "non-private stage 1 (prior.source = 'gradients')"
            )
        if values_ND.dim() != 2 or not values_ND.is_floating_point():
            raise EncoderError(
                f"real gradients of shape {tuple(values_ND.shape)} and type {values_ND.dtype} are no (N, D) floats; "
                "stack one row per client and epoch"
            )
        values_ND = values_ND.detach().to("cpu", torch.float32)
        finite_N = values_ND.isfinite().all(dim=1)
        if int(finite_N.sum()) < 2:
            raise EncoderError(
                f"{int(finite_N.sum())} of {len(values_ND)} real gradients are finite, at least 2 are needed to train "
                "and to validate; collect from more clients"
            )
        kept_ND = values_ND if bool(finite_N.all()) else values_ND[finite_N]
        return cls(kept_ND, len(values_ND) - len(kept_ND), token=_ONLY_COLLECTED)

    def split(self, share: float, seed: int) -> tuple["RealGradients", "RealGradients"]:
        """(the others, a random `share` of the rows), at least one row each; the same for the same seed.

        Rows are split, not clients: with several epochs a client may have rows in both.
        """
        if not 0.0 < share < 1.0 or len(self) < 2:
            raise EncoderError(
                f"{len(self)} real gradients cannot be split at a share of {share:g}; have 2 or more, and a share "
                "between 0 and 1"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(derive_seed(seed, "real-split")))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return tuple(  # type: ignore[return-value]
            RealGradients(self._values_ND[order[part]], token=_ONLY_COLLECTED)
            for part in (slice(count, None), slice(None, count))
        )

    def __len__(self) -> int:
        return len(self._values_ND)

    @property
    def size(self) -> int:
        """D."""
        return self._values_ND.shape[1]

    @property
    def values_ND(self) -> Tensor:
        return self._values_ND

    def rows(self, indices: Iterable[int]) -> Tensor:
        """Rows (len(indices), D) in this order; IndexError unless 0 <= index < len(self)."""
        numbers = [int(index) for index in indices]
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(self)):
            raise IndexError(f"rows {min(numbers)} to {max(numbers)} of {len(self)} real gradients")
        return self._values_ND[numbers]

    def energy_S(self, segments: tuple[Segment, ...]) -> Tensor:
        """Mean |u_l|^2 per segment, float64 (S,); EncoderError if the rows are of another size."""
        if self.size != segments[-1].stop:
            raise EncoderError(
                f"real gradients of {self.size} values do not fit an adapter of {segments[-1].stop}; collect them with "
                "the same layout"
            )
        parts = (self._values_ND[:, segment.start : segment.stop] for segment in segments)
        return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]) / len(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("RealGradients are clients' private data and are never pickled, copied or saved")
