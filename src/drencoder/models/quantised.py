"""Bases in 8 and 4 bits, by bitsandbytes: LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339) and NF4 (QLoRA,
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). Not run on a GPU so far: see docs/models.md.
"""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from drencoder.errors import DeviceError


def quantised_weights(dtype: str, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load `model.dtype` = int8 or nf4; nothing for the other types.

    Raises:
      DeviceError: there is no CUDA device, or bitsandbytes is not installed.
    """
    if dtype not in ("int8", "nf4"):
        return {}
    if device.type != "cuda":
        raise DeviceError(
            f"model.dtype = {dtype!r} needs a GPU with CUDA, and this run is on the {device.type}: set model.dtype = 'bfloat16' or 'float32'."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DeviceError(f"model.dtype = {dtype!r} needs the package bitsandbytes: pip install 'drencoder[quant]'.")
    if dtype == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": device}, "dtype": torch.bfloat16}
