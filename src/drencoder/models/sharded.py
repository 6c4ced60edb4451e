"""A base model whose decoder layers are split over all graphics cards of a machine, which train clients at the same time.

torch's FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) keeps a part of every layer on each card and
gathers a layer's weights where they are computed with, and again in the backward pass. One process a card is a rank. The user's own
process is rank 0 and does all that it does without: the others compute passes of clients (`cohort_training.compute_pass`), at adapters that
they are sent, and know nothing of noise, budget or ledger. On a machine without a card two processes share the CPU, which is for tests.

All ranks must gather the same layers in the same order (`_Gathers`), or they would wait for each other for ever. So a rank without a
pass computes a blank one, the other ranks run a blank text beside whatever else rank 0 computes, and a rank whose pass failed gathers on
to its end. Clients' text and adapters travel over pipes; the ranks exchange weights alone, over the loopback or the cards' own links.
"""

import contextlib
import datetime
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from drencoder.errors import DeviceError, DrencoderError, ModelError
from drencoder.models.base_model import BaseModel, load_base
from drencoder.models.cohort_training import Pass, blank_pass, compute_pass
from drencoder.models.loaded_size import check_memory
from drencoder.models.lora import LoraModel
from drencoder.models.recomputation import decoder_layers
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe

_CPU_RANKS = 2
_PATIENCE = datetime.timedelta(days=1)  # a rank may wait for another's pass; that one ended is seen at once (`_Gathers`, `_watch`)
_ENDED = (
    "a process that held a part of the model ended (perhaps the machine had too little memory), so training cannot go on here: start "
    "again, a run with drencoder run --resume FOLDER."
)


def open_lora(base: BaseModel, recipe: Recipe, max_tokens: int = 0) -> LoraModel:
    """The base model with the recipe's adapter; with `model.device = "shard"` its layers are split over several ranks first.

    Args:
      base: from `load_base`; its layers are split in place.
      max_tokens: as `load_base` was told.

    Raises:
      ModelError: a target names no layer that can have an adapter, or the model cannot be split.
      DeviceError: the other ranks cannot be started.
    """
    job = _Job(recipe.model, max_tokens, recipe.adapter, recipe.seed, recipe.speed.tokens, torch.get_num_threads())
    return job.open(base) if recipe.model.device != "shard" else _Ranks(base, job, recipe.speed.parallel_clients).lora


@dataclass(frozen=True)
class _Job:
    """What a rank is told. It is public, and the same for all ranks."""

    model: config.Model
    max_tokens: int
    adapter: config.Adapter
    seed: int  # of the adapter's start
    tokens: int
    threads: int

    def open(self, base: BaseModel) -> LoraModel:
        return LoraModel(base, self.adapter, seed=self.seed, batch_tokens=self.tokens)


class _Gathers:
    """One rank's parts of the layers, and the order in which it gathers them, which is the same on all ranks.

    The first blank text and the first blank pass show the order; every later one follows it.
    """

    def __init__(self, base: BaseModel, rank: int, ranks: int, folder: Path) -> None:
        """Joins the other ranks, and splits the layers of a model in main memory; the rest of it is on every card."""
        from torch.distributed.fsdp import fully_shard, share_comm_ctx

        card = torch.device("cuda", rank) if torch.cuda.is_available() else None
        self._base, self._layers = base, decoder_layers(base.model)
        self._order: list[int] | None = None
        self._done: list[int] = []
        if card is not None:
            torch.cuda.set_device(card)
            split = {id(parameter): parameter for layer in self._layers for parameter in layer.parameters()}
            whole = [parameter for parameter in base.model.parameters() if id(parameter) not in split]
            check_memory(sum(p.nbytes for p in whole) + sum(p.nbytes for p in split.values()) // ranks, card)
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        with _environment(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback):
            distributed.init_process_group(
                "gloo" if card is None else "nccl", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks, timeout=_PATIENCE,
                device_id=card,
            )  # fmt: skip
            mesh = distributed.init_device_mesh("cpu" if card is None else "cuda", (ranks,))
        for index, layer in enumerate(self._layers):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            layer.set_custom_all_gather(_Gather(index, self))
        share_comm_ctx(self._layers)
        if card is not None:
            base.model.to(card)

    def learn_text(self) -> None:
        """Runs the first blank text. Not in inference mode: what is first gathered there could never be trained with."""
        self.run_text()
        self.of_text = [*self._done]

    def learn_pass(self, lora: LoraModel) -> None:
        self.begin(None)
        compute_pass(lora, blank_pass(lora))
        self.of_pass = [*self._done]

    def run_text(self) -> None:
        with torch.no_grad():
            self._base.model(input_ids=torch.full((1, 2), self._base.pad_id, device=self._base.device), use_cache=False)

    def begin(self, order: list[int] | None) -> None:
        """Before anything is computed. What came before gathers on to its end, where it failed."""
        self.finish()
        self._reset()
        self._order, self._done = order, []

    def finish(self) -> None:
        """Gathers what an order has left: the other ranks wait for this one's parts."""
        left = [] if self._order is None else self._order[len(self._done) :]
        if left:
            self._reset()
        for index in left:
            self._layers[index].unshard()
            self._layers[index].reshard()

    def _reset(self) -> None:
        """Lets go of what a text or a pass, failed or not, has left in the layers."""
        for layer in self._layers:
            layer.reset_iter_state()

    def gather(self, index: int, output: Tensor, own: Tensor, group: Any, *, later: bool) -> Any:
        """One layer's weights, from all ranks.

        Raises:
          DeviceError: another rank ended, or the layer is not the next.
        """
        if self._order is not None and self._order[len(self._done) : len(self._done) + 1] != [index]:
            raise DeviceError("the base model was asked for a gradient in a way that cannot work with model.device = 'shard'.")
        self._done.append(index)
        try:
            return distributed.all_gather_single(output, own, group=group, async_op=later)
        except RuntimeError:
            raise DeviceError(_ENDED) from None


class _Gather:
    """What FSDP2 calls to gather one layer."""

    def __init__(self, index: int, gathers: _Gathers) -> None:
        self._index, self._gathers = index, gathers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self._gathers.gather(self._index, output_tensor, input_tensor, group, later=async_op)


class _Ranks:
    """Rank 0, and the processes of the others."""

    def __init__(self, base: BaseModel, job: _Job, parallel_clients: int) -> None:
        if not decoder_layers(base.model):
            raise ModelError(
                f"model.device = 'shard' splits decoder layers, and {base.source} has none that transformers marks as such: set "
                "model.device = 'spread'."
            )
        gc.collect()  # a model of an earlier run
        if distributed.is_initialized():
            raise DeviceError("model.device = 'shard' can split one model in a process, and this process has split one already.")
        if base.hub_id:  # what rank 0 has loaded, whatever the branch says by now
            job = replace(job, model=replace(job.model, revision=base.revision))
        ranks = torch.cuda.device_count() or _CPU_RANKS
        folder = Path(tempfile.mkdtemp(prefix="drencoder-ranks-"))
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(1, ranks)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, ranks, folder, job, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes, start=1)
        ]
        self._ended = weakref.finalize(self, _end, self._processes, self._pipes, folder)
        try:
            for process, (_, theirs) in zip(self._processes, pipes, strict=True):
                process.start()
                theirs.close()
            self._start(base, job, ranks, folder)
        except BaseException:
            self.close()
            raise
        self.lora.ranks, self.lora.most_slots = ranks, -(-parallel_clients // ranks)
        self.lora.compute = self.compute
        base.model.get_input_embeddings().register_forward_pre_hook(self._tell)

    def _start(self, base: BaseModel, job: _Job, ranks: int, folder: Path) -> None:
        for pipe in self._pipes:  # one loads after the other, so that main memory holds one whole model at a time
            self._send(pipe, None)
            if isinstance(refusal := self._receive(pipe), DrencoderError):
                raise refusal
        threading.Thread(target=_watch, args=(self._processes, self._ended), daemon=True).start()
        self._computing = True
        self._gathers = _Gathers(base, 0, ranks, folder)
        self._gathers.learn_text()
        shutil.rmtree(folder, ignore_errors=True)  # the ranks have met
        self.lora = job.open(base)
        self._gathers.learn_pass(self.lora)
        self._computing = False

    def compute(self, passes: Sequence[Pass]) -> list[Tensor]:
        """The gradients (K, D) of up to as many passes as there are ranks, at once; passes that draw dropout have no client in common.

        Raises:
          torch.OutOfMemoryError: one rank had too little memory, and all are ready for the next passes.
          RuntimeError: another failure, likewise; its text is nobody's.
          DeviceError: another rank ended.
        """
        self._computing = True
        try:
            self._gathers.begin(self._gathers.of_pass)
            padded = [*passes, *[blank_pass(self.lora)] * (len(self._pipes) + 1 - len(passes))]
            for pipe, one in zip(self._pipes, padded[1:], strict=True):
                self._send(pipe, _Order.of(self.lora, one))
            results = [_attempt(self.lora, padded[0])]
            self._gathers.finish()
            results += [self._receive(pipe) for pipe in self._pipes]
        except BaseException:  # Ctrl-C, or a rank that ended: nobody knows where the others stand
            self.close()
            raise
        self._computing = False
        if failed := [result for result in results if isinstance(result, str)]:
            full = torch.OutOfMemoryError.__name__ in failed
            raise (torch.OutOfMemoryError if full else RuntimeError)(f"a pass failed ({failed[0]})")
        gradients = [results[0]]
        for one, (gradient, states) in zip(padded[1:], results[1:], strict=True):
            for generator, state in zip(one.generators, states, strict=True):
                generator.set_state(torch.from_numpy(state))
            gradients.append(torch.from_numpy(gradient).to(self.lora.device))
        return gradients[: len(passes)]

    def _tell(self, *_: Any) -> None:
        """Before rank 0 computes anything but a pass: the others run a blank text beside it."""
        if self._computing:
            return
        self._gathers.begin(self._gathers.of_text)
        for pipe in self._pipes:
            self._send(pipe, None)

    def _send(self, pipe: Any, what: object) -> None:
        try:
            pipe.send_bytes(pickle.dumps(what))
        except (OSError, EOFError):
            raise DeviceError(_ENDED) from None

    def _receive(self, pipe: Any) -> Any:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (OSError, EOFError):
            raise DeviceError(_ENDED) from None

    def close(self) -> None:
        """Ends the other ranks. The model cannot compute any more."""
        self._ended()


def _end(processes: Sequence[Any], pipes: Sequence[Any], folder: Path) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        if process.pid is not None:
            process.kill()  # they hold nothing that is not here
            process.join()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


def _watch(processes: Sequence[Any], ended: Any) -> None:
    """Cards wait for a rank that ended as for a slow one; gloo notices by itself."""
    connection.wait([process.sentinel for process in processes])
    if ended.alive and torch.cuda.is_available() and distributed.is_initialized():
        distributed.distributed_c10d._abort_process_group()


@dataclass(frozen=True)
class _Order:
    """A pass on its way to another rank: a `Pass` whose tensors and generators are numpy arrays."""

    values: Any
    fit_tokens: int

    @classmethod
    def of(cls, lora: LoraModel, one: Pass) -> "_Order":
        states = [generator.get_state().numpy() for generator in one.generators]
        return cls((one.pieces, one.adapter_KD.cpu().numpy(), one.total_K.cpu().numpy(), states, one.empty), lora.fit_tokens)

    def open(self, lora: LoraModel) -> Pass:
        pieces, adapter_KD, total_K, states, empty = self.values
        lora.fit_tokens = self.fit_tokens
        generators = []
        for state in states:
            generators.append(torch.Generator(lora.device if lora.dropout else "cpu"))
            generators[-1].set_state(torch.from_numpy(state))
        tensors = (torch.from_numpy(values).to(lora.device) for values in (adapter_KD, total_K))
        return Pass(pieces, *tensors, generators, empty)


def _attempt(lora: LoraModel, one: Pass) -> Tensor | str:
    """A pass's gradients (K, D), or the type of what it raised: an exception's text may quote a client's.

    Raises:
      DeviceError: another rank ended.
    """
    try:
        return compute_pass(lora, one)
    except DeviceError:
        raise
    except Exception as error:
        failure = type(error).__name__
    # Outside of the except clause, whose traceback would keep the failed pass's graph in memory.
    if lora.device.type == "cuda":
        torch.cuda.empty_cache()
    return failure


def _serve(rank: int, ranks: int, folder: Path, job: _Job, pipe: Any) -> None:
    """The life of another rank: it ends with rank 0, and says nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's, who ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(job.threads)
    with contextlib.suppress(BaseException):
        _compute_for(rank, ranks, folder, job, pipe)
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _compute_for(rank: int, ranks: int, folder: Path, job: _Job, pipe: Any) -> None:
    pipe.recv_bytes()
    try:
        base = load_base(job.model, job.max_tokens)
    except DrencoderError as error:
        pipe.send_bytes(pickle.dumps(error))
        return
    pipe.send_bytes(pickle.dumps(None))
    gathers = _Gathers(base, rank, ranks, folder)
    gathers.learn_text()
    lora = job.open(base)
    gathers.learn_pass(lora)
    while True:
        order = pickle.loads(pipe.recv_bytes())
        gathers.begin(gathers.of_text if order is None else gathers.of_pass)
        if order is None:
            gathers.run_text()
            continue
        one = order.open(lora)
        result = _attempt(lora, one)
        gathers.finish()
        if isinstance(result, Tensor):
            result = result.cpu().numpy(), [generator.get_state().numpy() for generator in one.generators]
        pipe.send_bytes(pickle.dumps(result))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
