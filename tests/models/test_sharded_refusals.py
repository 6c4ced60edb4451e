"""Models that cannot be split over several ranks: one sentence each, and no process is left."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from drencoder.errors import DeviceError, ModelError, RecipeError
from drencoder.models.base_model import load_base, resolve_device
from drencoder.models.sharded import open_lora
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe


def test_what_cannot_be_split_is_one_sentence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"cannot split weights of model.dtype = 'nf4'"):
        config.Model(device="shard", dtype="nf4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"sees one here: set model.device=cuda"):
        resolve_device("shard")
    monkeypatch.undo()
    recipe = Recipe(model=config.Model(source=str(tiny_folder), device="shard"))
    base = load_base(recipe.model)
    monkeypatch.setattr("drencoder.models.sharded.decoder_layers", lambda _model: [])
    with pytest.raises(ModelError, match="has none that transformers marks"):
        open_lora(base, recipe)


def test_a_model_that_another_rank_cannot_load_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is left of the ranks, so that the next model can be split."""
    base = load_base(config.Model(source=str(tiny_folder)))
    shutil.copytree(tiny_folder, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="half"):
        open_lora(base, Recipe(model=config.Model(source=str(tmp_path / "half"), device="shard")))
    assert not torch.distributed.is_initialized()
    assert not multiprocessing.active_children()
