"""What clients compute together: from the shared adapter and each one's own examples to one update vector each.

Legend: K clients trained together, D adapter values. An update is a *descent direction*: the server adds it.

What a client sends must be a function of the adapter, the seeds and its own records, bit for bit (docs/guarantee.md). So
only clients whose batches have the same shape share a batch, the shape follows from a client's own examples, its dropout masks
come from a generator of its own, and every product is its own (`LoraModel.stacked`). Adapters and optimiser slots are per
client, and the base is frozen and in eval mode.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drencoder.data.tokenization import Example, collate
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

__all__ = ["adapter_after", "cohort_updates", "num_steps"]

Steps = list[list[Example]]

_LENGTH_STEP = 8


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
    """Optimiser steps of one client's training (the batches of one gradient)."""
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


def _as_update(local: config.Local, start_KD: Tensor, end_KD: Tensor, steps: int) -> Tensor:
    """Turns trained adapters into what is uploaded."""
    if local.upload == "increment":
        return end_KD - start_KD
    return (end_KD - start_KD) / (local.learning_rate * max(1, steps))


def cohort_updates(
    lora: LoraModel,
    adapter: Tensor,
    clients: Sequence[Sequence[Example]],
    local: config.Local,
    seeds: Sequence[int],
) -> Tensor:
    """Updates (K, D), float32, of K clients that train at the same time, from a shared (D,) or an own (K, D) adapter.

    Clients may differ in number and length of examples. `seeds` has one for each client: of its examples' order and its
    dropout. Row i does not depend on the other clients, bit for bit.
    """
    update_KD = torch.zeros(len(clients), lora.layout.size, device=lora.device)
    if local.upload == "zero":
        return update_KD
    start_KD = adapter.to(lora.device).expand(len(clients), lora.layout.size)
    schedules = [_schedule(examples, local, seed) for examples, seed in zip(clients, seeds, strict=True)]
    for length, members in _batches(lora, schedules):
        places = torch.tensor(members, device=lora.device)
        trained = _train_alike(
            lora, start_KD[places], [schedules[i] for i in members], length, local, [seeds[i] for i in members]
        )
        update_KD[places] = trained
    return update_KD


def _batches(lora: LoraModel, schedules: Sequence[Steps]) -> Iterator[tuple[int, list[int]]]:
    """Yields (padded length, the clients that train together): some whose batches have the same shape, or each alone.

    Together they have at most `lora.batch_tokens` tokens in a step, but one client always trains as a whole. A length is rounded up
    to a multiple of 8, so that there are few shapes, but not beyond the model's positions. It is a function of the client's own
    examples.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for client, steps in enumerate(schedules):
        longest = max((len(example.tokens) for step in steps for example in step), default=1)
        rounded = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        length = max(longest, min(rounded, lora.base.positions or rounded))
        groups.setdefault((*map(len, steps), length), []).append(client)
    for (*rows, length), members in groups.items():
        share = all(lora.can_share(count * length) for count in rows)
        fit = max(1, lora.batch_tokens // (max(rows, default=1) * length)) if share else 1
        for start in range(0, len(members), fit):
            yield length, members[start : start + fit]


def _train_alike(
    lora: LoraModel,
    start_KD: Tensor,
    schedules: Sequence[Steps],
    length: int,
    local: config.Local,
    seeds: Sequence[int],
) -> Tensor:
    """Updates (K, D) of clients that have the same number of examples in each step; texts are padded to `length`."""
    count = len(schedules)
    stack = {name: tensor.clone().requires_grad_() for name, tensor in lora.layout.unflatten(start_KD).items()}
    generators = [torch.Generator(lora.device).manual_seed(derive_seed(seed, "dropout")) for seed in seeds]
    batches = [list(step) for step in zip(*schedules, strict=True)]
    optimizer = None if local.upload == "gradient" else _optimizer(local, list(stack.values()))
    total_K = _targets(lora, [[example for step in steps for example in step] for steps in schedules])
    for rows in batches:
        batch = collate(rows, lora.base.pad_id, length).to(lora.device)
        if optimizer is not None:
            optimizer.zero_grad()
        frugal = batch.input_ids.numel() > lora.fit_tokens
        with lora.stacked(stack, isolated=True, generators=generators, frugal=frugal):
            loss_K = lora.client_losses(batch, count)
            (loss_K / (total_K if optimizer is None else _targets(lora, rows))).sum().backward()
        if optimizer is not None:
            optimizer.step()
    if optimizer is None:
        return -lora.layout.flatten({name: _grad(tensor) for name, tensor in stack.items()})
    end_KD = lora.layout.flatten({name: tensor.detach() for name, tensor in stack.items()})
    return _as_update(local, start_KD, end_KD, len(batches))


def _targets(lora: LoraModel, rows: Sequence[Sequence[Example]]) -> Tensor:
    """Predicted tokens of each client, (K,), at least 1."""
    return torch.tensor([max(1, sum(example.targets for example in row)) for row in rows], device=lora.device)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
