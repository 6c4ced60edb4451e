"""Any causal family: its layers are found, clients stay apart, and plain peft and transformers give the loss that we report."""

import json
from pathlib import Path

import pytest
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TABLE

from conftest import random_examples
from drencoder.data.tokenization import Example
from drencoder.errors import ModelError
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models.base_model import load_base
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.models.place import ModelPlace
from drencoder.models.planned_layers import adapted_matrices
from drencoder.models.targets import FAMILY_TARGETS
from drencoder.recipe import recipe as config
from peft_reference import plain_loss
from tiny_models import CAUSAL, make_model

_QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
AUTO: dict[str, set[str]] = {
    **dict.fromkeys(CAUSAL, _QKVO),
    **{family: {"query_key_value"} for family in ("bloom", "falcon", "gpt_neox")},
    **{family: {"c_attn"} for family in ("gpt2", "gpt_bigcode")},
    **{family: {"q_proj", "k_proj", "v_proj", "out_proj"} for family in ("gpt_neo", "gptj", "lfm2", "opt")},
    "codegen": {"qkv_proj"},
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    "mamba": {"in_proj", "x_proj"},
    "mpt": {"Wqkv"},
    "phi": {"q_proj", "k_proj", "v_proj", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}
ALL_LINEAR = {
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {*_QKVO, "gate_proj", "up_proj", "down_proj"},
    "mixtral": _QKVO,
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
    "qwen2_moe": {*_QKVO, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"},
}
CASES = [*(("auto", family) for family in AUTO), *(("all-linear", family) for family in ALL_LINEAR)]


def alike(examples: list[Example]) -> list[Example]:
    """Other text of the same lengths, so that two clients share a batch wherever clients may."""
    return [Example(tuple((token + 1) % 97 for token in one.tokens), one.prompt_length) for one in examples]


@pytest.mark.parametrize(("rule", "family"), CASES)
def test_a_family_trains_and_its_adapter_is_plain_pefts(
    tiny_folder: Path, tmp_path: Path, rule: str, family: str
) -> None:
    folder = make_model(family, tmp_path / "model", tiny_folder)
    base = load_base(config.Model(source=str(folder)), 128)
    lora = LoraModel(base, config.Adapter(rank=2, targets=(rule,)), seed=0)
    layers = {segment.name.split(".lora_")[0].rpartition(".")[2] for segment in lora.layout.segments}
    assert layers == (AUTO if rule == "auto" else ALL_LINEAR)[family]
    planned = adapted_matrices(ModelPlace(folder), (rule,))
    shapes = [[pair.B.shape[0], pair.A.shape[1]] for pair in lora.layout.pairs(lora.initial_D)]
    # Which of the layers of a mixture or of Mamba can have an adapter shows when the model is there.
    unsure = family == "falcon_h1" or (family in ("deepseek_v3", "mamba", "mixtral", "qwen2_moe") and layers != _QKVO)
    assert planned is None if unsure else True
    assert planned is None or sorted(planned) == sorted(shapes)

    adapter_D = lora.initial_D + 0.1 * torch.randn(lora.layout.size, generator=torch.Generator().manual_seed(3))
    clients = [random_examples(3, 1), alike(random_examples(3, 1)), random_examples(2, 2)]
    together = cohort_updates(lora, adapter_D, clients, config.Local(), [1, 2, 3])
    assert together.isfinite().all()
    assert together.any(dim=1).all()
    for client, update_D in zip(clients, together, strict=True):
        assert torch.equal(cohort_updates(lora, adapter_D, [client], config.Local(), [1])[0], update_D)

    held_out = random_examples(4, 9)
    lora.save(adapter_D, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(saved["target_modules"])  # the same bytes in every process
    reported = held_out_loss(lora, adapter_D, held_out).value
    assert reported == pytest.approx(plain_loss(folder, tmp_path / "adapter", held_out), abs=1e-4)
    assert abs(reported - held_out_loss(lora, lora.initial_D, held_out).value) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "mamba"])
def test_layers_that_cannot_have_an_adapter_are_left_out_and_named(
    tiny_folder: Path, tmp_path: Path, family: str
) -> None:
    base = load_base(config.Model(source=str(make_model(family, tmp_path, tiny_folder))))
    lora = LoraModel(base, config.Adapter(rank=2, targets=("all-linear",)), seed=0)
    assert {name.rpartition(".")[2] for name in lora.left_out} == (
        {"dt_proj", "out_proj"} if family == "mamba" else {"experts"}
    )
    assert not lora.can_share(16)


@pytest.mark.parametrize(
    ("family", "targets", "sentence"),
    [
        ("phi3", ("q_proj", "o_proj"), "'q_proj' names no linear layer .*nearest name is 'qkv_proj'.*o_proj, qkv_proj, gate_up_proj"),
        ("opt", ("q_proj", "o_proj"), "'o_proj' names no linear layer .*nearest name is .*out_proj.*fc1, fc2"),
        ("llama", ("q_proj", "layers.7.self_attn.v_proj"), "nearest name is 'model.layers.1.self_attn.v_proj'"),
        ("llama", ("embed_tokens",), "'embed_tokens' names no linear layer"),
        ("mamba", ("dt_proj",), "does not get every token of every text once"),
        ("mamba", ("in_proj", "out_proj"), "'backbone.layers.0.mixer.out_proj', which PEFT does not adapt"),
    ],
)  # fmt: skip
def test_a_name_that_matches_nothing_is_an_error_with_the_models_own_names(
    tiny_folder: Path, tmp_path: Path, family: str, targets: tuple[str, ...], sentence: str
) -> None:
    base = load_base(config.Model(source=str(make_model(family, tmp_path, tiny_folder))))
    with pytest.raises(ModelError, match=sentence):
        LoraModel(base, config.Adapter(rank=2, targets=targets), seed=0)


def test_the_table_of_families_is_pefts() -> None:
    for family, targets in FAMILY_TARGETS.items():
        assert tuple(PEFT_TABLE[family]) == targets
    for family in CAUSAL:
        if family in PEFT_TABLE and family not in FAMILY_TARGETS:
            assert set(PEFT_TABLE[family]) == {"q_proj", "v_proj"}


def test_padding_goes_no_further_than_the_positions(tiny_folder: Path, tmp_path: Path) -> None:
    """GPT-2 has a table of positions: a text of 125 of 126 tokens is not padded to 128."""
    folder = make_model("gpt2", tmp_path, tiny_folder)
    base = load_base(config.Model(source=str(folder)))
    base.model.transformer.wpe.weight.data = base.model.transformer.wpe.weight.data[:126]
    base.model.config.n_positions = 126
    lora = LoraModel(base, config.Adapter(rank=2), seed=0)
    update_KD = cohort_updates(lora, lora.initial_D, [[Example((5,) * 125, 3)]], config.Local(), [0])
    assert update_KD.isfinite().all()
    assert update_KD.any()
