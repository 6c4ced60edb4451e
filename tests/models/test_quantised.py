"""Bases in 8 and 4 bits: what they compute on this machine, and what is said where they cannot.

The tests that compute skip where bitsandbytes is absent or has nothing for a CPU.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import random_examples
from drencoder.errors import DeviceError
from drencoder.evaluation.held_out import held_out_outcomes
from drencoder.models import quantised
from drencoder.models.adapted_layers import choose_layers, is_quantised
from drencoder.models.base_model import load_base
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.identity import digest_model
from drencoder.models.lora import LoraModel
from drencoder.models.quantised import keep_gradients, quantised_weights
from drencoder.models.training_size import ModelSize
from drencoder.recipe.recipe import Adapter, Local, Model, load_recipe
from drencoder.runs.plan_overview import survey
from tiny_models import make_model

CPU = torch.device("cpu")


@pytest.fixture
def bits() -> None:
    """Skips where bitsandbytes cannot compute on a CPU."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra quant) is not installed")
    if "cpu" not in getattr(library, "supported_torch_devices", ()):
        pytest.skip("this bitsandbytes has nothing for a CPU")


@pytest.fixture
def llama(tiny_folder: Path, tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model", tiny_folder)


def adapted(folder: Path, dtype: str) -> tuple[LoraModel, torch.Tensor]:
    lora = LoraModel(load_base(Model(source=str(folder), dtype=dtype, device="cpu"), 128), Adapter(rank=2), seed=0)
    drawn_D = torch.randn(lora.layout.size, generator=torch.Generator().manual_seed(3))
    return lora, lora.initial_D + 0.1 * drawn_D


def have_large_values(model: nn.Module) -> None:
    """In some texts a value above 6, whose whole column LLM.int8() then does not round, in any text of the pass."""
    for layer in model.modules():
        if type(layer).__name__ == "LlamaRMSNorm":
            layer.weight.data[0] *= 4


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize(("dtype", "least"), [("int8", 0.99), ("nf4", 0.6)])
def test_clients_train_one_by_one_and_an_evaluation_before_changes_nothing(
    llama: Path, dtype: str, least: float
) -> None:
    """Updates are near those of the whole weights, alone or in company, and gradients pass after the model was evaluated."""
    whole, adapter_D = adapted(llama, "float32")
    lora, _ = adapted(llama, dtype)
    assert {type(layer).__name__ for layer in lora.base.model.modules() if is_quantised(layer)} == {
        "Linear8bitLt" if dtype == "int8" else "Linear4bit"
    }
    assert not lora.can_share(64)
    clients = [random_examples(3, 1), random_examples(2, 2)]
    before = cohort_updates(lora, adapter_D, clients, Local(), [1, 2])
    held_out_outcomes(lora, adapter_D, random_examples(4, 9))
    assert torch.equal(cohort_updates(lora, adapter_D, clients, Local(), [1, 2]), before)
    assert torch.equal(cohort_updates(lora, adapter_D, clients[1:], Local(), [2])[0], before[1])
    assert before.dtype == torch.float32
    expected = cohort_updates(whole, adapter_D, clients, Local(), [1, 2])
    assert torch.cosine_similarity(before, expected).min() > least


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_saved_adapter_gives_plain_peft_the_loss_of_each_text(llama: Path, tmp_path: Path, dtype: str) -> None:
    lora, adapter_D = adapted(llama, dtype)
    examples = random_examples(6, 9)
    have_large_values(lora.base.model)
    if dtype == "int8":
        ours = held_out_outcomes(lora, adapter_D, examples)[0]
    else:
        ours = [held_out_outcomes(lora, adapter_D, [one])[0][0] for one in examples]
    lora.save(adapter_D, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(llama, **quantised_weights(dtype, CPU))
    have_large_values(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    if dtype == "nf4":  # in evaluation mode some processors' own product takes no layer as small as these
        for layer in filter(is_quantised, model.modules()):
            layer.train()
    for example, loss in zip(examples, ours, strict=True):
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([example.tokens])).logits[0].float().log_softmax(-1)
        places = range(example.prompt_length, len(example.tokens))
        assert -sum(float(chances[i - 1, example.tokens[i]]) for i in places) == pytest.approx(loss, abs=1e-4)


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_quantised_base_has_one_digest(llama: Path, dtype: str) -> None:
    digests = set()
    for evaluated in (False, True):
        base = load_base(Model(source=str(llama), dtype=dtype, device="cpu"), 128)
        if evaluated:
            with torch.no_grad():
                base.model(input_ids=torch.tensor([[1, 2, 3]]))
        digests.add(digest_model(base.model))
    assert len(digests) == 1
    assert digests != {digest_model(load_base(Model(source=str(llama), dtype="bfloat16"), 128).model)}


def test_without_the_package_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DeviceError, match=r"'nf4' needs the package bitsandbytes: pip install 'drencoder\[quant\]'"):
        quantised_weights("nf4", CPU)


def test_a_package_without_this_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _name: True)
    library = SimpleNamespace(supported_torch_devices={"cuda"}, __version__="0.1")
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"'int8' does not work on this machine's cpu, as bitsandbytes 0\.1 says"):
        quantised_weights("int8", CPU)
    assert quantised_weights("int8", torch.device("cuda"))["device_map"] == {"": torch.device("cuda")}
    assert quantised_weights("bfloat16", CPU) == {}


@pytest.mark.parametrize(("name", "evaluated"), [("Linear8bitLt", False), ("Linear4bit", True)])
def test_quantised_layers_are_in_the_mode_that_lets_gradients_through(name: str, evaluated: bool) -> None:
    """A stand-in with the class's name: bitsandbytes chooses its product by the layer's mode."""
    kind = type(name, (nn.Linear,), {})
    model = nn.Sequential(kind(2, 2), nn.Dropout()).eval()
    keep_gradients(model)
    model(torch.zeros(1, 2))
    assert model[0].training
    with torch.no_grad():
        model(torch.zeros(1, 2))
    assert model[0].training is evaluated
    assert not model[1].training


def test_only_linear_layers_take_fewer_bits() -> None:
    """A table of 1,000 words of 100 values stays in 16 bits."""
    size = ModelSize.of(1_100_000, [(1000, 1000)], 1000)
    assert size.weight_bytes("int8") == 1_000_000 + 2 * 100_000
    assert size.weight_bytes("nf4") == 550_000 + 2 * 100_000
    assert size.weight_bytes("float32") == 4 * 1_100_000


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_plan_says_what_fewer_bits_save_and_cost(dtype: str) -> None:
    way = survey(load_recipe("quickstart", [f"model.dtype={dtype}"])).training_way
    assert way.startswith(f"clients one by one: model.dtype = '{dtype}' saves 0.0 GB of weights beside float32")
    assert "slow on a CPU" in way


class Linear8bitLt(nn.Linear):
    """Stands in for the layer of bitsandbytes, in which the texts of a pass move each other's products a little."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = super().forward(input)
        return product + 0.05 * product.roll(1, dims=0)


def test_texts_that_move_each_other_a_little_leave_no_layer_without_an_adapter(llama: Path) -> None:
    model = load_base(Model(source=str(llama)), 128).model
    expected = choose_layers(model, ("auto",), "tiny")
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
            layer.__class__ = Linear8bitLt
    assert choose_layers(model, ("auto",), "tiny") == expected
    assert expected.names
    assert not expected.left_out
