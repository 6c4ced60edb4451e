"""A model that does not fit one place: shards, main memory, the disk. It computes what the whole model does, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_examples
from drencoder.data.tokenization import Example
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models.base_model import BaseModel, load_base
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.identity import digest_model
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from tiny_models import make_model


@pytest.fixture(params=["llama", "qwen2", "gpt2", "gpt_neox"])
def shards(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny model in many files; llama's head is tied to its embedding."""
    folder = make_model(request.param, tmp_path / "whole", tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, dtype: str = "float32") -> BaseModel:
    """The model whole (room None), or with so many bytes of main memory for its weights and the rest on the disk."""
    if room is None:
        return load_base(config.Model(source=str(folder), dtype=dtype))
    monkeypatch.setattr("drencoder.models.base_model.room_for_weights", lambda: {"cpu": room})
    return load_base(config.Model(source=str(folder), dtype=dtype, device="spread"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_the_disk_trains_as_the_whole_one(
    shards: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tmp_path: Path
) -> None:
    whole, spread = (load(shards, monkeypatch, room, dtype) for room in (None, 1000))
    assert spread.is_offloaded
    assert not whole.is_offloaded
    assert spread.device == whole.device
    assert digest_model(spread.model) == digest_model(whole.model)
    loras = [LoraModel(base, config.Adapter(rank=4, dropout=0.2), seed=5) for base in (whole, spread)]
    adapter_D = loras[0].initial_D + 0.05 * torch.randn(
        loras[0].layout.size, generator=torch.Generator().manual_seed(1)
    )
    clients = [random_examples(count, seed) for seed, count in enumerate((3, 3, 5))]
    for upload in ("gradient", "increment"):
        local = config.Local(upload=upload, batch_size=2, learning_rate=0.01)
        first, second = (cohort_updates(lora, adapter_D, clients, local, [1, 2, 3]) for lora in loras)
        assert first.any(dim=1).all()
        assert torch.equal(first, second)
    losses = [held_out_loss(lora, adapter_D, clients[0]).value for lora in loras]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for lora, name in zip(loras, ("whole", "spread"), strict=True):
        lora.save(adapter_D, tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "spread")]
    assert files[0] == files[1]


def test_layers_on_the_disk_are_not_kept_for_the_backward_pass(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama", tmp_path / "whole", tiny_folder)
    base = load(folder, monkeypatch, 1000)
    lora = LoraModel(base, config.Adapter(rank=4), seed=5)
    weight = base.model.get_decoder().layers[0].mlp.up_proj
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        cohort_updates(lora, lora.initial_D, [[Example((5, 6, 7, 8), 1)]], config.Local(), [1])
    assert kept
    # What stands between two layers, and the head: no matrix of a layer, whose size no activation has.
    assert weight.weight.numel() not in kept
    assert weight.weight.is_meta
