"""What a plan says about sizes without torch is what the live objects have."""

from pathlib import Path

import pytest

from conftest import tiny_overrides
from drencoder import config
from drencoder.config import load_recipe
from drencoder.encoders.autoencoder import AutoencoderOptions
from drencoder.encoders.registry import EncoderRequest, build_encoder
from drencoder.encoders.sizes import adapted_matrices, code_size, message_bytes
from drencoder.encoders.wire import WireFormat
from drencoder.errors import ModelError
from drencoder.model import LoraModel, load_base
from drencoder.overview import survey
from drencoder.prior import GaussianPrior
from drencoder.steps import moment_query


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "o_proj", "down_proj")])
def test_adapter_size_from_the_file_is_the_layouts(tiny_folder: Path, targets: tuple[str, ...]) -> None:
    matrices = adapted_matrices(tiny_folder, targets, ())
    lora = LoraModel(load_base(config.Model(source=str(tiny_folder))), config.Adapter(rank=3, targets=targets), seed=0)
    assert 3 * sum(sum(shape) for shape in matrices) == lora.layout.size
    assert 2 * len(matrices) == len(lora.layout.segments)


@pytest.mark.parametrize("name", ["identity", "random", "autoencoder"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_code_and_message_size(tiny_folder: Path, name: str, dtype: str) -> None:
    lora = LoraModel(load_base(config.Model(source=str(tiny_folder))), config.Adapter(rank=2), seed=0)
    segments, size = lora.layout.segments, lora.layout.size
    request = EncoderRequest(
        segments,
        code_size(name, size, 4.0),
        GaussianPrior.isotropic(segments),
        autoencoder=AutoencoderOptions(steps=1, samples=4, validation=4),
    )
    encoder = build_encoder(name, request)
    assert encoder.code_size == code_size(name, size, 4.0)
    assert message_bytes(encoder.code_size, dtype) == WireFormat.of(encoder, dtype).message_size  # type: ignore[arg-type]


def test_survey_agrees_with_what_is_sent(tiny_folder: Path) -> None:
    recipe = load_recipe(None, tiny_overrides(tiny_folder))
    overview = survey(recipe)
    lora = LoraModel(load_base(recipe.model), recipe.adapter, seed=0)
    assert overview.adapter_size == lora.layout.size
    stage1 = moment_query(lora.layout.segments, recipe.prior).wire.message_size
    assert overview.stage1_bytes == 6 * stage1
    assert overview.message_bytes is not None
    assert overview.total_bytes == 4 * 6 * overview.message_bytes + 6 * stage1
    assert overview.plain_lora_bytes == 4 * 6 * lora.layout.size * 4


def test_a_hub_model_that_is_not_here_is_planned_without_sizes() -> None:
    overview = survey(load_recipe(None, ["model.source=org/model-7b"]))
    assert overview.adapter_size is None
    assert overview.privacy.noise_multiplier > 0


def test_what_is_no_model_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        survey(load_recipe(None, [f"model.source={tmp_path}"]))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        survey(load_recipe(None, [f"model.source={tmp_path}"]))


def test_targets_that_name_nothing_are_one_sentence(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="names no matrix"):
        survey(load_recipe(None, [f"model.source={tiny_folder}", "adapter.targets=['qproj']"]))
