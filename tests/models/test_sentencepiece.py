"""Tokenizers of sentencepiece, trained in a process of its own, beside tiny models: transformers converts them, and texts keep their tokens.

The tests skip where the package is absent or does not fit the protobuf beside it.
"""

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from drencoder.data.prompts_template import PlainTemplate
from drencoder.errors import ModelError
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models.base_model import load_base, open_tokenizer
from drencoder.models.lora import LoraModel
from drencoder.models.model_checks import explained
from drencoder.recipe.recipe import Adapter, Data, Model
from tiny_models import make_model

TEXTS = [
    "患者今天早上血压偏高，请复查。",
    "この薬は一日二回、食後に飲んでください。",
    "ضغط الدم لدى المريض مرتفع قليلاً.",
    "रोगी का रक्तचाप थोड़ा अधिक है।",
    "Bu ilacı günde iki kez yemekten sonra alın.",
    "Der Blutdruck des Patienten ist größer.",
    "def f(x):\n    return  x + 1  # add",
    "The answer is 42, and so it is: Answer",
]
RECORDS = [{"instruction": asked, "response": reply} for asked, reply in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)]
_TRAIN = """
import json, sys, sentencepiece
told, texts = json.load(sys.stdin)
sentencepiece.SentencePieceTrainer.train(
    input="corpus.txt", model_prefix="own", vocab_size=500, hard_vocab_limit=False, minloglevel=2, num_threads=1, **told
)
own = sentencepiece.SentencePieceProcessor(model_file="own.model")
print(json.dumps([own.get_piece_size(), own.encode(texts)]))
"""
RAW = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What sentencepiece is told, the family, and tokenizer_config.json.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama": (RAW | {"model_type": "bpe", "byte_fallback": True}, "llama", NAMED | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "gemma": (
        RAW | {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        "gemma",
        {"tokenizer_class": "GemmaTokenizer"},
    ),
    "t5": ({"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, "gpt_neox", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    try:
        import sentencepiece.sentencepiece_model_pb2  # noqa: F401
    except Exception as error:
        pytest.skip(f"sentencepiece does not fit the protobuf that is installed ({type(error).__name__})")


def folder_of(kind: str, tmp_path: Path, tiny_folder: Path) -> tuple[Path, list[list[int]]]:
    """A model's folder with nothing but sentencepiece's own file as a tokenizer, and the tokens that sentencepiece gives the records."""
    told, family, config = KINDS[kind]
    (tmp_path / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS * 20), "utf-8")
    asked = json.dumps([told, [PlainTemplate().render(record).text for record in RECORDS]])
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN], input=asked, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    size, tokens = json.loads(done.stdout)
    folder = make_model(family, tmp_path / "model", tiny_folder)
    for file in folder.glob("*token*"):
        file.unlink()
    name = "spiece.model" if kind == "t5" else "tokenizer.model"
    shutil.copy(tmp_path / "own.model", folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size + 8)
    model.save_pretrained(folder)
    return folder, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_the_tokens_of_sentencepiece_and_the_saved_adapter_gives_the_loss(
    kind: str, tmp_path: Path, tiny_folder: Path
) -> None:
    folder, expected = folder_of(kind, tmp_path, tiny_folder)
    base = load_base(Model(source=str(folder)), 120)
    tokenizer = open_tokenizer(base, Data(max_tokens=120))
    examples = tokenizer.examples(RECORDS)
    for record, example, tokens in zip(RECORDS, examples, expected, strict=True):
        assert list(example.tokens[len(base.start_ids) : -1]) == tokens
        assert tokenizer.prompt(record) == list(example.tokens[: example.prompt_length])
        reply = "".join(base.tokenizer.decode(example.tokens[example.prompt_length : -1]).split())
        assert reply == "".join(unicodedata.normalize("NFKC" if kind == "t5" else "NFC", record["response"]).split())
    marked = tokenizer.tokenise({"instruction": "Answer </s> <eos>", "response": "it is </s> 42 <s>"})
    assert marked.example is not None
    assert not {base.end_id, *base.start_ids} & set(marked.example.tokens[len(base.start_ids) : -1])

    lora = LoraModel(base, Adapter(rank=2), seed=0)
    adapter_D = lora.initial_D + 0.1 * torch.randn(lora.layout.size, generator=torch.Generator().manual_seed(3))
    lora.save(adapter_D, tmp_path / "adapter")
    tokenizer.save(tmp_path / "adapter")
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    total = 0.0
    for record, example in zip(RECORDS, examples, strict=True):
        said = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["response"]},
        ]
        tokens = saved.apply_chat_template(said, return_dict=False)
        assert list(tokens) == list(example.tokens)
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        total -= sum(float(chances[i - 1, tokens[i]]) for i in range(example.prompt_length, len(tokens)))
    assert held_out_loss(lora, adapter_D, examples).value == pytest.approx(
        total / sum(example.targets for example in examples), abs=1e-4
    )


@pytest.mark.parametrize("config", [{"tokenizer_class": "BaichuanTokenizer"}, {}])
def test_a_class_that_nobody_knows_is_refused_where_its_tokens_would_be_others(
    config: dict[str, str], tmp_path: Path, tiny_folder: Path
) -> None:
    folder, _ = folder_of("llama", tmp_path, tiny_folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED | config))
    with pytest.raises(
        ModelError, match=r"without the space that this puts before .* name the class in tokenizer_config\.json"
    ):
        load_base(Model(source=str(folder)))


def test_what_lacks_to_convert_a_tokenizer_is_one_sentence() -> None:
    words = "`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."
    with (
        pytest.raises(
            ModelError, match=r"no tokenizer\.json, and it cannot be converted here .*pip install sentencepiece"
        ),
        explained("folder", "tokenizer"),
    ):
        raise ValueError(words)
