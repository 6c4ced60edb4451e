"""The ways that take turns: each computes a `Task`'s round, (D,) float32, as often as it is asked.

`serve` calls `loop(round)` once everything is loaded; where that is, is up to the way (Flower's server is an app of its own).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from speed_parts.task import CLIP_L2, Task, clipped, padded, peft_model, trainable

Round: TypeAlias = Callable[[], Tensor]
Loop: TypeAlias = Callable[[Round], None]


def ours(task: Task, path: str, loop: Loop) -> None:
    """drencoder's clients of one process, as a run trains and clips them; their text is tokens already, as in the other ways."""
    from drencoder.data.tokenization import Example
    from drencoder.privacy.mechanism import clip_rows
    from drencoder.recipe.recipe import load_recipe
    from drencoder.runs.build import build

    components = build(load_recipe("quickstart", task.recipe))
    examples = [[Example(tuple(tokens), prompt) for tokens, prompt in client] for client in task.clients]
    trainer, start_D = (
        replace(components.trainer, examples_of=lambda client, _: examples[client]),
        components.lora.initial_D,
    )

    def run_round() -> Tensor:
        total_D = torch.zeros(task.values)
        for first in range(0, len(task.clients), trainer.batch_clients):
            batch = range(first, min(len(task.clients), first + trainer.batch_clients))
            total_D += clip_rows(trainer.train_clients(start_D, batch, 1, 1), CLIP_L2).values_NV.sum(0)
        return total_D / len(task.clients)

    loop(run_round)


def plain_peft(task: Task, path: str, loop: Loop) -> None:
    """`get_peft_model` and `loss.backward()`, one client after the other."""
    model = peft_model(task)
    batches = [padded(task, client) for client in range(len(task.clients))]
    parameters = trainable(model)

    def run_round() -> Tensor:
        total_D = torch.zeros(task.values)
        for input_ids, labels in batches:
            model.zero_grad()
            model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
            total_D += clipped(-task.flat({name: p.grad for name, p in parameters.items()}))
        return total_D / len(batches)

    loop(run_round)


def flower(task: Task, path: str, loop: Loop, *, keeps_model: bool = False) -> None:
    """Flower's simulation with one actor on one core and a client in the manner of FlowerTune."""
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from speed_parts.flower_client import make_client_app

    server, clients = ServerApp(), len(task.clients)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start_D = task.flat(task.initial)

        def run_round() -> Tensor:
            content = RecordDict({"arrays": ArrayRecord(task.initial)})
            nodes = list(grid.get_node_ids())
            messages = [Message(content, node, "train") for node in nodes]
            total_D, answered = torch.zeros(task.values), 0
            for reply in grid.send_and_receive(messages):
                total_D += clipped(task.flat(reply.content["arrays"].to_torch_state_dict()) - start_D)
                answered += 1
            assert answered == clients, f"{answered} of {clients} nodes answered"
            return total_D / clients

        loop(run_round)

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1, "include_dashboard": False}}
    run_simulation(server, make_client_app(path, keeps_model=keeps_model), clients, backend_config=resources)


def pfl(task: Task, path: str, loop: Loop) -> None:
    """Apple's pfl: its backend for simulations, federated averaging and clipping."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.common_types import Population
    from pfl.context import CentralContext
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism, NormClippingOnly

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = peft_model(task)

        def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids, labels=labels, use_cache=False).loss

        def metrics(self, input_ids: Tensor, labels: Tensor) -> dict[str, float]:
            return {}

    count = len(task.clients)
    data = {client: list(padded(task, client)) for client in range(count)}
    users = FederatedDataset(
        lambda user: Dataset(data[user], user_id=str(user)), MinimizeReuseUserSampler(range(count))
    )
    module = Model()
    adapter = [parameter for parameter in module.parameters() if parameter.requires_grad]
    model = PyTorchModel(
        module, lambda _, lr: torch.optim.SGD(adapter, lr=lr), central_optimizer=torch.optim.SGD(adapter, lr=1.0)
    )
    clip = CentrallyAppliedPrivacyMechanism(NormClippingOnly(2, CLIP_L2))
    backend, algorithm = SimulatedBackend(users, users, postprocessors=[clip]), FederatedAveraging()
    parameters = NNAlgorithmParams(
        central_num_iterations=1, evaluation_frequency=0, train_cohort_size=count, val_cohort_size=0
    )
    names = {
        name: key
        for key, name in ((key.removeprefix("inner.").replace(".default", ""), key) for key in model.variable_map)
    }

    def run_round() -> Tensor:
        context = CentralContext(
            current_central_iteration=0, do_evaluation=False, cohort_size=count, population=Population.TRAIN,
            algorithm_params=parameters, model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
        )  # fmt: skip
        total, _ = backend.gather_results(model, algorithm, central_context=context)
        return task.flat({key: total[name] for name, key in names.items()}) / count

    loop(run_round)


WAYS: dict[str, Callable[[Task, str, Loop], None]] = {
    "plain PEFT": plain_peft,
    "drencoder": ours,
    "pfl": pfl,
    "Flower, FlowerTune's client": flower,
    "Flower, model kept": partial(flower, keeps_model=True),
}
