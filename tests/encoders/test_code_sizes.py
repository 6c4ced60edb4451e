"""What a plan says about sizes without torch is what the live objects have."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from conftest import tiny_overrides
from drencoder.encoders.code_sizes import (
    BITS_PER_VALUE,
    SMALL_RATIO,
    AdapterShape,
    auto_ratio,
    code_shape,
    input_shape,
    message_bytes,
    plain_lora_bytes,
    stage1_values,
)
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.registry import ENCODERS, build_encoder, declaration_of
from drencoder.encoders.request import EncoderRequest
from drencoder.encoders.wire import WireDtype, WireFormat
from drencoder.errors import EncoderError, ModelError
from drencoder.federated.query import moment_query
from drencoder.federated.query_encoders import MomentsEncoder
from drencoder.models.base_model import load_base
from drencoder.models.lora import LoraModel
from drencoder.models.place import ModelPlace
from drencoder.models.planned_layers import adapted_matrices, known_matrices
from drencoder.published.architectures import ARCHITECTURES
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import survey
from encoder_toys import pack

DTYPES = list(BITS_PER_VALUE)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "o_proj", "down_proj")])
def test_adapter_size_from_the_file_is_the_layouts(tiny_folder: Path, targets: tuple[str, ...]) -> None:
    matrices = adapted_matrices(ModelPlace(tiny_folder), targets)
    assert matrices is not None
    lora = LoraModel(load_base(config.Model(source=str(tiny_folder))), config.Adapter(rank=3, targets=targets), seed=0)
    assert 3 * sum(sum(shape) for shape in matrices) == lora.layout.size
    assert 2 * len(matrices) == len(lora.layout.segments)


@pytest.mark.parametrize("name", ["identity", "random", *ARCHITECTURES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_and_message_size(tiny_folder: Path, name: str, dtype: str) -> None:
    lora = LoraModel(load_base(config.Model(source=str(tiny_folder))), config.Adapter(rank=2), seed=0)
    segments = lora.layout.segments
    matrices = [(pair.B.shape[0], pair.A.shape[1]) for pair in lora.layout.pairs(lora.initial_D)]
    code_size = declaration_of(name).code_size(AdapterShape(matrices, 2), 4.0)
    request = EncoderRequest(segments, code_size, GaussianPrior.isotropic(segments))
    encoder = build_encoder(name, request)
    assert encoder.code_size == code_size
    assert message_bytes(encoder.code_size, dtype) == WireFormat.of(encoder, dtype).message_size  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_message_bytes_are_the_bytes_of_a_message(dtype: WireDtype) -> None:
    for size in range(1, 18):
        wire_format = WireFormat(size, 1, dtype)
        assert (
            message_bytes(size, dtype)
            == wire_format.message_size
            == len(pack(torch.ones(size).to(torch.int64 if wire_format.integers else torch.float32), wire_format, 0))
        )


def test_plain_lora_is_counted_at_sixteen_bits_or_more() -> None:
    assert [plain_lora_bytes(2.5, 100, dtype) for dtype in DTYPES] == [1000] + 3 * [500] + [500, 750, 1000]


def test_survey_agrees_with_what_is_sent(tiny_folder: Path) -> None:
    recipe = load_recipe("quickstart", tiny_overrides(tiny_folder))
    overview = survey(recipe)
    lora = LoraModel(load_base(recipe.model), recipe.adapter, seed=0)
    assert overview.adapter_size == lora.layout.size
    wire = moment_query(lora.layout.segments, recipe).spec.wire
    stage1 = replace(wire, dtype="integer16").message_size  # with noise of their own, as local trust sends them
    assert overview.stage1_bytes == 6 * stage1
    assert overview.message_bytes is not None
    assert overview.total_bytes == 4 * 6 * overview.message_bytes + 6 * stage1
    assert overview.plain_lora_bytes == 4 * 6 * lora.layout.size * 4


def test_a_hub_model_that_is_not_here_is_planned_without_sizes() -> None:
    overview = survey(load_recipe("quickstart", ["model.source=org/model-7b"]))
    assert overview.adapter_size is None
    assert overview.privacy.noise_multiplier > 0


def test_what_is_no_model_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        survey(load_recipe("quickstart", [f"model.source={tmp_path}"]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        survey(load_recipe("quickstart", [f"model.source={tmp_path}"]))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        survey(load_recipe("quickstart", [f"model.source={tmp_path}"]))


def test_targets_that_name_nothing_are_one_sentence(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'qproj' names no linear layer of .*the nearest name is 'q_proj'"):
        survey(load_recipe("quickstart", [f"model.source={tiny_folder}", "adapter.targets=['qproj']"]))


def test_the_published_sizes() -> None:
    """CG-FedLLM (arXiv 2405.13746): 8,388,608 values for LLaMA-7B, r = 8 on q, k, v, o, and 131,072 code values."""
    matrices = known_matrices("huggyllama/llama-7b", ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert matrices is not None
    adapter = AdapterShape(matrices, 8)
    assert (len(matrices), adapter.update_size) == (128, 8_388_608)
    assert known_matrices("Qwen/Qwen1.5-7B", ("q_proj", "k_proj", "v_proj", "o_proj")) == matrices
    networks = dict.fromkeys(ARCHITECTURES, 131_072) | {"autoencoder-cnn1d": 262_144}
    sizes = {name: declaration_of(name).code_size(adapter, 64.0) for name in ENCODERS}
    ratio_sizes = dict.fromkeys(("random", "kronecker", "hybrid", "top-k", "power"), 131_072)
    assert sizes == ratio_sizes | networks | {
        "identity": 8_388_608, "ffa": 4_194_304, "core": 128 * 8 * 8
    }  # fmt: skip
    for shape_of in (input_shape, code_shape):
        with pytest.raises(
            EncoderError, match="no auto-encoder 'vgg'; choose one of autoencoder, autoencoder-published"
        ):
            shape_of("vgg", adapter.update_size)


@pytest.mark.parametrize(
    ("targets", "shapes"),
    [
        (("c_attn",), [[12288, 4096]] * 32),
        (("h.3.attn.c_proj", "h.3.mlp.c_proj"), [[4096, 4096], [4096, 11008]]),
        (("h.3.attn.c_proj", "h.31.attn.c_proj"), [[4096, 4096]] * 2),
        (("c_proj",), [[4096, 4096], [4096, 11008]] * 32),
        (("mlp.c_proj", "w1"), [[11008, 4096], [4096, 11008]] * 32),
        (("transformer.h.5.mlp.w2",), [[11008, 4096]]),
    ],
)
def test_targets_of_qwen_7b(targets: tuple[str, ...], shapes: list[list[int]]) -> None:
    assert known_matrices("Qwen/Qwen-7B", targets) == shapes
    # PEFT's own rule, on the names of one layer, finds as many.
    rule = LoraConfig(target_modules=list(targets))
    inner = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    names = [f"transformer.h.{layer}.{name}" for layer in range(32) for name in inner]
    assert sum(bool(check_target_module_exists(rule, name)) for name in names) == len(shapes)


def test_unknown_models_and_targets() -> None:
    assert known_matrices("org/model-7b", ("q_proj",)) is None
    for name in (
        "proj",
        "h.32.attn.c_proj",
    ):  # a part of a name, and a layer too many, are no names, beside one that is
        with pytest.raises(ModelError, match=rf"'{name}' names no linear layer"):
            known_matrices("Qwen/Qwen-7B", ("c_attn", name))
    with pytest.raises(ModelError, match=r"'q_proj' names no linear layer of 'Qwen/Qwen-7B'.*c_attn, c_proj, w1, w2"):
        known_matrices("Qwen/Qwen-7B", ("q_proj",))


def test_stage_1_values_are_what_its_query_asks(tiny_folder: Path) -> None:
    recipe = load_recipe("quickstart", tiny_overrides(tiny_folder))
    segments = LoraModel(load_base(recipe.model), recipe.adapter, seed=0).layout.segments
    for epochs in (1, 3):
        size = MomentsEncoder(segments, epochs).code_size
        assert stage1_values("moments", segments[-1].stop, len(segments) // 2, epochs) == size
    # FedCG's stage 1 against the statistics', LLaMA-7B, r = 8 on q, k, v, o, three epochs.
    assert stage1_values("gradients", 8_388_608, 128, 3) == 25_165_824
    assert stage1_values("moments", 8_388_608, 128, 3) == 1_536
    assert stage1_values("none", 8_388_608, 128, 3) == 0
    with pytest.raises(EncoderError, match="no stage 1 of source 'secret'"):
        stage1_values("secret", 1, 1, 1)


def test_the_plan_chooses_the_code_by_what_its_noise_lets_a_round_learn() -> None:
    assert auto_ratio(6400, 0.0) == auto_ratio(6400, 99.9) == 64.0
    assert auto_ratio(6400, 100.0) == auto_ratio(6400, float("inf")) == auto_ratio(6400, 100.0, "rotated4") == 2.0
    assert [auto_ratio(64_000, 999.9, dtype) for dtype in ("float32", "rotated4", "rotated1")] == [64.0, 10.0, 10.0]
    assert 64 * message_bytes(round(32_768 / SMALL_RATIO), "rotated4") < message_bytes(32_768, "float32")
    automatic = ["encoder.name=hybrid", "encoder.ratio=0", "privacy.trust=central"]
    few = survey(load_recipe("quickstart", [*automatic, "federation.sampling_rate=0.001"]))
    many = survey(load_recipe("quickstart", automatic))
    exact = survey(
        load_recipe("quickstart", [*automatic, "federation.sampling_rate=0.001", "encoder.wire_dtype=float32"])
    )
    for overview, ratio, words in (
        (few, 10, "noise dominates"),
        (exact, 64, "noise dominates"),
        (many, 2, "would limit the run"),
    ):
        assert overview.code_size == round((overview.adapter_size or 0) / ratio)
        assert overview.code_reason.startswith(f"1/{ratio}, since k* ")
        assert words in overview.code_reason
        assert "512" in overview.code_reason  # D / 64
    assert few.k_star < 512 <= many.k_star
    assert few.code_reason.endswith("A from public text, since k* < 512; in 4 bits a value")
    assert exact.code_reason.endswith("A from public text, since k* < 512")
    assert many.code_reason.endswith("A at random, since k* >= 512; in 4 bits a value")
    assert [one.message_bytes for one in (few, exact, many)] == [24 + 3277 // 2 + 1, 20 + 4 * 512, 24 + 16_384 // 2]
    said = [*automatic, "federation.sampling_rate=0.001", "adapter.start=peft", "encoder.ratio=1"]
    whole = survey(load_recipe("quickstart", said))  # B has half of the values, whatever the ratio
    assert (whole.code_size, whole.code_reason) == (16_384, "in 4 bits a value")
    assert survey(load_recipe("quickstart")).code_reason == ""


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ([], "rotated4"),
        (["privacy.trust=local"], "float32"),
        (["privacy.trust=secure-aggregation"], "float32"),
        (["privacy.trust=non-private"], "float32"),
        (["encoder.name=identity"], "float32"),
        (["privacy.trust=local", "encoder.wire_dtype=rotated2"], "rotated2"),
    ],
)
def test_four_bits_are_automatic_for_hybrid_with_a_trusted_server(said: list[str], dtype: str) -> None:
    recipe = load_recipe("quickstart", ["encoder.name=hybrid", "privacy.trust=central", *said])
    assert wire_dtype(recipe) == dtype
    assert survey(recipe).privacy.nonlinear_decoding == (dtype != "float32")
