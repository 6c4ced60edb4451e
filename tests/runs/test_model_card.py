"""The model card says what the certificate says, and an edited one is found, whatever hashes are mended."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from conftest import tiny_overrides
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models.base_model import load_base
from drencoder.models.lora import LoraModel
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.assess import read_adapter
from drencoder.runs.build import build
from drencoder.runs.model_card import write_model_card
from drencoder.runs.run_folder import RunFolder
from peft_reference import plain_loss
from tampering import Forgery, reaccount, verdict
from tiny_models import make_model


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of GPT-2, whose layers are transposed, with the default encoder."""
    folder = tmp_path_factory.mktemp("card")
    model = make_model("gpt2", folder / "model", tiny_folder)
    overrides = [*tiny_overrides(model), "encoder.name=hybrid", "encoder.ratio=0", "privacy.trust=central"]
    experiment.run(load_recipe("quickstart", overrides), folder / "run")
    return folder / "run"


def card_of(run: Path) -> str:
    return RunFolder(run).model_card.read_text("utf-8")


def test_the_card_says_what_the_certificate_says(run: Path) -> None:
    certificate, card = json.loads((run / "certificate.json").read_bytes()), card_of(run)
    assert card == write_model_card(certificate)
    assert certificate["statement"] in card
    assert certificate["data"] in card
    assert 'license: "unknown"' in card
    assert "base_model:" not in card  # a folder has no hub id
    for name, row in certificate["observers"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        for relation in row["by_relation"].values():
            assert f"{float(relation['epsilon_pld']):.3f}" in line
    assert f"{certificate['results']['this run']['loss']['value']:.4f}" in card


def test_a_run_of_another_family_holds(run: Path) -> None:
    assert verdict(run) == ""
    assert reaccount(run) == 0


def test_the_adapter_folder_is_all_that_peft_needs(run: Path) -> None:
    recipe = load_recipe(run / "recipe.resolved.toml")
    base = load_base(recipe.model)
    assert AutoTokenizer.from_pretrained(run / "adapter").get_vocab() == base.tokenizer.get_vocab()
    assert AutoPeftModelForCausalLM.from_pretrained(run / "adapter") is not None
    held_out = build(recipe).held_out
    reported = json.loads((run / "certificate.json").read_bytes())["results"]["this run"]["loss"]["value"]
    assert reported == pytest.approx(plain_loss(Path(recipe.model.source), run / "adapter", held_out), abs=1e-4)
    lora = LoraModel(base, recipe.adapter, seed=recipe.seed)
    adapter_D = lora.layout.flatten(read_adapter(RunFolder(run)))
    assert reported == pytest.approx(held_out_loss(lora, adapter_D, held_out).value, abs=1e-5)


def promise_more(card: str) -> str:
    return card.replace("differential privacy", "perfect privacy")


def smaller_epsilon(card: str) -> str:
    return re.sub(r"\| clients \| [\d.]+", "| clients | 0.100", card)


def another_licence(card: str) -> str:
    return card.replace('license: "unknown"', 'license: "mit"')


def another_word(card: str) -> str:
    return card + "Approved by the hospital.\n"


@pytest.mark.parametrize("change", [promise_more, smaller_epsilon, another_licence, another_word])
def test_an_edited_card_is_found_even_if_the_hashes_are_mended(run: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(run, tmp_path / "plain")
    RunFolder(tmp_path / "plain").model_card.write_text(change(card_of(run)), "utf-8")
    assert "README.md was changed" in verdict(tmp_path / "plain")
    assert reaccount(tmp_path / "plain") == 1
    forged = Forgery(run, tmp_path / "mended")
    forged.folder.model_card.write_text(change(card_of(run)), "utf-8")
    assert "model card is not the one that the certificate gives" in verdict(forged.mend())
    if change is promise_more:
        assert reaccount(forged.path) == 1


def test_a_card_that_is_gone_is_found(run: Path, tmp_path: Path) -> None:
    forged = Forgery(run, tmp_path / "run")
    forged.folder.model_card.unlink()
    assert "no model card" in verdict(forged.mend())
    assert reaccount(forged.path) == 1


def test_how_to_load_and_what_the_hub_reads(run: Path) -> None:
    certificate = json.loads((run / "certificate.json").read_bytes())

    def card(**values: Any) -> str:
        return write_model_card({**copy.deepcopy(certificate), **values})

    named = {"hub_id": "org/tiny", "revision": "0123abc", "licence": "mit", "dtype": "bfloat16"}
    hub = card(model="org/tiny", base=named)
    assert 'license: "mit"\nbase_model: "org/tiny"\n' in hub
    assert 'from_pretrained("org/tiny", revision="0123abc", dtype="bfloat16")' in hub
    gguf = card(model="models/small.gguf", base=certificate["base"])
    assert 'from_pretrained("models", gguf_file="small.gguf", dtype="float32")' in gguf
    assert 'from_pretrained(embedded_folder(), dtype="float32")' in card(model="embedded")
    for dtype, bits in {"int8": "load_in_8bit=True", "nf4": "load_in_4bit=True"}.items():
        quantised = card(model="org/tiny", base={**named, "dtype": dtype})
        assert f'dtype="bfloat16", quantization_config=BitsAndBytesConfig({bits}' in quantised
        assert "AutoTokenizer, BitsAndBytesConfig" in quantised


def test_the_cards_own_lines_give_the_loss_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would load the base in the checkpoint's type, and in 16 bits the loss is another."""
    recipe = load_recipe(run / "recipe.resolved.toml")
    config = Path(recipe.model.source) / "config.json"
    before = config.read_text()
    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    try:
        config.write_text(json.dumps(json.loads(before) | {"dtype": "bfloat16"}))
        exec(card_of(run).split("```python\n")[1].split("```")[0], names)
    finally:
        config.write_text(before)
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}


def test_what_was_not_measured_is_not_said(run: Path) -> None:
    certificate = json.loads((run / "certificate.json").read_bytes())
    assert "| model | held-out loss | mmlu | ceval |" in write_model_card(certificate)
    for row in certificate["results"].values():
        row["loss"] = None
        row["accuracy"].pop("ceval")
    assert "| model | mmlu |" in write_model_card(certificate)
    silent = write_model_card(
        {**certificate, "results": {}, "verdict": "Nothing was measured.", "evaluation_rests_on": ""}
    )
    assert "| model |" not in silent
    assert "## Results\n\nNothing was measured.\n\n## How to load it\n" in silent


@pytest.mark.parametrize("field", ["name", "data", "statement", "model"])
def test_no_text_of_a_recipe_leaves_its_line(run: Path, field: str) -> None:
    certificate = json.loads((run / "certificate.json").read_bytes())
    plain = write_model_card(certificate)
    certificate[field] = "x\n---\nlicense: mit\n| public | 0.0 | 0.0 |\n```\n<script>"
    card = write_model_card(certificate)
    assert len(card.splitlines()) == len(plain.splitlines())
    assert not any(line.startswith(("license: mit", "| public | 0.0")) for line in card.splitlines())
    assert "\n<script>" not in card
