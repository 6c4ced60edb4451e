"""What is wrong with a base model is told in one sentence when it is loaded, and code of others is never run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drencoder.errors import ModelError
from drencoder.models.base_model import BaseModel, load_base
from drencoder.recipe import recipe as config
from tiny_models import NOT_CAUSAL, make_model

MIDDLE = "model.layers.0.mlp.up_proj.weight"


def load(folder: Path, max_tokens: int = 0) -> None:
    load_base(config.Model(source=str(folder)), max_tokens)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["a word"])
    tokenizer.save_pretrained(folder)


def add_special_token(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|says|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def forget_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["eos_token"]
    path.write_text(json.dumps(facts))


def hide_code(folder: Path) -> None:
    """A model that transformers does not know, with code beside it that would leave a trace."""
    edit(folder / "config.json", model_type="strange", auto_map={"AutoConfig": "strange.Strange"})
    (folder / "strange.py").write_text(f"open({str(folder / 'trace')!r}, 'w')")


def hide_code_in_the_tokenizer(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Strange",
        auto_map={"AutoTokenizer": ["strange.Strange", None]},
    )
    (folder / "strange.py").write_text(f"open({str(folder / 'trace')!r}, 'w')")


class LeavesTrace:
    """Unpickled, this would make a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.folder / "trace"), "w")


def hide_code_in_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": LeavesTrace(folder)}, folder / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer too large": (add_token, r"the tokenizer of .* has 268 tokens and the model's embedding table has 267 rows"),
    "token of the chat template": (lambda folder: add_special_token(folder, "<|says|>{{ messages[0].content }}"), "has 268 tokens"),
    "no end token": (forget_end, "no end-of-text token"),
    "no tokenizer": (lambda folder: [(folder / f"tokenizer{end}.json").unlink() for end in ("", "_config")], "its tokenizer cannot be loaded"),
    "a weight is missing": (lambda folder: change_weights(folder, lambda w: w.pop(MIDDLE)), f"lacks {MIDDLE}, so that random"),
    "weights of fewer layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=2), r"lacks model\.layers\.1\..* and 8 more"),
    "another shape": (lambda folder: edit(folder / "config.json", intermediate_size=40), r"another shape than the config says of model\.layers\.0"),
    "not finite": (lambda folder: change_weights(folder, lambda w: w[MIDDLE].fill_(float("nan"))), "numbers that are not finite"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]), "its model cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "its model cannot be loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "its config cannot be loaded"),
    "unknown kind": (lambda folder: edit(folder / "config.json", model_type="strange"), "the model_type 'strange'"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "code": (hide_code, "code of its own, which drencoder never runs"),
    "code in the tokenizer": (hide_code_in_the_tokenizer, "code of its own, which drencoder never runs"),
    "code in the weights": (hide_code_in_the_weights, "which could be code and is never run"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence(tiny_folder: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    load(folder)
    spoil, sentence = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=sentence) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "trace").exists()


KINDS = {
    "bert": "reads in both directions",
    "bert without a head": "is not causal: what it says of a token depends on the tokens after it",
    "t5": "an encoder-decoder",
    "vit": "not a language model",
    "clip": "images or sound",
    "llava": "images or sound",
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_another_kind_of_model_is_one_sentence(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match=f"{KINDS[kind]}.*choose a decoder-only language model"):
        load(make_model(kind, tmp_path, tiny_folder))


def test_a_model_whose_own_forward_pass_fails_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    """Heads of one size for queries and of another for rotary positions, as a config of a hand-made DeepSeek may have."""
    sizes = {
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "head_dim": 4,
    }
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
    }
    known = len(AutoTokenizer.from_pretrained(tiny_folder))
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    made = AutoConfig.for_model("deepseek_v3", vocab_size=known, **shape, **sizes, **experts)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    with pytest.raises(
        ModelError, match=r"cannot read eight tokens \(RuntimeError: The size of tensor .*try it in transformers alone"
    ):
        load(tmp_path)


def test_positions_are_a_bound_where_they_are_a_table(tiny_folder: Path, tmp_path: Path) -> None:
    for family in ("gpt2", "opt"):
        folder = make_model(family, tmp_path / family, tiny_folder)
        load(folder, 128)
        with pytest.raises(ModelError, match=r"128 positions and data\.max_tokens = 129: set data\.max_tokens = 128"):
            load(folder, 129)
    load(tiny_folder, 4 * 128)  # rotary positions have no end


def test_a_special_token_that_no_text_has_may_stand_outside_of_the_table(tiny_folder: Path, tmp_path: Path) -> None:
    """Qwen2's tokenizer class adds one by itself."""
    shutil.copytree(tiny_folder, tmp_path / "llama")
    add_special_token(tmp_path / "llama", "{{ messages[0].content }}")
    load(tmp_path / "llama")
    folder = make_model("qwen2", tmp_path / "qwen2", tiny_folder)
    base = load_base(config.Model(source=str(folder)))
    assert len(base.tokenizer) > base.model.get_input_embeddings().num_embeddings


def test_a_licence_is_read_from_the_models_own_card(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for card, licence in {
        "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model": "apache-2.0",
        "---\r\nlanguage: en\r\nlicense: 'mit'\r\n---\r\n": "mit",
        "---\nlicense: |\n  many lines\n---\n": "unknown",
        "license: mit": "unknown",
        "": "unknown",
    }.items():
        (folder / "README.md").write_text(card)
        assert load_base(config.Model(source=str(folder))).licence == licence
    assert load_base(config.Model()).licence == "apache-2.0"


SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = SCALED | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("family", "changes", "bound"),
    [
        ("llama", {"max_position_embeddings": 48, "rope_parameters": SCALED | {"rope_type": "dynamic"}}, 48),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}, 32),
        ("gemma3_text", {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), LONG)}, 32),
        ("llama", {"rope_parameters": SCALED | {"rope_type": "yarn"}}, 0),
        ("llama", {"rope_parameters": SCALED | {"rope_type": "linear"}}, 0),
    ],
)
def test_positions_that_are_scaled_by_a_texts_length_are_a_bound(
    tiny_folder: Path, tmp_path: Path, family: str, changes: dict[str, Any], bound: int
) -> None:
    """Beyond it a client's text is read otherwise beside a longer one of another client."""
    folder = make_model(family, tmp_path / "model", tiny_folder)
    edit(folder / "config.json", **changes)
    load(folder, bound or 256)
    if bound:
        with pytest.raises(ModelError, match=rf"more than {bound} .*set data\.max_tokens = {bound} or less"):
            load(folder, bound + 1)
        assert load_base(config.Model(source=str(folder))).positions == bound


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_weights_that_are_quantised_already_are_one_sentence(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    facts = {"quant_method": method, "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "format": "x"}
    edit(folder / "config.json", quantization_config=facts | {"config_groups": {}, "desc_act": False})
    with pytest.raises(ModelError, match=r"is quantised already.*give the model's own weights"):
        load(folder)


def test_a_token_that_no_word_has_is_left_out_of_a_text() -> None:
    """A table of embeddings may have more rows than the tokenizer has tokens; tokenizers without a fast version fail at such rows."""

    class Three:
        def __len__(self) -> int:
            return 3

        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return " ".join(["zero", "one", "two"][token] for token in tokens)

    assert BaseModel(None, Three(), "tiny").words_of([2, 7, 0, 3]) == "two zero"
