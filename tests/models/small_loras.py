"""Tiny models with an adapter, and an adapter away from its start."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import tiny_base
from drencoder.models.base_model import BaseModel
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config

UPLOADS = ("gradient", "pseudo-gradient", "increment")


def make_lora(**knobs: object) -> LoraModel:
    wanted = config.Adapter(**{"rank": 4, **knobs})  # type: ignore[arg-type]
    return LoraModel(tiny_base(), wanted, seed=5)


def moved(lora: LoraModel) -> torch.Tensor:
    """An adapter away from its start, so that the gradient of A is not zero."""
    generator = torch.Generator().manual_seed(3)
    return lora.initial_D + 0.05 * torch.randn(lora.layout.size, generator=generator)


def gpt2(dropout: float) -> LoraModel:
    """Fused projections in transposed layers (Conv1D)."""
    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    base = tiny_base()
    model = GPT2LMHeadModel(shape).eval().requires_grad_(False)
    wrapped = BaseModel(model, base.tokenizer, "gpt2")
    return LoraModel(wrapped, config.Adapter(rank=4, dropout=dropout, targets=("c_attn", "c_fc")), seed=5)


def bfloat16(dropout: float) -> LoraModel:
    base = tiny_base()
    base.model.to(torch.bfloat16)
    return LoraModel(base, config.Adapter(rank=4, dropout=dropout), seed=5)


LORAS = {
    "llama": lambda dropout: make_lora(dropout=dropout),
    "llama-rank-1": lambda dropout: make_lora(dropout=dropout, rank=1),
    "llama-head": lambda dropout: make_lora(dropout=dropout, targets=("q_proj", "lm_head")),
    "llama-bfloat16": bfloat16,
    "gpt2": gpt2,
}
