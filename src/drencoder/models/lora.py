"""A base model's LoRA adapter, and how many adapters run through one copy of the base.

Legend: K adapters (clients), R examples of each, L tokens, M predicted tokens, D adapter values, r rank.

A `LoraModel` holds PEFT's own adapter (reference path, saving) and forward hooks on the same linear
layers that add *stacked* adapters: client k's rows of the batch meet client k's A and B in one batched
product, so that K clients train in one pass through the frozen base. While they do, the base's own linear layers work
client by client as well (`client_products`): how many clients share a batch, and what they hold, changes no bit of another's.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from drencoder.data.tokenization import Batch
from drencoder.errors import ModelError
from drencoder.models.adapted_layers import choose_layers, is_linear, is_quantised, keeps_clients_apart
from drencoder.models.adapter_layout import AdapterLayout
from drencoder.models.base_model import BaseModel
from drencoder.models.client_products import Pair, add_adapter, own_products
from drencoder.models.loaded_size import free_memory_of, measure_size
from drencoder.models.peft_adapter import attach_adapter
from drencoder.models.recomputation import recomputed
from drencoder.recipe import recipe as config

_LOGITS = 1 << 26  # values that are made at a time: 256 MiB
_MOST_STEP, _CARD_LENGTH_STEP = 8, 64  # tokens that a length is rounded up to
_LOOP_STEP = 64  # values: two registers of 512 bits take 32 at a time, and two threads a half each
_MOST_ADDED = 16  # tokens that a length gets so that rows fill whole lines of the cache
# What another pass costs, in tokens: a core's calls, and a card's (benchmarks/speed.py, benchmarks/gpu.py).
_PASS_SHARE, _LEAST_PASS, _CARD_PASS = 1 / 32, 16, 1024
_PADDING_SHARE = 1 / 8  # of what a pass costs, for lengths that more clients have in common


class LoraModel:
    """A base model with one PEFT adapter and, on the same layers, room for a stack of K adapters.

    Args:
      base: the frozen model; its linear layers are wrapped in place.
      knobs: rank, alpha and targets.
      seed: of the adapter's start (A random, B zero).
      batch_tokens: how many tokens of clients train together, padding included; 0: by the model's size and the free memory.

    `left_out` names the layers that an automatic choice of targets would have taken and that cannot have an adapter.
    `fit_tokens`: how many tokens of a batch fit into half of the free memory; a longer one keeps less and computes it again.

    Raises:
      ModelError: a target names no linear layer, or one that does not get whole rows of tokens.
    """

    def __init__(self, base: BaseModel, knobs: config.Adapter, *, seed: int, batch_tokens: int = 0) -> None:
        self.base = base
        self.size = measure_size(base.model)
        # Layers that come from elsewhere would all stay until the backward pass, if it did not compute them again.
        self.fit_tokens = 0 if base.is_offloaded else self.size.fit_tokens(free_memory_of(base.device))
        # A core is busy with few tokens, and more only take memory; a graphics card wants as many as it holds.
        busy = self.fit_tokens if base.device.type == "cuda" else min(self.fit_tokens, self.size.busy_tokens)
        self.batch_tokens = batch_tokens or max(1, busy)
        card = base.device.type != "cpu"
        self.fixed_slots, self.tried_shapes = card, dict[tuple[int, int, int], bool]()
        self.pass_tokens = _CARD_PASS if card else max(_LEAST_PASS, int(_PASS_SHARE * self.size.busy_tokens))
        self.dropout, self.rank = knobs.dropout, knobs.rank
        # Of a model whose layers are split (`sharded`): how many passes are computed at once, how, and how many clients are in one at most.
        self.ranks, self.most_slots = 1, sys.maxsize
        self.compute: Callable[[Sequence[Any]], Sequence[Tensor]] | None = None
        layers = choose_layers(base.model, knobs.targets, base.source)
        self.left_out = layers.left_out
        linear = [layer for layer in base.model.modules() if is_linear(layer)]
        self._peft = attach_adapter(base, knobs, layers, seed)
        tensors = self._peft_tensors()
        self.layout = AdapterLayout.from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.initial_D = self.layout.flatten(tensors).clone()
        self._stack: Mapping[str, Tensor] | None = None
        self._generators: Sequence[torch.Generator] = ()
        self._isolated = 0  # how many clients the batch has whose products must be their own; 0: it is one batch
        self._tokens = 0  # of the batch in this pass, padding included
        self._pairs: dict[nn.Module, tuple[str, str, float]] = {}
        self._hook_layers()
        self._isolate_linear_layers()
        self._peft.base_model.disable_adapter_layers()
        self._split_head = self._head_can_be_split()
        head = base.model.get_output_embeddings() if self._split_head else None  # its products are of one client anyway
        self._widths = {size for layer in linear if layer is not head for size in layer.weight.shape}
        self._line = 64 // min(4, base.model.dtype.itemsize)  # values of a line of the cache
        self._stackable = keeps_clients_apart(base.model) and (self.rank in (2, 3) or self.rank % 4 == 0)
        self._stackable = self._stackable and all(segment.size % self._line == 0 for segment in self.layout.segments)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def save_memory(self) -> bool:
        """After a device had too little memory: later passes take less. First their layers run again in the backward pass, which
        changes no bit, then each client trains alone. False if neither is left to do.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.fit_tokens > 0:
            self.fit_tokens = 0
        elif self.batch_tokens > 1:
            self.batch_tokens = 1
        else:
            return False
        return True

    def can_share(self, tokens: int) -> bool:
        """Whether clients with `tokens` tokens each may train in one batch; if not, each trains alone.

        A matrix library adds up in another order where a matrix does not begin at a full line of the cache (64 bytes), and it
        takes another way for one product than for several where that is with a vector, or where several threads share few rows. So all
        that belongs to a client must fill whole lines, and only ranks are stacked for which neither was seen (docs/log.md): else who
        shares the batch would move a rounding. And a function such as SiLU is rounded otherwise for the last values of a tensor that fill
        no whole step of its loop.
        """
        whole = all(tokens * width % _LOOP_STEP == 0 for width in self._widths)
        return self._stackable and whole and tokens * self.rank % self._line == 0

    def padded_length(self, rows: int, longest: int) -> int:
        """How long `rows` texts of a client are made, the longest of which has `longest` tokens, so that few shapes occur.

        Texts of a client that cannot share a pass keep their length, and no text gets longer than the model's positions.
        """
        if self.fixed_slots:
            rounded = -(-longest // _CARD_LENGTH_STEP) * _CARD_LENGTH_STEP
            return max(longest, min(rounded, self.base.positions or rounded))
        step = min(_MOST_STEP, max(1, int(_PADDING_SHARE * self.pass_tokens) // rows))
        rounded = -(-longest // step) * step
        lengths = range(rounded, min(rounded + _MOST_ADDED, 1 + (self.base.positions or 2 * rounded + _MOST_ADDED)))
        return next((length for length in lengths if self.can_share(rows * length)), longest)

    # --- one vector, through PEFT -------------------------------------------------------------

    def _peft_tensors(self) -> dict[str, Tensor]:
        tensors = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @contextlib.contextmanager
    def peft(self, vector_D: Tensor) -> Iterator[Any]:
        """PEFT's own model with the adapter set to `vector_D`: the reference path, one client at a time."""
        set_peft_model_state_dict(self._peft, self.layout.unflatten(vector_D))
        self._peft.base_model.enable_adapter_layers()
        try:
            yield self._peft
        finally:
            self._peft.base_model.disable_adapter_layers()

    def save(self, vector_D: Tensor, folder: Path) -> None:
        """Writes a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`)."""
        config = self._peft.peft_config["default"]
        if isinstance(config.target_modules, set):  # two runs of one recipe write the same file
            config.target_modules = sorted(config.target_modules)
        with self.peft(vector_D):
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)
        # PEFT's card says nothing true about a run; runs.model_card does.
        (folder / "README.md").unlink(missing_ok=True)

    # --- K vectors, through hooks -------------------------------------------------------------

    def _hook_layers(self) -> None:
        """Adapters are added by the products of `_isolate_linear_layers`, and by hooks where these are not isolated."""
        self.base.model.get_input_embeddings().register_forward_pre_hook(self._count_tokens)
        for name, layer in self._peft.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            names, linear = (f"{name}.lora_A.weight", f"{name}.lora_B.weight"), layer.get_base_layer()
            self._pairs[linear] = (*names, layer.scaling["default"])
            linear.register_forward_hook(self._add_delta)

    def _count_tokens(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tokens = inputs[0].numel()

    def _pair_of(self, layer: nn.Module, x: Tensor) -> Pair | None:
        """The stacked adapters of a layer that gets `x`; None if it has none."""
        if self._stack is None or layer not in self._pairs:
            return None
        name_A, name_B, scale = self._pairs[layer]
        if x.shape[:-1].numel() != self._tokens:
            raise ModelError(f"{name_A} did not get every token once: clients could not be told apart there.")
        A_KrI, B_KOr = (self._stack[name].to(x.device) for name in (name_A, name_B))
        if not self._generators:
            return A_KrI, B_KOr, scale, None
        x_KTI = x.reshape(len(A_KrI), -1, x.shape[-1])
        return A_KrI, B_KOr, scale, (x_KTI * self._dropout_mask(x_KTI)).view(x.shape)

    def _add_delta(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._isolated and is_linear(layer):
            return None
        pair = self._pair_of(layer, inputs[0])
        if pair is None:
            return None
        A_KrI, B_KOr, scale, dropped = pair
        x = inputs[0] if dropped is None else dropped
        return add_adapter(output, x, A_KrI, B_KOr, scale, rounded=is_quantised(layer))

    def _dropout_mask(self, x_KTI: Tensor) -> Tensor:
        """0 for a value that is dropped, else 1 / (1 - dropout). Each client's is drawn by its own generator."""
        drawn_KTI = torch.stack(
            [torch.rand(x_KTI.shape[1:], generator=one, device=x_KTI.device) for one in self._generators]
        )
        return (drawn_KTI >= self.dropout) / (1 - self.dropout)

    def _isolate_linear_layers(self) -> None:
        for layer in self.base.model.modules():
            if is_linear(layer):
                transposed = type(layer) is Conv1D
                # accelerate's hook brings the weights of a layer that is elsewhere, and then calls what was its forward.
                name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
                setattr(layer, name, self._product_of(layer, transposed=transposed))

    def _product_of(self, layer: Any, *, transposed: bool) -> Any:
        """A linear layer's forward: with isolated clients one product for each of them."""

        def forward(x: Tensor) -> Tensor:
            weight_IO = layer.weight if transposed else layer.weight.T
            if not self._isolated:
                return functional.linear(x, weight_IO.T, layer.bias)
            return own_products(x, self._isolated, weight_IO, layer.bias, self._pair_of(layer, x))

        return forward

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """Gives what the adapted layers get in the passes inside: name of the layer's A -> its last input (rows, L, I)."""
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            return lambda _module, inputs: seen.__setitem__(name, inputs[0].detach())

        layers = [(name, layer) for name, layer in self._peft.named_modules() if isinstance(layer, LoraLayer)]
        hooks = [
            layer.get_base_layer().register_forward_pre_hook(watch(f"{name}.lora_A.weight")) for name, layer in layers
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def stacked(
        self,
        stack: Mapping[str, Tensor],
        *,
        isolated: bool = False,
        generators: Sequence[torch.Generator] = (),
        frugal: bool = False,
    ) -> Iterator[None]:
        """Runs K adapters at once: `stack` maps names to (K, *shape); batch rows are grouped by client.

        Args:
          isolated: also the base's products are each client's own, bit for bit whoever else is in the batch.
          generators: one for each client switch LoRA dropout on; each draws its own client's masks.
          frugal: the model's layers keep their inputs only, and the backward pass, which must be inside, computes the rest again.
        """
        self._stack, self._generators = stack, generators if self.dropout else ()
        self._isolated = len(next(iter(stack.values()))) if isolated else 0
        try:
            with recomputed(self.base.model, self._generators) if frugal else contextlib.nullcontext():
                yield
        finally:
            self._stack, self._generators, self._isolated = None, (), 0

    # --- losses ------------------------------------------------------------------------------

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy (nats) of every predicted token, (M,), rows in order.

        Only the predicted positions go through the vocabulary projection.
        """
        logits_MV = self.logits_before(batch.input_ids, batch.predicted)
        return functional.cross_entropy(logits_MV.float(), batch.input_ids[batch.predicted], reduction="none")

    def client_losses(self, batch: Batch, clients: int) -> Tensor:
        """Summed cross-entropy (nats) of each client's predicted tokens, (K,), inside `stacked(..., isolated=True)`.

        `batch` is on the CPU, where it is known without waiting for the device which positions are predicted.

        The vocabulary projection and the sum are each client's own, too.
        """
        chosen_M = _positions_before(batch.predicted).flatten().nonzero()[:, 0]
        counts = batch.predicted.view(clients, -1).sum(dim=1).tolist()
        batch, target_M = batch.to(self.device), batch.input_ids[batch.predicted]
        states = self._states(batch.input_ids)
        states_MH = states.flatten(0, 1).index_select(0, chosen_M.to(states.device))
        isolated, self._isolated = self._isolated, 0
        nothing = torch.zeros((), device=self.device)
        losses = [
            self._summed_loss(states_mH, target_m).to(self.device) if len(target_m) else nothing
            for states_mH, target_m in zip(states_MH.split(counts), target_M.split(counts), strict=True)
        ]
        self._isolated = isolated
        return torch.stack(losses)

    def _summed_loss(self, states_MH: Tensor, target_M: Tensor) -> Tensor:
        """Summed cross-entropy of one client. Of many tokens the logits are made piece by piece, and again in the backward pass."""

        def loss(states_mH: Tensor, target_m: Tensor) -> Tensor:
            logits_mV = self._projected(states_mH).float()
            return functional.cross_entropy(logits_mV, target_m.to(logits_mV.device), reduction="sum")

        step = max(1, _LOGITS // self.base.vocabulary)
        if len(states_MH) <= step:
            return loss(states_MH, target_M)
        parts = zip(states_MH.split(step), target_M.split(step), strict=True)
        return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()

    def logits_before(self, input_ids: Tensor, predicted: Tensor) -> Tensor:
        """Logits (M, V) that predict the tokens where `predicted` (rows, L) is true; position 0 has none."""
        return self._projected(self._states(input_ids)[_positions_before(predicted)])

    def _states(self, input_ids: Tensor) -> Tensor:
        """What `_projected` makes logits of: (rows, L, hidden), or the logits themselves where the head cannot be split."""
        causal = self.base.model
        if not self._split_head:
            return causal(input_ids=input_ids, use_cache=False).logits
        return causal.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state

    def _projected(self, states: Tensor) -> Tensor:
        return self.base.model.get_output_embeddings()(states) if self._split_head else states

    def _head_can_be_split(self) -> bool:
        """Whether decoder + output embedding is the whole model (no logit scaling or capping after it), and the
        output embedding has no adapter: an adapter needs whole rows, to tell the clients apart."""
        causal = self.base.model
        if isinstance(causal.get_output_embeddings(), LoraLayer):
            return False
        probe = torch.arange(8, device=self.device).remainder(causal.config.get_text_config().vocab_size)[None]
        with torch.inference_mode():
            whole = causal(input_ids=probe, use_cache=False).logits
            try:
                hidden = causal.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
                split = causal.get_output_embeddings()(hidden)
            except (AttributeError, TypeError, RuntimeError):
                return False
            return whole.shape == split.shape and torch.allclose(whole, split, rtol=1e-3, atol=1e-3)


def _positions_before(predicted: Tensor) -> Tensor:
    """(rows, L) bool: where the model's state predicts a token that is `predicted`."""
    before = torch.zeros_like(predicted)
    before[:, :-1] = predicted[:, 1:]
    return before
