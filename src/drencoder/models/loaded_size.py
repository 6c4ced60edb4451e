"""The size of a loaded model, and the free memory where it is."""

from typing import Any

import torch

from drencoder.errors import ModelError
from drencoder.models.adapted_layers import is_linear, is_quantised
from drencoder.models.training_size import ModelSize, free_memory, gigabytes

_UNKNOWN_FREE = 4 << 30  # where the system does not say
_FOR_WEIGHTS = 0.6  # of free memory, where a model is spread; the rest is for training


def measure_size(model: Any) -> ModelSize:
    """What training on a loaded causal language model depends on."""
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if (is_linear(layer) or is_quantised(layer)) and layer is not head]
    shapes = [
        # A transposed layer's weight is (in, out), and a quantised one's is packed.
        (layer.out_features, layer.in_features) if hasattr(layer, "out_features") else tuple(layer.weight.shape)[::-1]
        for layer in linear
    ]
    values = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize.of(values, shapes, model.get_input_embeddings().weight.shape[0])


def check_memory(weight_bytes: int | None, device: torch.device) -> None:
    """Raises ModelError if weights of `weight_bytes` bytes cannot be loaded into what is free; None: not known."""
    free = free_memory_of(device)
    if weight_bytes is not None and weight_bytes > free:
        raise ModelError(
            f"the model's weights alone take {gigabytes(weight_bytes)} and {gigabytes(free)} of memory are free here: choose a smaller "
            "model, set model.dtype = 'bfloat16', set model.device = 'spread' (or 'shard', for several GPUs), or use a machine with more memory."
        )


def free_memory_of(device: torch.device) -> int:
    """Bytes that are free where the model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() or _UNKNOWN_FREE


def room_for_weights() -> dict[int | str, int]:
    """Bytes of weights for each graphics card and for main memory, as accelerate takes them; what is too much stays on the disk."""
    cards: dict[int | str, int] = {
        index: int(_FOR_WEIGHTS * free_memory_of(torch.device("cuda", index)))
        for index in range(torch.cuda.device_count())
    }
    return cards | {"cpu": int(_FOR_WEIGHTS * free_memory_of(torch.device("cpu")))}
