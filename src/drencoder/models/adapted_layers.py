"""The linear layers of a model: which of them can get an adapter, and whether clients can share a batch in it.

Legend: rows are texts of a batch, L tokens each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drencoder.errors import ModelError
from drencoder.models.targets import choose_targets, is_automatic, last_part
from drencoder.reading import shown

_ROWS, _LENGTH = 3, 8  # of the probe
# A pass in 8 bits rounds a text's values by those of the texts beside it. In SmolLM2-135M that moves what a layer gets of a text
# by a tenth of its norm at most; another text's values differ by a half at least.
_MOVED_IN_8_BITS = 0.25
# PEFT refuses Mamba's output projection, whose weight the fast kernels read past the adapter.
_MAMBA_FAMILIES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class AdaptedLayers:
    """`names` get a LoRA pair. `left_out` would have got one by the rule that chose, and cannot have one."""

    names: list[str]
    left_out: list[str]

    def peft_targets(self, model: nn.Module) -> list[str]:
        """What PEFT is told, as short as it can be: the last part of a name if it names chosen layers only."""
        chosen, others = set(self.names), set()
        for name, _ in model.named_modules():
            if name not in chosen:
                others.add(last_part(name))
        short = (last_part(name) if last_part(name) not in others else name for name in self.names)
        return list(dict.fromkeys(short))


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a product with its weight: `nn.Linear`, GPT-2's transposed one, or Falcon's."""
    return type(layer) in (nn.Linear, Conv1D) or type(layer).__name__ == "FalconLinear"


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of bitsandbytes. Its product is not made client by client."""
    return is_8_bit(layer) or type(layer).__name__ == "Linear4bit"


def is_8_bit(layer: nn.Module) -> bool:
    """Whether a layer's product rounds a text's values by those of the texts beside it (LLM.int8())."""
    return type(layer).__name__ == "Linear8bitLt"


def choose_layers(model: Any, targets: Sequence[str], source: str) -> AdaptedLayers:
    """Chooses the layers that get a LoRA pair.

    A layer can have one if it gets every token of every text once in a pass, text after text: only then can its rows be told
    apart by client. An expert of a mixture gets the tokens that were routed to it.

    Args:
      targets: as in `adapter.targets`.
      source: how the model is called in an error.

    Raises:
      ModelError: a target names no linear layer, or a layer by its name that cannot have a pair, or the rule leaves no layer.
    """
    automatic, head = is_automatic(targets), model.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if (is_linear(layer) or is_quantised(layer)) and not (automatic and layer is head)
    }
    chosen = choose_targets(targets, list(layers), model.config.model_type, source)
    whole = _get_whole_rows(model, {name: layers[name] for name in chosen})
    taken = {part: _peft_adapts(model, part) for part in {last_part(name) for name in chosen}}
    for name in [] if automatic else chosen:
        if name not in whole:
            raise ModelError(
                f"adapter.targets matches {shown(name)}, which does not get every token of every text once, so that clients could "
                "not be told apart there: name other linear layers."
            )
        if not taken[last_part(name)]:
            raise ModelError(
                f"adapter.targets matches {shown(name)}, which PEFT does not adapt in a model of type {shown(model.config.model_type)}: "
                "name other linear layers."
            )
    names = [name for name in chosen if name in whole and taken[last_part(name)]]
    if not names:
        raise ModelError(
            f"adapter.targets = {targets[0]!r} finds no linear layer of {shown(source)} that can have an adapter: choose another model."
        )
    experts = [name for name, layer in model.named_modules() if _holds_experts(layer)] if automatic else []
    return AdaptedLayers(names, [*(name for name in chosen if name not in names), *experts])


def _peft_adapts(model: Any, part: str) -> bool:
    """Whether PEFT adapts layers of this name and no others: in mixtures it takes some names for those of experts."""
    if part == "out_proj" and model.config.model_type in _MAMBA_FAMILIES:
        return False
    asked = LoraConfig(target_modules=[part])
    try:
        convert_peft_config_for_transformers(asked, model, None)
    except ValueError:  # it would take the name for a half of what is fused today
        return False
    return asked.target_modules == {part} and not asked.target_parameters


def _holds_experts(layer: nn.Module) -> bool:
    """Whether a layer has the matrices of all experts in one tensor, which is no linear layer."""
    return "Expert" in type(layer).__name__ and any(p.ndim == 3 for p in layer.parameters(recurse=False))


@torch.inference_mode()
def _get_whole_rows(model: Any, layers: dict[str, nn.Module]) -> set[str]:
    """The layers whose input in a pass is one tensor of all tokens, text after text, whatever stands in other texts."""
    inputs: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _module, args: inputs.setdefault(name, []).append(args[0].detach())

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # hooks move what the layers get
    first = torch.arange(_ROWS * _LENGTH, device=device).view(_ROWS, _LENGTH)
    other = first.clone()
    other[-1] += 1  # another last text: what the layers get of the texts before it stays where it is
    try:
        for probe in (first, other):
            model(input_ids=probe.remainder(vocabulary), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    moved = _MOVED_IN_8_BITS if any(is_8_bit(layer) for layer in layers.values()) else 0.0
    return {name for name, seen in inputs.items() if _is_whole(seen, moved)}


def _is_whole(seen: list[Tensor], moved: float) -> bool:
    if len(seen) != 2 or any(x.shape[:-1].numel() != _ROWS * _LENGTH for x in seen):
        return False
    first, other = (x.reshape(_ROWS, _LENGTH, -1).float() for x in seen)
    if moved:
        change_R = (first - other).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
        return bool((change_R[:-1] < moved).all()) and bool(change_R[-1] > 0)
    scale = first.abs().max()
    return bool(torch.allclose(first[:-1], other[:-1], rtol=1e-3, atol=1e-3 * float(scale))) and not bool(
        torch.equal(first[-1], other[-1])
    )


def keeps_clients_apart(model: nn.Module) -> bool:
    """Whether all products of the model are those of linear layers, which `LoraModel` makes client by client.

    If not (experts of a mixture, convolutions), one client's values may be rounded otherwise when others share its batch.
    """
    for layer in model.modules():
        if is_quantised(layer):
            return False
        if is_linear(layer) or isinstance(layer, nn.Embedding):
            continue
        for parameter in layer.parameters(recurse=False):
            if sum(length > 1 for length in parameter.shape) > 1:
                return False
    return True
