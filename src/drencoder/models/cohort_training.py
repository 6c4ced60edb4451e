"""What clients compute together: from the shared adapter and each one's own examples to one update vector each.

Legend: K clients trained together, D adapter values. An update is a *descent direction*: the server adds it.

What a client sends must be a function of the adapter, the seeds and its own records, bit for bit (docs/guarantee.md). So only
batches of the same shape share a pass, the shape follows from a client's own examples, its dropout masks come from a generator of its
own, and every product is its own (`LoraModel.stacked`). Adapters and optimiser slots are per client, and the base is frozen and in
eval mode. Where a library chooses how to add up by the number of clients (a graphics card), passes are always full: empty clients
stand where there are too few (`LoraModel.fixed_slots`), and a shape is tried before clients share it (`_keeps_apart`).
"""

import contextlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from drencoder.data.tokenization import Example, collate
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

Steps = list[list[Example]]

# Values of all adapters of clients that go through their steps together: an optimiser has four of each.
_MOST_VALUES = 1 << 26
_THREADS = 2  # of passes that clients may share


@dataclass(frozen=True)
class _Piece:
    """A part of one client's batch: examples of about the same length, which are padded to `length`."""

    client: int
    examples: list[Example]
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, padded length)."""
        return len(self.examples), self.length


@dataclass(frozen=True)
class Pass:
    """What is computed at once: pieces of one shape, each at its client's adapter (K, D), beside `empty` clients that have no text.

    A client's loss is divided by its value of `total_K`, and its dropout is drawn from its own generator.
    """

    pieces: Sequence[_Piece]
    adapter_KD: Tensor
    total_K: Tensor
    generators: Sequence[torch.Generator]
    empty: int = 0


def _schedule(examples: Sequence[Example], local: config.Local, seed: int) -> Steps:
    """The batches a client steps by: shuffled epochs; of a gradient, which is a sum over all examples, one of all."""
    if local.upload == "gradient":
        return [list(examples)] if examples else []
    steps: Steps = []
    order, shuffler = list(examples), random.Random(seed)
    for _ in range(local.epochs):
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
    size = lora.layout.size
    update_KD = torch.zeros(len(clients), size, device=lora.device)
    if local.upload == "zero":
        return update_KD
    start_KD = adapter.to(lora.device).expand(len(clients), size)
    schedules = [_schedule(examples, local, seed) for examples, seed in zip(clients, seeds, strict=True)]
    by_steps = sorted(range(len(clients)), key=lambda client: len(schedules[client]))
    for steps, alike in groupby(by_steps, key=lambda client: len(schedules[client])):
        clients_of, fit = list(alike) if steps else [], max(1, _MOST_VALUES // size)
        for members in (clients_of[start : start + fit] for start in range(0, len(clients_of), fit)):
            places = torch.tensor(members, device=lora.device)
            chosen = [schedules[client] for client in members]
            update_KD[places] = _train(lora, start_KD[places], chosen, local, [seeds[client] for client in members])
    return update_KD


def _train(
    lora: LoraModel, start_KD: Tensor, schedules: Sequence[Steps], local: config.Local, seeds: Sequence[int]
) -> Tensor:
    """Updates (K, D) of clients that have the same number of steps, one or more."""
    generators = [_generator(lora, derive_seed(seed, "dropout")) for seed in seeds]

    def gradients(position_KD: Tensor, rows_of: Sequence[list[Example]]) -> Tensor:
        totals = [sum(example.targets for example in rows) for rows in rows_of]
        pieces = [piece for k, rows in enumerate(rows_of) for piece in _cut(lora, k, rows, local.batch_size)]
        # Others have no gradient.
        pieces = [piece for piece in pieces if any(example.targets for example in piece.examples)]
        return _gradients(lora, position_KD, pieces, totals, generators)

    if local.upload == "gradient":
        return gradients(start_KD, [steps[0] for steps in schedules]).neg_()
    position_KD = start_KD.clone().requires_grad_()
    optimizer = _optimizer(local, [position_KD])
    for rows_of in zip(*schedules, strict=True):
        position_KD.grad = gradients(position_KD.detach(), rows_of)
        optimizer.step()
    return _as_update(local, start_KD, position_KD.detach(), len(schedules[0]))


def _generator(lora: LoraModel, seed: int) -> torch.Generator:
    """Of a client's dropout. Where there is none, a generator on the CPU stands for it and draws nothing."""
    return torch.Generator(lora.device if lora.dropout else "cpu").manual_seed(seed)


def _cut(lora: LoraModel, client: int, rows: Sequence[Example], batch_size: int) -> Iterator[_Piece]:
    """Cuts a batch into pieces of about the same length, where that spares more padding than another pass costs.

    A piece of more than `batch_size` rows has no more tokens than keep a core busy. All follows from the client's own examples, the
    model and the recipe.
    """
    by_length = sorted(rows, key=lambda example: len(example.tokens))
    piece: list[Example] = []
    for example, following in zip(by_length, [*by_length[1:], None], strict=True):
        piece.append(example)
        length = len(example.tokens)
        longer = len(following.tokens) if following else length
        full = len(piece) >= batch_size and (len(piece) + 1) * longer > lora.size.busy_tokens
        if following is None or full or (longer - length) * len(piece) >= lora.pass_tokens:
            yield _Piece(client, piece, lora.padded_length(len(piece), length))
            piece = []


def _gradients(
    lora: LoraModel,
    adapter_KD: Tensor,
    pieces: Sequence[_Piece],
    totals: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Gradients (K, D) of the clients' losses over their pieces, each divided by `totals`, at each one's adapter.

    A client's pieces are added up in the order of their shapes. Two of the same shape go into two passes.
    """
    gradient_KD = torch.zeros_like(adapter_KD)
    total_K = torch.tensor([max(1, total) for total in totals], device=adapter_KD.device)
    rank: dict[tuple[int, tuple[int, int]], int] = {}
    groups: dict[tuple[int, int, int], list[_Piece]] = {}
    for piece in pieces:
        nth = rank[piece.client, piece.shape] = rank.get((piece.client, piece.shape), -1) + 1
        groups.setdefault((*piece.shape, nth), []).append(piece)

    def places_of(share: Sequence[_Piece]) -> Tensor:
        return torch.tensor([piece.client for piece in share], device=adapter_KD.device)

    def make_pass(share: Sequence[_Piece]) -> Pass:
        places = places_of(share)
        own = [generators[piece.client] for piece in share]
        empty = _slots(lora, *share[0].shape) - len(share) if lora.fixed_slots else 0
        return Pass(share, adapter_KD[places], total_K[places], own, empty)

    shares = []
    for (count, length, _), alike in sorted(groups.items()):
        slots = _slots(lora, count, length)
        shares += [alike[start : start + slots] for start in range(0, len(alike), slots)]
    for together in _in_turn(shares, lora.ranks, drawing=bool(lora.dropout)):
        for share, part_KD in zip(together, _computed(lora, [make_pass(share) for share in together]), strict=True):
            gradient_KD[places_of(share)] += part_KD
    return gradient_KD


def _in_turn(shares: Iterable[list[_Piece]], ranks: int, *, drawing: bool) -> Iterator[list[list[_Piece]]]:
    """Up to `ranks` shares at a time, the first first; every client's own stay in their order, in which they are added up.

    Where clients are `drawing` dropout masks, what is computed at once has no client twice: the second begins with the generator as
    the first left it.
    """
    waiting = deque(shares)
    while waiting:
        chosen: list[list[_Piece]] = []
        left: list[list[_Piece]] = []
        seen: set[int] = set()
        while waiting and len(chosen) < ranks:
            share = waiting.popleft()
            clients = {piece.client for piece in share}
            (left if drawing and seen & clients else chosen).append(share)
            seen |= clients
        yield chosen
        waiting.extendleft(reversed(left))


def _computed(lora: LoraModel, passes: Sequence[Pass]) -> Sequence[Tensor]:
    """The passes' gradients, (K, D) each: one after the other, or at once on a model whose layers are split over several ranks."""
    return [compute_pass(lora, one) for one in passes] if lora.compute is None else lora.compute(passes)


@contextlib.contextmanager
def _two_threads(shared: bool) -> Iterator[None]:
    """At most two threads, where clients may share a pass, or alone would be in one.

    Each thread takes a part of a tensor's values, and some functions are rounded otherwise at the end of a part. Halves end where
    a client's values fill whole steps (`LoraModel.can_share`); thirds end anywhere, and where would depend on the company.
    """
    threads = torch.get_num_threads()
    limited = shared and threads > _THREADS
    if limited:
        torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        if limited:
            torch.set_num_threads(threads)


def _slots(lora: LoraModel, count: int, length: int) -> int:
    """How many clients with `count` rows of `length` tokens share a pass: at most `lora.batch_tokens` tokens, but at least one."""
    fit = max(1, lora.batch_tokens // (count * length)) if lora.can_share(count * length) else 1
    fit = min(fit, lora.most_slots)
    if fit > 1 and lora.fixed_slots:
        shape = (fit, count, length)
        if shape not in lora.tried_shapes:
            lora.tried_shapes[shape] = _keeps_apart(lora, *shape)
        return fit if lora.tried_shapes[shape] else 1
    return fit


def compute_pass(lora: LoraModel, one: Pass) -> Tensor:
    """Gradients (K, D) of a pass, its empty clients left out."""
    pieces, generators, adapter_KD, total_K = one.pieces, one.generators, one.adapter_KD, one.total_K
    count, length = pieces[0].shape
    if one.empty:
        blank = [Example((lora.base.pad_id,), 1)] * count
        pieces = [*pieces, *[_Piece(-1, blank, length)] * one.empty]
        generators = [*generators, *(_generator(lora, 0) for _ in range(one.empty))]
        adapter_KD = torch.cat([adapter_KD, adapter_KD.new_zeros(one.empty, adapter_KD.shape[1])])
        total_K = torch.cat([total_K, total_K.new_ones(one.empty)])
    stack = {
        name: tensor.clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, tensor in lora.layout.unflatten(adapter_KD).items()
    }
    batch = collate([piece.examples for piece in pieces], lora.base.pad_id, length)
    frugal = batch.input_ids.numel() > lora.fit_tokens
    with (
        _two_threads(lora.can_share(count * length)),
        lora.stacked(stack, isolated=True, generators=generators, frugal=frugal),
    ):
        (lora.client_losses(batch, len(pieces)) / total_K).sum().backward()
    gradient_KD = lora.layout.flatten({name: _grad(tensor) for name, tensor in stack.items()})
    return gradient_KD[: len(pieces) - one.empty]


def blank_pass(lora: LoraModel) -> Pass:
    """One client with two blank tokens, of which one is predicted: for a rank that has no other pass to compute beside the others."""
    piece = _Piece(0, [Example((lora.base.pad_id, lora.base.pad_id), 1)], 2)
    one = torch.ones(1, device=lora.device)
    return Pass([piece], one.new_zeros(1, lora.layout.size), one, [_generator(lora, 0)])


def _keeps_apart(lora: LoraModel, slots: int, count: int, length: int) -> bool:
    """Whether a client's gradient has the same bits in the first and in the last of `slots`, beside other clients, beside none.

    Tried with text and adapters at random, in the very shapes of the run. On a device whose library's way of adding up is
    nobody's promise this is what tells whether clients may share a pass.
    """
    draw = random.Random(0)
    vocabulary = lora.base.vocabulary

    def texts() -> _Piece:
        return _Piece(
            0, [Example(tuple(draw.randrange(vocabulary) for _ in range(length)), 1) for _ in range(count)], length
        )

    generator = torch.Generator().manual_seed(0)
    scale = float(lora.initial_D.std())
    adapter_KD = (scale * torch.randn(2, lora.layout.size, generator=generator)).to(lora.device)
    own, others = texts(), [texts() for _ in range(slots - 1)]
    seen = []
    for company, place in (([], 0), (others, 0), (others, slots - 1)):
        pieces: list[_Piece] = [*company]
        pieces.insert(place, own)
        adapters = adapter_KD[torch.tensor([int(piece is own) for piece in pieces], device=lora.device)]
        total_K = torch.ones(len(pieces), device=lora.device)
        generators = [_generator(lora, int(piece is own)) for piece in pieces]
        tried = Pass(pieces, adapters, total_K, generators, slots - len(pieces))
        seen.append(_computed(lora, [tried])[0][place])
    return all(torch.equal(seen[0], other) for other in seen[1:])


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
