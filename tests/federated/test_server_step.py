"""What the server does with a release: its optimiser's steps, and how long they are."""

from typing import Any

import pytest
import torch

from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.federated.server_rate import learning_rate, planned_rate, step_words
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe import recipe as config

D = 50


def test_server_steps_match_torch() -> None:
    """fedavg, fedavgm and fedadam against torch.optim on the same gradients."""
    start = torch.randn(D, generator=torch.Generator().manual_seed(0))
    directions = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    reference = {
        "fedavg": lambda p: torch.optim.SGD([p], lr=0.1),
        "fedavgm": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
        "fedadam": lambda p: torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99), eps=1e-8),
    }
    for name, make in reference.items():
        server = config.Server(optimizer=name, learning_rate=0.1, momentum=0.9)
        state, parameter = ServerState.start(start), torch.nn.Parameter(start.clone())
        optimizer = make(parameter)
        for direction in directions:
            state = server_step(state, direction, server, 0.1)
            parameter.grad = -direction
            optimizer.step()
        assert torch.allclose(state.adapter_D, parameter.detach(), atol=1e-5), name
        assert torch.equal(ServerState.of(state.tensors(), state.steps).adapter_D, state.adapter_D)


def planned(**changes: Any) -> PrivacyPlan:
    base = {"trust": "central", "population": 10_000, "sampling_rate": 0.02, "rounds": 5, "delta": 1e-5, "epsilon": 8.0}
    return make_plan(**{**base, **changes})


def test_learning_rate_falls_linearly_to_its_share() -> None:
    server, plan = config.Server(learning_rate=2.0, final_share=0.1), planned(rounds=5)
    assert [learning_rate(server, plan, slot) for slot in range(1, 6)] == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])
    assert learning_rate(server, planned(rounds=1), 1) == 2.0
    assert learning_rate(config.Server(learning_rate=2.0), plan, 5) == 2.0


def test_a_rate_that_nobody_names_falls_with_the_noise_and_only_then() -> None:
    """FedAdam's steps are as long with noise as with signal, so their length follows k*; that of others follows the update."""
    open_rate = config.Server()
    quiet, loud = planned(), planned(trust="local", population=1000)
    assert loud.k_star() < 100 < 700 < quiet.k_star()
    assert planned_rate(open_rate, quiet) == 0.02
    assert planned_rate(open_rate, loud) == pytest.approx(0.02 * (loud.k_star() / 700) ** 0.5)
    assert learning_rate(open_rate, loud, 1) == planned_rate(open_rate, loud)
    assert planned_rate(config.Server(learning_rate=0.5), loud) == 0.5
    assert planned_rate(config.Server(optimizer="fedavgm"), loud) == 0.02
    assert planned_rate(open_rate, planned(epsilon=None, non_private=("stage1", "round"))) == 0.02
    assert "because" in step_words(open_rate, loud)
    assert "because" not in step_words(open_rate, quiet) + step_words(config.Server(learning_rate=0.001), loud)
