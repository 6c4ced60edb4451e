"""How much of a cohort's updates a code holds, round by round: for a study of public text, which may look at them.

Legend: N clients of a batch, D adapter values, K code values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Round:
    mean_D: Tensor
    decoded_D: Tensor
    shares: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    code_norms: list[float] = field(default_factory=list)


class CohortEnergy:
    """Stands before `client_message` of `federated.client_side` and sums what goes through; the messages are unchanged.

    The energy that a code holds of an update u whose decoding is r is cos(u, r)^2, or 0 where the cosine is negative.
    """

    def __init__(self, client_message: Any) -> None:
        self._original, self._rounds = client_message, {}  # type: ignore[var-annotated]

    @torch.no_grad()
    def client_message(self, query: Any, update_ND: Tensor, clients: Sequence[int], permit: Any, noise: Any) -> Any:
        if query.spec.kind == "update" and len(update_ND):
            update_ND = update_ND.cpu()
            code_NK, zero_1K = query.encode(update_ND), query.encode(torch.zeros(1, update_ND.shape[1]))
            decoded_ND = query.decode(code_NK) - query.decode(zero_1K)
            found = self._rounds.setdefault(
                query.spec.slot, _Round(torch.zeros(update_ND.shape[1]), torch.zeros(update_ND.shape[1]))
            )
            found.mean_D += update_ND.sum(dim=0)
            found.decoded_D += decoded_ND.sum(dim=0)
            found.shares += [_share(u, r) for u, r in zip(update_ND, decoded_ND, strict=True)]
            found.norms += update_ND.norm(dim=1).tolist()
            found.code_norms += code_NK.norm(dim=1).tolist()
        return self._original(query, update_ND, clients, permit, noise)

    def rounds(self) -> list[dict[str, float]]:
        """One row a round: energy of the mean update and of a client's own inside the code, and norms (medians)."""
        return [
            {
                "round": slot,
                "mean": _share(one.mean_D, one.decoded_D),
                "client": sum(one.shares) / len(one.shares),
                "norm": sorted(one.norms)[len(one.norms) // 2],
                "code_norm": sorted(one.code_norms)[len(one.code_norms) // 2],
                "agreement": float(one.mean_D.norm()) / max(1e-30, sum(one.norms)),
            }
            for slot, one in sorted(self._rounds.items())
        ]


def _share(update_D: Tensor, decoded_D: Tensor) -> float:
    lengths = float(update_D.norm() * decoded_D.norm())
    cosine = float(update_D @ decoded_D) / lengths if lengths else 0.0
    return max(0.0, cosine) ** 2
