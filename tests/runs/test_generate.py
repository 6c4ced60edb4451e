"""A finished run answers: the adapter is on, the prompt is that of the clients' records, and what cannot be asked is said."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_overrides
from drencoder.data.prompts_template import render
from drencoder.errors import ArtifactError, DataError, DeviceError, ModelError
from drencoder.models.base_model import load_base
from drencoder.recipe.recipe import load_recipe
from drencoder.recipe.sections import Model
from drencoder.runs import run as experiment
from drencoder.runs.generate import generate
from tiny_models import make_model


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    recipe = load_recipe(
        "quickstart", [*tiny_overrides(tiny_folder), "privacy.trust=non-private", "server.learning_rate=300"]
    )
    experiment.run(recipe, folder / "run")
    return folder / "run"


def test_the_answer_is_plain_pefts(run: Path, tiny_folder: Path) -> None:
    answer = generate(run, "Say A", max_tokens=12)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    prompt, _ = render({"instruction": "Say A", "response": ""})
    asked = tokenizer(prompt, return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    before = base.generate(input_ids=asked, **options)[0, asked.shape[1] :]
    adapted = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    after = adapted.generate(input_ids=asked, **options)[0, asked.shape[1] :]
    assert answer.text == tokenizer.decode(after, skip_special_tokens=True).strip()
    assert before.tolist() != after.tolist()  # so the adapter was on
    assert answer.prompt_tokens == asked.shape[1]
    assert answer.tokens == len(after) - answer.ended


def test_draws_depend_on_the_seed_alone(run: Path) -> None:
    answers = [generate(run, "Say A", max_tokens=12, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_long_answer_stops_at_the_models_positions(run: Path) -> None:
    answer = generate(run, "Say A", max_tokens=10_000)
    assert answer.ended or answer.prompt_tokens + answer.tokens == 128
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens and the model 128 positions"):
        generate(run, "A" * 300)


def test_what_cannot_be_asked_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to ask"):
        generate(run, "  ")
    with pytest.raises(ArtifactError, match="not a run folder"):
        generate(tmp_path, "Say A")
    (tmp_path / "recipe.resolved.toml").write_text((run / "recipe.resolved.toml").read_text())
    with pytest.raises(ArtifactError, match="no adapter yet"):
        generate(tmp_path, "Say A")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no GPU"):
            generate(run, "Say A", device="cuda")


@pytest.mark.parametrize("family", ["gpt2", "mamba", "opt", "qwen2_moe"])
def test_a_family_goes_on_with_a_text_as_transformers_does(tiny_folder: Path, tmp_path: Path, family: str) -> None:
    """With and without a memory of keys and values."""
    base = load_base(Model(source=str(make_model(family, tmp_path, tiny_folder))))
    asked = torch.tensor([[20, 30, 40, 50], [60, 61, 62, 63]])
    ours = base.complete(asked, 10)
    for row, text in zip(ours, asked, strict=True):
        plain = base.model.generate(
            input_ids=text[None], max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=1
        )
        assert row[: plain.shape[1]].tolist() == plain[0].tolist()
        assert set(row[plain.shape[1] :].tolist()) <= {base.end_id}
