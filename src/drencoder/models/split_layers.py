"""Decoder layers whose weights are split over several ranks, and the order in which all ranks gather them (`sharded`)."""

import contextlib
import datetime
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from drencoder.errors import DeviceError
from drencoder.models.base_model import BaseModel
from drencoder.models.cohort_training import blank_pass, compute_pass
from drencoder.models.loaded_size import check_memory
from drencoder.models.lora import LoraModel
from drencoder.models.recomputation import decoder_layers

# A rank may wait for another's pass as long as it takes; that another ended is seen at once (`gather`, `sharded._watch`).
_PATIENCE = datetime.timedelta(days=1)
ENDED = (
    "a process that held a part of the model ended (perhaps the machine had too little memory), so training cannot go on here: start "
    "again, a run with drencoder run --resume FOLDER."
)


class SplitLayers:
    """One rank's parts of the layers. torch's FSDP2 gathers a layer whenever it is computed, forwards and backwards, and lets go of it again.

    All ranks must gather the same layers in the same order, or they would wait for each other for ever. The first blank text and the
    first blank pass show this order, `of_text` and `of_pass`; whatever is computed later follows one of them.
    """

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        """Joins the other ranks, who meet in a folder."""
        self.of_text: list[int] = []
        self.of_pass: list[int] = []
        self._order: list[int] | None = None  # of what is computed; None: it shows the order
        self._done: list[int] = []
        self._card = torch.device("cuda", rank) if torch.cuda.is_available() else None
        # Nothing here adds to a layer's output in place, which FSDP2 warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if self._card is not None:
            torch.cuda.set_device(self._card)
        kind, library = ("cpu", "gloo") if self._card is None else ("cuda", "nccl")
        with _over_the_loopback():
            distributed.init_process_group(
                library,
                init_method=f"file://{folder}/ranks",
                rank=rank,
                world_size=ranks,
                timeout=_PATIENCE,
                device_id=self._card,
            )
            self._mesh = distributed.init_device_mesh(kind, (ranks,))

    def split(self, base: BaseModel) -> None:
        """Keeps this rank's part of the layers of a model in main memory, and the rest of the model whole.

        Raises:
          ModelError: the card has no room for them.
        """
        from torch.distributed.fsdp import fully_shard, share_comm_ctx

        self._base, self._layers = base, decoder_layers(base.model)
        if self._card is not None:
            layers = sum(parameter.nbytes for layer in self._layers for parameter in layer.parameters())
            others = sum(parameter.nbytes for parameter in base.model.parameters()) - layers
            check_memory(others + layers // self._mesh.size(), self._card)
        for index, layer in enumerate(self._layers):
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=True)
            layer.set_custom_all_gather(_Gather(index, self))
        share_comm_ctx(self._layers)
        if self._card is not None:
            base.model.to(self._card)

    def learn_text(self) -> None:
        """Runs the first blank text. Not in inference mode: what is first gathered there could never be trained with."""
        self.run_text()
        self.of_text = [*self._done]

    def learn_pass(self, lora: LoraModel) -> None:
        """Computes the first blank pass."""
        self.begin(None)
        compute_pass(lora, blank_pass(lora))
        self.of_pass = [*self._done]

    def run_text(self) -> None:
        """Runs a blank text, for the parts of the layers that another rank needs."""
        with torch.no_grad():
            self._base.model(input_ids=torch.full((1, 2), self._base.pad_id, device=self._base.device), use_cache=False)

    def begin(self, order: list[int] | None) -> None:
        """Before anything is computed. What came before, and failed, gathers to its end."""
        self.finish()
        self._reset()
        self._order, self._done = order, []

    def finish(self) -> None:
        """Gathers what the order has left after a failure: the other ranks wait for this one's parts."""
        left = [] if self._order is None else self._order[len(self._done) :]
        if left:
            self._reset()
        for index in left:
            self._layers[index].unshard()
            self._layers[index].reshard()

    def _reset(self) -> None:
        """Lets go of what a text or a pass has left in FSDP2: it keeps the order of forward passes without a backward one."""
        for layer in self._layers:
            layer.reset_iter_state()

    def gather(self, index: int, whole: Tensor, own: Tensor, group: Any, *, later: bool) -> Any:
        """One layer's weights, from all ranks.

        Raises:
          DeviceError: another rank ended, or the layer is not the next.
        """
        if self._order is not None and self._order[len(self._done) : len(self._done) + 1] != [index]:
            raise DeviceError(
                "the base model was asked for a gradient in a way that cannot work with model.device = 'shard'."
            )
        self._done.append(index)
        try:
            return distributed.all_gather_single(whole, own, group=group, async_op=later)
        except (RuntimeError, ValueError):  # what a library says of a group that is no more
            raise DeviceError(ENDED) from None


class _Gather:
    """What FSDP2 calls for one layer."""

    def __init__(self, index: int, layers: SplitLayers) -> None:
        self._index, self._layers = index, layers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self._layers.gather(self._index, output_tensor, input_tensor, group, later=async_op)


@contextlib.contextmanager
def _over_the_loopback() -> Iterator[None]:
    """Binds the ranks' libraries to this machine, whatever its network."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, loopback))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
