"""A base model whose decoder layers are split over all graphics cards of a machine, which train clients at the same time.

torch's FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) keeps a part of every layer on each card
(`split_layers`). One process a card is a rank. The user's own process is rank 0 and does all that it does without: the others compute
passes of clients (`cohort_training.compute_pass`) at adapters that they are sent, and know nothing of noise, budget or ledger. On a machine
without a card two processes share the CPU, which is for trying it out and for tests.

All ranks gather the same layers in the same order. So a rank without a pass computes a blank one, the others run a blank text beside whatever
else rank 0 computes, and a rank whose pass failed gathers on to its end. Clients' text and adapters travel over pipes; the ranks
exchange weights alone, over the loopback or the cards' own links.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from drencoder.errors import DeviceError, DrencoderError, ModelError
from drencoder.models.base_model import BaseModel, load_base
from drencoder.models.cohort_training import Pass, blank_pass, compute_pass
from drencoder.models.lora import LoraModel
from drencoder.models.recomputation import decoder_layers
from drencoder.models.split_layers import ENDED, SplitLayers
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe

_CPU_RANKS = 2


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


@dataclass(frozen=True)
class _Order:
    """A pass on its way to another rank, with arrays in place of tensors and generators."""

    one: Pass  # its pieces, and nothing else
    adapter_KD: Any
    total_K: Any
    states: list[Any]
    fit_tokens: int

    @classmethod
    def of(cls, lora: LoraModel, one: Pass) -> "_Order":
        nothing = torch.empty(0)
        pieces = replace(one, adapter_KD=nothing, total_K=nothing, generators=())
        arrays = one.adapter_KD.cpu().numpy(), one.total_K.cpu().numpy()
        return cls(pieces, *arrays, [one.get_state().numpy() for one in one.generators], lora.fit_tokens)

    def open(self, lora: LoraModel) -> Pass:
        lora.fit_tokens = self.fit_tokens
        generators = [torch.Generator(lora.device if lora.dropout else "cpu") for _ in self.states]
        for generator, state in zip(generators, self.states, strict=True):
            generator.set_state(torch.from_numpy(state))
        adapter_KD, total_K = (torch.from_numpy(values).to(lora.device) for values in (self.adapter_KD, self.total_K))
        return replace(self.one, adapter_KD=adapter_KD, total_K=total_K, generators=generators)


@dataclass(frozen=True)
class _Result:
    """A pass's gradients (K, D), and where its generators stand afterwards; or the type of what it raised."""

    gradient_KD: Any = None
    states: list[Any] = field(default_factory=list)
    failure: str = ""


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
            raise DeviceError(
                "model.device = 'shard' can split one model in a process, and this process has split one already."
            )
        if base.hub_id:  # what rank 0 has loaded, whatever the branch says by now
            job = replace(job, model=replace(job.model, revision=base.revision))
        ranks = torch.cuda.device_count() or _CPU_RANKS
        folder = Path(tempfile.mkdtemp(prefix="drencoder-ranks-"))
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(1, ranks)]
        self._computing = True
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, ranks, folder, job, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes, start=1)
        ]
        self._ended = weakref.finalize(self, _end, self._processes, self._pipes, folder)
        try:
            with _apart():
                for process, (_, theirs) in zip(self._processes, pipes, strict=True):
                    process.start()
                    theirs.close()
            for pipe in self._pipes:
                _receive(pipe)  # it has begun
            threading.Thread(target=_watch, args=(self._processes, self._ended), daemon=True).start()
            self._layers = SplitLayers(0, ranks, folder)
            self._layers.split(base)
            for pipe in self._pipes:  # one loads after the other, so that main memory holds one whole model at a time
                _send(pipe, None)
                if isinstance(refusal := _receive(pipe), DrencoderError):
                    raise refusal
            self._layers.learn_text()
            shutil.rmtree(folder, ignore_errors=True)  # the ranks have met
            self.lora = job.open(base)
            self._layers.learn_pass(self.lora)
        except BaseException:
            self.close()
            raise
        self.lora.ranks, self.lora.most_slots = ranks, -(-parallel_clients // ranks)
        self.lora.compute = self.compute
        base.model.get_input_embeddings().register_forward_pre_hook(self._tell)
        self._computing = False

    def compute(self, passes: Sequence[Pass]) -> list[Tensor]:
        """The gradients (K, D) of up to as many passes as there are ranks, at once; passes that draw dropout have no client in common.

        Raises:
          torch.OutOfMemoryError: one rank had too little memory, and all are ready for the next passes.
          RuntimeError: another failure, likewise. Only its type is told: an exception's text may quote a client's.
          DeviceError: another rank ended.
        """
        self._computing = True
        try:
            self._layers.begin(self._layers.of_pass)
            padded = [*passes, *[blank_pass(self.lora)] * (self.lora.ranks - len(passes))]
            for pipe, one in zip(self._pipes, padded[1:], strict=True):
                _send(pipe, _Order.of(self.lora, one))
            results = [_attempt(self.lora, padded[0])]
            self._layers.finish()
            results += [_receive(pipe) for pipe in self._pipes]
        except BaseException:  # Ctrl-C, or a rank that ended: nobody knows where the others stand
            self.close()
            raise
        self._computing = False
        if failed := [result.failure for result in results if result.failure]:
            full = torch.OutOfMemoryError.__name__ in failed
            raise (torch.OutOfMemoryError if full else RuntimeError)(f"a pass failed ({failed[0]})")
        for one, result in zip(padded[1:], results[1:], strict=True):
            for generator, state in zip(one.generators, result.states, strict=True):
                generator.set_state(torch.from_numpy(state))
        return [torch.as_tensor(result.gradient_KD).to(self.lora.device) for result in results[: len(passes)]]

    def _tell(self, *_: Any) -> None:
        """Before rank 0 computes anything but a pass: the others run a blank text beside it."""
        if self._computing:
            return
        self._layers.begin(self._layers.of_text)
        for pipe in self._pipes:
            _send(pipe, None)

    def close(self) -> None:
        """Ends the other ranks. The model cannot compute any more."""
        self._ended()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Processes that start here do not run the user's script again, which may lack Python's `if __name__ == "__main__"`, and do not hear
    Ctrl-C, which is rank 0's, who ends them.
    """
    script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if is_main:
            signal.signal(signal.SIGINT, before)


def _send(pipe: Any, what: object) -> None:
    try:
        pipe.send_bytes(pickle.dumps(what))
    except OSError:
        raise DeviceError(ENDED) from None


def _receive(pipe: Any) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (OSError, EOFError):
        raise DeviceError(ENDED) from None


def _end(processes: Sequence[Any], pipes: Sequence[Any], folder: Path) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        if process.pid is not None:
            process.kill()  # it holds nothing that is not here
            process.join()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


def _watch(processes: Sequence[Any], ended: Any) -> None:
    """Cards wait for a rank that ended as for a slow one; gloo notices by itself."""
    connection.wait([process.sentinel for process in processes])
    if ended.alive and torch.cuda.is_available() and distributed.is_initialized():
        distributed.distributed_c10d._abort_process_group()


def _attempt(lora: LoraModel, one: Pass) -> _Result:
    """Raises DeviceError: another rank ended. Whatever else a pass raises is its result."""
    try:
        return _Result(compute_pass(lora, one))
    except DeviceError:
        raise
    except Exception as error:
        failure = type(error).__name__
    # Outside of the except clause, whose traceback would keep the failed pass's graph in memory.
    if lora.device.type == "cuda":
        torch.cuda.empty_cache()
    return _Result(failure=failure)


# --- the other ranks ------------------------------------------------------------------------------


def _serve(rank: int, ranks: int, folder: Path, job: _Job, pipe: Any) -> None:
    """The life of another rank: it ends with rank 0, and says nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    _send(pipe, None)
    layers = SplitLayers(rank, ranks, folder)
    _receive(pipe)
    try:
        base = load_base(job.model, job.max_tokens)
        layers.split(base)
    except DrencoderError as error:
        _send(pipe, error)
        return
    _send(pipe, None)
    layers.learn_text()
    lora = job.open(base)
    layers.learn_pass(lora)
    while True:
        order = _receive(pipe)
        layers.begin(layers.of_text if order is None else layers.of_pass)
        if order is None:
            layers.run_text()
            continue
        one = order.open(lora)
        result = _attempt(lora, one)
        layers.finish()
        if not result.failure:
            states = [generator.get_state().numpy() for generator in one.generators]
            result = _Result(result.gradient_KD.cpu().numpy(), states)
        _send(pipe, result)
