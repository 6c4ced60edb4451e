"""The size of a loaded model, and the free memory where it is."""

from typing import Any

import torch

from drencoder.models.adapted_layers import is_linear
from drencoder.models.training_size import ModelSize, free_memory

__all__ = ["free_memory_of", "measure_size"]

_UNKNOWN_FREE = 4 << 30  # where the system does not say


def measure_size(model: Any) -> ModelSize:
    """What training on a loaded causal language model depends on."""
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if is_linear(layer) and layer is not head]
    # A transposed layer's weight is (in, out).
    shapes = [layer.weight.shape[:: 1 if hasattr(layer, "out_features") else -1] for layer in linear]
    values = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize.of(values, shapes, model.get_input_embeddings().weight.shape[0])


def free_memory_of(device: torch.device) -> int:
    """Bytes that are free where the model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() or _UNKNOWN_FREE
