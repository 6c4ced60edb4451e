"""Tiny random models of many families, as folders that transformers loads like any other. Nothing is downloaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}

CAUSAL: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": _GPT | {"rotary_dim": 4},
    "cohere": _LLAMA,
    "deepseek_v3": _LLAMA
    | _EXPERTS
    | _LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "falcon_h1": _LLAMA | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon": _SIZES,
    "gemma": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8},
    "gemma3_text": _LLAMA | {"head_dim": 8},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_oss": _LLAMA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _SIZES | {"intermediate_size": 64},
    "granite": _LLAMA | {"logits_scaling": 2.0},
    "glm4": _LLAMA | {"head_dim": 8},
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"]},
    "llama": _LLAMA | {"tie_word_embeddings": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mistral": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "opt": _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": _LLAMA | {"head_dim": 8},
    "qwen3_moe": _LLAMA | _EXPERTS | {"head_dim": 8, "num_experts": 4},
    "recurrent_gemma": _LLAMA | {"head_dim": 8, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
}
"""model_type -> config of a causal language model."""

_TOWER = _SIZES | {"intermediate_size": 64}
_PICTURES = {"image_size": 16, "patch_size": 4}
NOT_CAUSAL: dict[str, Callable[[int], Any]] = {
    "bert": lambda size: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=size, **_TOWER)),
    "bert without a head": lambda size: transformers.BertModel(transformers.BertConfig(vocab_size=size, **_TOWER)),
    "t5": lambda size: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "vit": lambda size: transformers.ViTForImageClassification(transformers.ViTConfig(**_TOWER, **_PICTURES)),
    "clip": lambda size: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=_TOWER | {"vocab_size": size}, vision_config=_TOWER | _PICTURES)
    ),
    "llava": lambda size: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=_LLAMA | {"model_type": "llama", "vocab_size": size},
            vision_config=_TOWER | _PICTURES | {"model_type": "clip_vision_model"},
        )
    ),
}
"""Name -> what makes a model, from the number of tokens, that is no causal language model."""


def make_model(family: str, folder: Path, tokenizer: Path) -> Path:
    """A model of a family in `folder`, with the tokenizer of another folder."""
    known = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family in NOT_CAUSAL:
            model = NOT_CAUSAL[family](known)
        else:
            shape = {"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, vocab_size=known, **shape, **CAUSAL[family])
            )
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and gains are 0 and 1 at first, so that a mistake with them would not show
                parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder
