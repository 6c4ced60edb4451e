"""Ways to clip every record by itself, and one that does not: each takes a `Task` whose clients have one record each, as one batch.

All but the last two give the mean of the clipped records' updates, (D,) float32.
"""

import torch
from torch import Tensor
from torch.nn import functional

from speed_parts.task import CLIP_L2, Task, as_batch, peft_model, trainable
from speed_parts.ways import Loop


def _one_batch(task: Task) -> tuple[Tensor, Tensor]:
    """The record of every client, as one batch."""
    return as_batch(task, [client[0] for client in task.clients])


def _summed_loss(model: torch.nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The sum over records of each one's mean loss."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    target = labels[:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (target != -100).sum(1)).sum()


def opacus(task: Task, path: str, loop: Loop) -> None:
    """Opacus: `GradSampleModule` on PEFT's model, and what `DPOptimizer` does before it adds noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = peft_model(task)
    parameters = trainable(model)
    module = GradSampleModule(model, strict=False, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_L2,
        expected_batch_size=len(task.clients),
        loss_reduction="sum",
    )
    input_ids, labels = _one_batch(task)

    def run_round() -> Tensor:
        optimizer.zero_grad()
        _summed_loss(module, input_ids, labels).backward()
        optimizer.clip_and_accumulate()
        return -task.flat({name: p.summed_grad for name, p in parameters.items()}) / len(task.clients)

    loop(run_round)


def one_batch_without_privacy(task: Task, path: str, loop: Loop) -> None:
    """PEFT's model and one `backward`: what a step costs if no record is clipped."""
    model = peft_model(task)
    parameters = trainable(model)
    input_ids, labels = _one_batch(task)

    def run_round() -> Tensor:
        model.zero_grad()
        _summed_loss(model, input_ids, labels).backward()
        return -task.flat({name: p.grad for name, p in parameters.items()}) / len(task.clients)

    loop(run_round)


def encoded(task: Task, path: str, loop: Loop) -> None:
    """drencoder with a code of 1/64: each record's update is encoded, its code clipped and added up; the sum is decoded."""
    from drencoder.federated.query import update_query
    from drencoder.privacy.mechanism import clip_rows
    from drencoder.recipe.recipe import load_recipe
    from drencoder.runs.build import build

    components = build(load_recipe("quickstart", [*task.recipe, "encoder.ratio=64", "encoder.gate=warn"]))
    trainer, start_D = components.trainer, components.lora.initial_D
    query = update_query(components.encoder(None), components.recipe, 1, clip_l2=CLIP_L2)

    def run_round() -> Tensor:
        total_K = torch.zeros(query.spec.wire.code_size)
        for first in range(0, len(task.clients), trainer.batch_clients):
            batch = range(first, min(len(task.clients), first + trainer.batch_clients))
            codes = clip_rows(query.encode(trainer.train_clients(start_D, batch, 1, 1)), CLIP_L2)
            total_K += codes.values_NV.sum(0)
        return query.decode(total_K[None])[0] / len(task.clients)

    loop(run_round)


RECORD_WAYS = {
    "Opacus": opacus,
    "drencoder, code of 1/64": encoded,
    "PEFT, one batch, nothing clipped": one_batch_without_privacy,
}
UNLIKE = ("drencoder, code of 1/64", "PEFT, one batch, nothing clipped")
"""Ways that compute something else than the mean of clipped updates."""
