"""What a run publishes after every round, and the released sums that anybody computes back from it.

Legend: D adapter values, V values of a release.

A run's checkpoints hold the adapter w and the optimiser's first moment m (`server_optimizer.ServerState`), and its recipe the optimiser.
Who has two checkpoints in a row solves the step for the released direction g:

    fedavg    g = (w_t - w_{t-1}) / rate
    fedavgm   g = m_t - b m_{t-1}
    fedadam   g = (m_t - b m_{t-1}) / (1 - b)

and then the code that g is the decoding of. So the public can know the sums of all rounds, and what it is promised counts them all.
"""

from typing import final

import torch
from torch import Tensor

from drencoder.audit.trials import Trial, encoded_sum
from drencoder.federated.query import Query
from drencoder.federated.round import released_update
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.federated.server_rate import learning_rate
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Server

_SAME = 1e-4
_STEPS, _EXACT = 50, 1e-12  # of the squared length of what is left


@final
class PublishedRun:
    """The published states of one run, from `adapter_D` on, round after round."""

    def __init__(self, server: Server, plan: PrivacyPlan, adapter_D: Tensor) -> None:
        self._server, self._plan, self._state = server, plan, ServerState.start(adapter_D)

    def next_sum(self, trial: Trial) -> Tensor:
        """Takes the server's step with what a trial released; returns the sum (V,) that the states before and after tell.

        What stage 1 releases is published as it is.
        """
        query, before = trial.query, self._state
        if query.spec.kind != "update":
            return trial.released.release.value
        rate = learning_rate(self._server, self._plan, query.spec.slot)
        direction_D = released_update(query, trial.released.release, trial.permit, trial.expected_cohort)
        self._state = server_step(before, direction_D, self._server, rate)
        sum_D = self._direction(before, rate) * trial.expected_cohort
        if not trial.sums_codes:
            return sum_D
        # No two codes have one decoding, so where it is that of the released sum the equation need not be solved: that takes a while.
        released_K = trial.released.release.value
        apart = float((query.decode(released_K[None])[0] - sum_D).norm())
        return released_K if apart <= _SAME * float(sum_D.norm()) else code_of(query, sum_D)

    def _direction(self, before: ServerState, rate: float) -> Tensor:
        server, after = self._server, self._state
        if server.optimizer == "fedavg":
            moved_D = after.adapter_D.double() - before.adapter_D.double()
            return (moved_D / rate if rate else torch.zeros_like(moved_D)).float()
        fresh_D = after.first_D.double() - server.momentum * before.first_D.double()
        return (fresh_D / (1 - server.momentum) if server.optimizer == "fedadam" else fresh_D).float()


def code_of(query: Query, sum_D: Tensor) -> Tensor:
    """The sum of codes (K,) of which `sum_D` (D,) is the decoding, by conjugate gradients (Hestenes and Stiefel 1952).

    Most encoders encode what they decoded to the same code, and the first step ends it. The hybrid's sketch loses what its head explains, by
    a symmetric matrix between zero and one.
    """
    code_K = torch.zeros(query.spec.wire.code_size)
    rest_K = along_K = _without_bit(query, sum_D)
    start = power = float(rest_K @ rest_K)
    for _ in range(_STEPS):
        if power <= _EXACT * start:
            break
        through_K = _without_bit(query, query.decode(along_K[None])[0])
        length = power / float(along_K @ through_K)
        code_K, rest_K = code_K + length * along_K, rest_K - length * through_K
        power, before = float(rest_K @ rest_K), power
        along_K = rest_K + power / before * along_K
    return code_K


def _without_bit(query: Query, update_D: Tensor) -> Tensor:
    """The code (K,) of a sum, zero in place of the value by which a client votes on an adaptive clip."""
    code_K = encoded_sum(query, update_D)
    if query.spec.adaptive_clip is not None:
        code_K[-1] = 0.0
    return code_K
