"""The server's optimiser: what it does with a released direction, which is post-processing and costs no privacy.

Legend: D adapter values. Source: FedOpt (Reddi et al. 2021, https://arxiv.org/abs/2003.00295), algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drencoder.recipe import recipe as config

_ADAM_BETA2 = 0.99  # of fedadam, as in Reddi et al. 2021
_ADAM_FLOOR = 1e-8  # Adam's usual epsilon: it only keeps a value that never moved from being divided by zero


@final
@dataclass(frozen=True)
class ServerState:
    """The shared adapter (D,), the optimiser's two slots (D,), and how many steps were taken. All public."""

    adapter_D: Tensor
    first_D: Tensor
    second_D: Tensor
    steps: int

    @classmethod
    def start(cls, adapter_D: Tensor) -> "ServerState":
        return cls(adapter_D.cpu(), torch.zeros_like(adapter_D.cpu()), torch.zeros_like(adapter_D.cpu()), 0)

    def tensors(self) -> dict[str, Tensor]:
        return {"adapter": self.adapter_D, "first": self.first_D, "second": self.second_D}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], steps: int) -> "ServerState":
        """The state of `tensors()`."""
        return cls(tensors["adapter"], tensors["first"], tensors["second"], steps)


def server_step(state: ServerState, direction_D: Tensor, server: config.Server, lr: float) -> ServerState:
    """One step of the server's optimiser along a released direction (post-processing).

    fedavg: w += lr g. fedavgm: m = b m + g, w += lr m. fedadam: Adam on -g with bias correction (Kingma and Ba 2015,
    https://arxiv.org/abs/1412.6980), where Reddi et al. 2021 (https://arxiv.org/abs/2003.00295) leave the correction
    out: private runs have few rounds, and without it the first ones are ten times too long.
    """
    steps, beta = state.steps + 1, server.momentum
    if server.optimizer == "fedavg":
        return ServerState(state.adapter_D + lr * direction_D, state.first_D, state.second_D, steps)
    if server.optimizer == "fedavgm":
        first_D = beta * state.first_D + direction_D
        return ServerState(state.adapter_D + lr * first_D, first_D, state.second_D, steps)
    first_D = beta * state.first_D + (1 - beta) * direction_D
    second_D = _ADAM_BETA2 * state.second_D + (1 - _ADAM_BETA2) * direction_D.square()
    first_hat_D = first_D / (1 - beta**steps)
    second_hat_D = second_D / (1 - _ADAM_BETA2**steps)
    step_D = lr * first_hat_D / (second_hat_D.sqrt() + _ADAM_FLOOR)
    return ServerState(state.adapter_D + step_D, first_D, second_D, steps)
