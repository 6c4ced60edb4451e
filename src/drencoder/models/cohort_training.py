"""What a client computes: from the shared adapter and its own examples to one update vector.

Legend: K clients trained together, D adapter values. Two paths give the same updates to float tolerance
(tests/test_training.py): `cohort_updates`, all K clients in one batch, and `client_update`, one client
through PEFT's own forward. An update is a *descent direction*: the server adds it.

Nothing of one client reaches another: stacked adapters and optimiser slots are per client, the base is
frozen and in eval mode, and the batch dimension is never mixed.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.data.tokenization import Example, collate
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

__all__ = ["adapter_after", "client_update", "cohort_updates", "num_steps"]

Steps = list[list[Example]]


def _schedule(examples: Sequence[Example], local: config.Local, seed: int) -> Steps:
    """The batches a client goes through: in order and once for a gradient, shuffled epochs otherwise."""
    steps: Steps = []
    order = list(examples)
    shuffler = random.Random(seed)
    for _ in range(1 if local.upload == "gradient" else local.epochs):
        if local.upload != "gradient":
            shuffler.shuffle(order)
        steps += [order[start : start + local.batch_size] for start in range(0, len(order), local.batch_size)]
    return steps


def _optimizer(local: config.Local, tensors: list[Tensor]) -> torch.optim.Optimizer:
    if local.upload == "pseudo-gradient":
        return torch.optim.SGD(tensors, lr=local.learning_rate)
    return torch.optim.AdamW(tensors, lr=local.learning_rate, weight_decay=0.0)


def num_steps(examples: Sequence[Example], local: config.Local) -> int:
    """Optimiser steps of one call of `client_update` (the batches of one gradient)."""
    batches = -(-len(examples) // local.batch_size)
    return batches if local.upload == "gradient" else batches * local.epochs


def adapter_after(local: config.Local, start: Tensor, update_KD: Tensor, steps_K1: Tensor) -> Tensor:
    """Where clients stand (K, D) after the training that gave `update_KD`, from a shared (D,) or an own (K, D) start.

    The inverse of what an update is: stage 1 goes on from here when it takes several epochs. A gradient has no
    path of its own, so it is followed for one step of `local.learning_rate`.
    """
    match local.upload:
        case "increment":
            return start + update_KD
        case "pseudo-gradient":
            return start + local.learning_rate * steps_K1 * update_KD
        case _:
            return start + local.learning_rate * update_KD


def _as_update(local: config.Local, start: Tensor, end: Tensor, steps: Tensor) -> Tensor:
    """Turns the trained adapter (..., D) into what is uploaded; `steps` is (..., 1)."""
    if local.upload == "increment":
        return end - start
    return (end - start) / (local.learning_rate * steps)


def cohort_updates(
    lora: LoraModel,
    adapter: Tensor,
    clients: Sequence[Sequence[Example]],
    local: config.Local,
    seeds: Sequence[int],
) -> Tensor:
    """Updates (K, D), float32, of K clients that train at the same time, from a shared (D,) or an own (K, D) adapter.

    Clients may differ in their number of examples; one that has finished stands still while the others
    go on. `seeds` shuffles each client's examples.
    """
    if local.upload == "zero":
        return torch.zeros(len(clients), lora.layout.size, device=lora.device)
    schedules = [_schedule(examples, local, seed) for examples, seed in zip(clients, seeds, strict=True)]
    steps_K1 = torch.tensor([[len(steps)] for steps in schedules], device=lora.device)
    start_KD = adapter.to(lora.device).expand(len(clients), lora.layout.size)
    stack = {name: tensor.clone().requires_grad_() for name, tensor in lora.layout.unflatten(start_KD).items()}
    generator = None
    if lora.dropout and seeds:
        generator = torch.Generator(lora.device).manual_seed(derive_seed(seeds[0], "dropout", *seeds))
    if local.upload == "gradient":
        totals = torch.tensor([sum(example.targets for example in row) for row in clients], device=lora.device)
        with lora.stacked(stack, generator):
            for rows in _by_step(schedules):
                (_client_losses(lora, rows) / totals).sum().backward()
        return -lora.layout.flatten({name: _grad(tensor) for name, tensor in stack.items()})

    optimizer = _optimizer(local, list(stack.values()))
    for index, rows in enumerate(_by_step(schedules)):
        counts = torch.tensor([max(1, sum(e.targets for e in row)) for row in rows], device=lora.device)
        optimizer.zero_grad()
        with lora.stacked(stack, generator):
            (_client_losses(lora, rows) / counts).sum().backward()
        active = index < steps_K1[:, 0]
        before = [tensor.detach().clone() for tensor in stack.values()]
        optimizer.step()
        with torch.no_grad():  # AdamW's momentum would still move a client that has finished
            for tensor, old in zip(stack.values(), before, strict=True):
                tensor[~active] = old[~active]
    end_KD = lora.layout.flatten({name: tensor.detach() for name, tensor in stack.items()})
    return _as_update(local, start_KD, end_KD, steps_K1)


def _by_step(schedules: Sequence[Steps]) -> list[list[list[Example]]]:
    """Step s of every client, side by side; clients that have finished bring an empty row."""
    length = max((len(steps) for steps in schedules), default=0)
    return [[steps[s] if s < len(steps) else [] for steps in schedules] for s in range(length)]


def _client_losses(lora: LoraModel, rows: Sequence[Sequence[Example]]) -> Tensor:
    """Summed token losses of each client, (K,)."""
    batch = collate(rows, lora.base.pad_id).to(lora.device)
    losses_M = lora.token_losses(batch)
    width = batch.input_ids.shape[0] // len(rows)
    owner_M = batch.predicted.nonzero()[:, 0] // width
    return torch.zeros(len(rows), device=losses_M.device).index_add(0, owner_M, losses_M)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def client_update(
    lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example], local: config.Local, seed: int
) -> Tensor:
    """Update (D,), float32, of one client through PEFT's own forward: the reference for `cohort_updates`."""
    if local.upload == "zero":
        return torch.zeros(lora.layout.size, device=lora.device)
    steps = _schedule(examples, local, seed)
    with torch.random.fork_rng(devices=[lora.device] if lora.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "dropout"))  # PEFT's dropout knows no generator of its own
        return _train_through_peft(lora, adapter_D, examples, steps, local)


def _train_through_peft(
    lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example], steps: Steps, local: config.Local
) -> Tensor:
    adapter_D = adapter_D.to(lora.device)
    with lora.peft(adapter_D) as model:
        parameters = lora.peft_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        if local.upload == "gradient":
            total = sum(example.targets for example in examples)
            for batch in steps:
                (_summed_loss(model, batch, lora) / total).backward()
            return -lora.layout.flatten({name: _grad(parameter) for name, parameter in parameters.items()})
        optimizer = _optimizer(local, list(parameters.values()))
        for batch in steps:
            optimizer.zero_grad()
            (_summed_loss(model, batch, lora) / sum(example.targets for example in batch)).backward()
            optimizer.step()
        end_D = lora.layout.flatten({name: parameter.detach() for name, parameter in parameters.items()})
    return _as_update(local, adapter_D, end_D, torch.tensor([len(steps)], device=end_D.device))


def _summed_loss(model: torch.nn.Module, examples: Sequence[Example], lora: LoraModel) -> Tensor:
    batch = collate([examples], lora.base.pad_id).to(lora.device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
    labels = batch.input_ids.masked_fill(~batch.predicted, -100)[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
