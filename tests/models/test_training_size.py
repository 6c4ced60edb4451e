"""Memory and time from a model's shapes: what a plan says before loading is what the loaded model gives."""

from pathlib import Path

import pytest
import torch

from drencoder.errors import ModelError
from drencoder.models import loaded_size
from drencoder.models.base_model import load_base
from drencoder.models.loaded_size import check_memory, measure_size
from drencoder.models.lora import LoraModel
from drencoder.models.place import ModelPlace, locate
from drencoder.models.planned_layers import planned_size
from drencoder.models.training_size import ModelSize, free_memory
from drencoder.recipe.recipe import load_recipe
from drencoder.recipe.sections import Adapter, Model
from drencoder.runs.plan_overview import survey
from tiny_models import make_model

LLAMA_8B = ModelSize.of(8_030_000_000, [(4096, 4096)] * 128 + [(14336, 4096)] * 96, 128_256)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi3", "qwen2"])
def test_the_heads_of_the_files_tell_the_size_of_the_loaded_model(
    family: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = make_model(family, tmp_path, tiny_folder)
    planned, loaded = (
        planned_size(locate(Model(source=str(folder)))),
        measure_size(load_base(Model(source=str(folder))).model),
    )
    assert planned is not None
    assert (planned.num_linear, planned.linear_values, planned.linear_outputs) == (
        loaded.num_linear,
        loaded.linear_values,
        loaded.linear_outputs,
    )
    assert planned.values == pytest.approx(loaded.values, rel=0.2)  # a file may leave out a head that is the embedding
    assert planned.vocabulary == loaded.vocabulary


def test_the_size_of_a_model_that_is_elsewhere_is_not_known() -> None:
    assert planned_size(ModelPlace(None, "org/other")) is None


def test_small_models_train_many_clients_together_and_large_ones_one() -> None:
    embedded = planned_size(locate(Model()))
    assert embedded is not None
    assert 1000 < embedded.busy_tokens < 10_000
    assert LLAMA_8B.busy_tokens < 8


def test_memory_grows_with_tokens_and_type() -> None:
    assert LLAMA_8B.weight_bytes("float32") == 4 * 8_030_000_000
    assert LLAMA_8B.weight_bytes("bfloat16") == 2 * 8_030_000_000
    more = LLAMA_8B.training_bytes(100, "nf4") - LLAMA_8B.training_bytes(0, "nf4")
    assert more == 100 * LLAMA_8B.token_bytes
    assert LLAMA_8B.fit_tokens(2 * 100 * LLAMA_8B.token_bytes) == 100


def test_little_memory_makes_small_batches(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(Model(source=str(tiny_folder)))
    size = measure_size(base.model)
    monkeypatch.setattr(loaded_size, "free_memory", lambda: 2 * 50 * size.token_bytes)
    lora = LoraModel(base, Adapter(rank=2), seed=0)
    assert lora.batch_tokens == lora.fit_tokens == 50
    assert (
        LoraModel(load_base(Model(source=str(tiny_folder))), Adapter(rank=2), seed=0, batch_tokens=77).batch_tokens
        == 77
    )


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_size, "free_memory", lambda: 10_000_000_000)
    check_memory(9_999_999_999, torch.device("cpu"))
    check_memory(None, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"weights alone take 10\.0 GB and 10\.0 GB of memory are free"):
        check_memory(10_000_000_001, torch.device("cpu"))


def test_free_memory_is_a_part_of_what_the_machine_has() -> None:
    free = free_memory()
    assert free is None or 0 <= free < 1 << 50


def test_the_plan_says_how_clients_train() -> None:
    assert LLAMA_8B.way_to_train().startswith("clients one by one: 2 tokens")
    assert "up to 4,096 tokens a pass, as speed.tokens says" in LLAMA_8B.way_to_train(4096)
    overview = survey(load_recipe("quickstart", ["speed.tokens=0"]))
    assert "clients together, up to 2," in overview.training_way
    assert "which keep a core busy" in overview.to_dict()["training_way"]
    assert survey(load_recipe("quickstart", ["model.device=cuda"])).training_way == ""
