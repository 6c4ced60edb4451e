"""Bases in 8 and 4 bits, by bitsandbytes: LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339) and NF4 (QLoRA,
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). What was measured, and where, is in docs/models.md.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from drencoder.errors import DeviceError
from drencoder.models.adapted_layers import is_8_bit, is_quantised


def quantised_weights(dtype: str, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load `model.dtype` = int8 or nf4; nothing for the other types.

    Raises:
      DeviceError: bitsandbytes is not installed, or does not work on this device.
    """
    if dtype not in ("int8", "nf4"):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DeviceError(f"model.dtype = {dtype!r} needs the package bitsandbytes: pip install 'drencoder[quant]'.")
    import bitsandbytes

    if device.type not in getattr(bitsandbytes, "supported_torch_devices", ("cuda",)):
        raise DeviceError(
            f"model.dtype = {dtype!r} does not work on this machine's {device.type}, as bitsandbytes {bitsandbytes.__version__} says: "
            "install a newer one (pip install -U bitsandbytes), or set model.dtype = 'bfloat16' or 'float32'."
        )
    if dtype == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": device}, "dtype": torch.bfloat16}


def keep_gradients(model: nn.Module) -> None:
    """Lets gradients through the layers of bitsandbytes, whose products follow the mode of each layer, while the model is in evaluation mode.

    In evaluation mode a 4-bit layer packs its weights anew on some processors, for a product without a gradient, and never unpacks
    them. An 8-bit layer rounds its input, too, in evaluation mode; on a CPU it does not in training mode, which is faster.
    """
    for layer in model.modules():
        if is_quantised(layer):
            layer.register_forward_pre_hook(_set_mode)


def _set_mode(layer: nn.Module, _inputs: tuple[Any, ...]) -> None:
    layer.train(not is_8_bit(layer) or torch.is_grad_enabled())
