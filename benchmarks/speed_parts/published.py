"""The published setting as a run: Dolly over 100 clients by Dirichlet(0.5), 5 a round, 20 rounds, rank 8, on a model of a given shape.

The setting is CG-FedLLM's (https://arxiv.org/abs/2405.13746), as the recipe `paper/llama-7b-dolly` has it. Weights are random, since
the time does not depend on them; the encoder is the product's default in place of the published auto-encoder.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from speed_parts.growth import run_alone
from speed_parts.machine import describe_machine

# hidden, intermediate, layers, heads
SHAPES = {"small": (64, 176, 2, 2), "1b": (2048, 5632, 22, 32), "llama-7b": (4096, 11008, 32, 32)}
_KNOBS = [
    "federation.population=100", "federation.sampling_rate=0.05", "federation.rounds=20", "adapter.rank=8", "adapter.alpha=16",
    "adapter.dropout=0.05", "adapter.targets=['q_proj','k_proj','v_proj','o_proj']", "adapter.start=peft",
    "data.examples_per_client=150", "local.upload=increment", "local.batch_size=32", "local.learning_rate=1.5e-4",
    "server.optimizer=fedavg", "server.learning_rate=1.0", "encoder.name=random", "encoder.ratio=64", "privacy.epsilon=8",
    "privacy.delta=1e-5", "privacy.trust=central", "evaluation.every=0", "evaluation.benchmarks=[]", "evaluation.examples=8",
]  # fmt: skip


def published(
    shape: str,
    dolly: Path,
    tokenizer: Path | None,
    *,
    epochs: int,
    rounds: int,
    max_tokens: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Runs it and returns seconds, per round and in all; `rounds` below 20 is a part, and `whole_s` then an estimate."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values = _make_model(shape, folder / "model", tokenizer, max_tokens, dtype)
        knobs = [
            *_KNOBS, f"model.source={folder / 'model'}", f"model.dtype={dtype}", f"model.device={device}", f"data.source={dolly}",
            f"data.max_tokens={max_tokens}", f"local.epochs={epochs}", f"federation.rounds={rounds}",
        ]  # fmt: skip
        row = run_alone("rounds", *knobs)
    return {
        "shape": shape, "parameters": values, "epochs": epochs, "rounds": rounds, "max_tokens": max_tokens, "device": device,
        "dtype": dtype, **row, "whole_s": row["run_wall_s"] + (20 - rounds) * row["round_wall_s"], "machine": describe_machine(),
    }  # fmt: skip


def _make_model(shape: str, folder: Path, tokenizer: Path | None, max_tokens: int, dtype: str) -> int:
    """Writes a Llama of this shape with random weights; returns the number of its parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from drencoder.models.place import embedded_folder

    source = tokenizer or Path(str(embedded_folder()))
    hidden, intermediate, layers, heads = SHAPES[shape]
    words = AutoTokenizer.from_pretrained(str(source))
    config = LlamaConfig(
        vocab_size=32_000 if shape != "small" and len(words) <= 32_000 else len(words), hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_tokens,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    was = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # a 7B model in float32 would need 27 GB for a moment
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(was)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_dolly(path: Path) -> Path:
    """A file in Dolly's schema for a smoke run: 400 generated records in eight categories."""
    rows = [
        {
            "instruction": f"What is {number} plus {number % 7}?",
            "context": "",
            "response": f"It is {number + number % 7}.",
            "category": f"kind {number % 8}",
        }
        for number in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
