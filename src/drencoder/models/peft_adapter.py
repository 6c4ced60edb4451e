"""PEFT's own adapter on a base model: which layers it wraps, and how it starts. Legend: r rank, I inputs of a layer."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from drencoder.errors import ModelError
from drencoder.models.adapted_layers import AdaptedLayers, is_linear
from drencoder.models.base_model import BaseModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed


def attach_adapter(base: BaseModel, knobs: config.Adapter, layers: AdaptedLayers, seed: int) -> Any:
    """Wraps the target layers with a PEFT adapter whose random start depends on the seed alone."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=knobs.rank,
        lora_alpha=knobs.alpha,  # type: ignore[arg-type]  # PEFT divides by it; a fraction is fine
        lora_dropout=knobs.dropout,
        target_modules=layers.peft_targets(base.model),
        bias="none",
    )
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that GPT-2's layers are transposed, and takes care of it
        torch.manual_seed(derive_seed(seed, "adapter"))
        with _standing_in(base.model):
            attached = get_peft_model(base.model, lora, autocast_adapter_dtype=False)
    if base.hub_id:  # rather than where this machine keeps it
        lora.base_model_name_or_path, lora.revision = base.hub_id, base.revision or None
    for name, parameter in attached.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
        if ".lora_A." in name and knobs.start == "orthonormal":
            parameter.data = orthonormal_rows(parameter.data, float(parameter.data.norm()))
    return attached


@contextlib.contextmanager
def _standing_in(model: nn.Module) -> Iterator[None]:
    """Gives layers that are on the disk or in main memory a weight without memory, so that PEFT sees type and device of a real one."""
    linear: list[Any] = [layer for layer in model.modules() if is_linear(layer)]
    away = [layer for layer in linear if layer.weight.is_meta]
    weights = [layer.weight for layer in away]
    for layer, weight in zip(away, weights, strict=True):
        one = torch.zeros((), dtype=weight.dtype, device=layer._hf_hook.execution_device)
        layer.weight = nn.Parameter(one.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(away, weights, strict=True):
            layer.weight = weight


def orthonormal_rows(A_rI: Tensor, norm: float) -> Tensor:
    """Rows that span the same spaces, one by one, and are orthogonal, all of one length; `norm` is the Frobenius norm.

    ModelError if there are more rows than a space of I dimensions can have.
    """
    rank, width = A_rI.shape
    if rank > width:
        raise ModelError(
            f"adapter.start = 'orthonormal' or 'public' cannot give {rank} orthogonal rows of {width} values: lower adapter.rank to "
            f"{width} or set adapter.start = 'peft'."
        )
    rows_rI = torch.linalg.qr(A_rI.T).Q.T
    return rows_rI * (norm / rank**0.5)
