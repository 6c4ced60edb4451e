"""Where a model lies: a folder, the hub's cache, a GGUF file; and what a path that leads nowhere says."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig

from conftest import random_examples
from drencoder.errors import ModelError
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models.base_model import load_base
from drencoder.models.gguf_header import read_gguf_header
from drencoder.models.lora import LoraModel
from drencoder.models.place import ModelPlace, locate
from drencoder.models.planned_layers import adapted_matrices
from drencoder.recipe.sections import Adapter, Model
from peft_reference import plain_loss
from tiny_models import make_model


def test_a_hub_id_is_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(Model(source="org/model-7b", revision="v1")) == ModelPlace(None, "org/model-7b", "v1")
    assert locate(Model(source="org/model-7b")).folder is None
    for source in (
        "./org/model",
        "/org/model",
        "~/model",
        "model.gguf",
        "no/such/model",
        "my models",
        r"C:\models\tiny",
    ):
        with pytest.raises(ModelError, match="is not there"):
            locate(Model(source=source))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.source is empty"):
        locate(Model(source=""))


def test_a_folder_of_the_hubs_cache_keeps_its_hub_id(tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny-1.5" / "snapshots" / "0123abc"
    make_model("llama", snapshot, tiny_folder)
    assert locate(Model(source=str(snapshot))) == ModelPlace(snapshot, "org/tiny-1.5", "0123abc")
    base = load_base(Model(source=str(snapshot)))
    assert (base.hub_id, base.revision) == ("org/tiny-1.5", "0123abc")
    lora = LoraModel(base, Adapter(rank=2), seed=0)
    lora.save(lora.initial_D, tmp_path / "adapter")
    saved = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (saved.base_model_name_or_path, saved.revision) == ("org/tiny-1.5", "0123abc")


def test_a_hub_model_in_the_cache_is_planned_with_its_sizes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "models--org--tiny"
    make_model("llama", store / "snapshots" / "0123abc", tiny_folder)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = locate(Model(source="org/tiny"))
    assert place.folder == store / "snapshots" / "0123abc"
    assert len(adapted_matrices(place, ("auto",)) or ()) == 8
    assert adapted_matrices(locate(Model(source="org/other")), ("auto",)) is None


def test_a_revision_belongs_to_a_hub_id(tiny_folder: Path) -> None:
    for source in ("embedded", str(tiny_folder)):
        with pytest.raises(ModelError, match=r"model\.revision = 'v1' belongs to a hub id"):
            locate(Model(source=source, revision="v1"))


def test_what_is_no_models_folder_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        locate(Model(source=str(tmp_path / "weights.bin")))
    with pytest.raises(ModelError, match="give the folder that has one"):
        locate(Model(source=str(tmp_path)))
    (tmp_path / "small.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"name the file, small\.gguf"):
        locate(Model(source=str(tmp_path)))


# --- GGUF ------------------------------------------------------------------------------------------------

_UINT32, _FLOAT32, _INT32, _STRING, _ARRAY = 4, 6, 5, 8, 9
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(file: Path, base: Any) -> None:
    """A Llama model with its byte-level tokenizer as a GGUF file in float32."""
    settings, tokenizer = base.model.config, base.tokenizer
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    def entry(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", kind) + value

    def array(kind: int, items: list[bytes]) -> bytes:
        return struct.pack("<IQ", kind, len(items)) + b"".join(items)

    numbers = {
        "context_length": settings.max_position_embeddings, "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers, "feed_forward_length": settings.intermediate_size,
        "attention.head_count": settings.num_attention_heads, "attention.head_count_kv": settings.num_key_value_heads,
        "vocab_size": len(vocabulary), "rope.dimension_count": settings.head_dim,
    }  # fmt: skip
    entries = [
        entry("general.architecture", _STRING, text("llama")),
        entry("general.license", _STRING, text("mit")),
        *(entry(f"llama.{key}", _UINT32, struct.pack("<I", value)) for key, value in numbers.items()),
        entry("llama.attention.layer_norm_rms_epsilon", _FLOAT32, struct.pack("<f", settings.rms_norm_eps)),
        entry("llama.rope.freq_base", _FLOAT32, struct.pack("<f", settings.rope_parameters["rope_theta"])),
        entry("tokenizer.ggml.model", _STRING, text("gpt2")),
        entry("tokenizer.ggml.tokens", _ARRAY, array(_STRING, [text(token) for token in vocabulary])),
        entry("tokenizer.ggml.token_type", _ARRAY, array(_INT32, [struct.pack("<i", 3 if t in special else 1) for t in vocabulary])),
        entry("tokenizer.ggml.merges", _ARRAY, array(_STRING, [text(" ".join(pair)) for pair in merges])),
        *(
            entry(f"tokenizer.ggml.{kind}_token_id", _UINT32, struct.pack("<I", number))
            for kind, number in (("eos", tokenizer.eos_token_id), ("bos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id))
        ),
    ]  # fmt: skip
    tensors, data = [], b""
    for name, tensor in base.model.state_dict().items():
        inner = name.removesuffix(".weight")
        if inner.startswith("model.layers."):
            layer, _, part = inner.removeprefix("model.layers.").partition(".")
            inner = f"blk.{layer}.{_NAMES[part]}"
        else:
            inner = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[inner]
        values = tensor.numpy()
        if inner.endswith(("attn_q", "attn_k")):  # llama.cpp has the two halves of a rotary pair side by side
            heads = settings.num_attention_heads if inner.endswith("q") else settings.num_key_value_heads
            half = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = values.reshape(half).swapaxes(1, 2).reshape(values.shape)
        size = struct.pack("<I", values.ndim) + b"".join(struct.pack("<Q", length) for length in values.shape[::-1])
        tensors.append(text(f"{inner}.weight") + size + struct.pack("<IQ", 0, len(data)))
        data += np.ascontiguousarray(values, np.float32).tobytes()
        data += b"\0" * (-len(data) % 32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    file.write_bytes(head + b"\0" * (-len(head) % 32) + data)


@pytest.fixture
def gguf(tiny_folder: Path, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", load_base(Model(source=str(tiny_folder))))
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("rule", ["auto", "all-linear"])
def test_the_head_of_a_gguf_file_tells_what_the_folder_tells(tiny_folder: Path, gguf: Path, rule: str) -> None:
    header = read_gguf_header(gguf)
    assert header.facts["llama.embedding_length"] == 24
    assert header.facts["general.license"] == "mit"
    assert header.shapes["token_embd.weight"] == [24, 267]
    of_file, of_folder = (adapted_matrices(place, (rule,)) for place in (ModelPlace(gguf), ModelPlace(tiny_folder)))
    assert of_file is not None
    assert of_folder is not None
    assert sorted(of_file) == sorted(of_folder)


@pytest.mark.parametrize("length", [0, 3, 23, 60, 5000])
def test_a_gguf_file_that_is_cut_is_one_sentence(gguf: Path, length: int) -> None:
    gguf.write_bytes(gguf.read_bytes()[:length])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        read_gguf_header(gguf)


def test_without_the_package_a_gguf_model_says_what_to_install(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_a, **_k: False)
    with pytest.raises(ModelError, match=r"pip install 'drencoder\[gguf\]'"):
        load_base(Model(source=str(gguf)))


def test_a_gguf_file_is_the_same_model_as_its_folder(tiny_folder: Path, gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder, file = load_base(Model(source=str(tiny_folder))), load_base(Model(source=str(gguf)))
    weights, others = folder.model.state_dict(), file.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for words in ("Answer: A", "any other text, with 3 lines\nand more"):
        assert folder.tokenizer(words)["input_ids"] == file.tokenizer(words)["input_ids"]
    assert (folder.end_id, folder.start_ids) == (file.end_id, file.start_ids)
    assert file.licence == "mit"
    of_folder, of_file = (LoraModel(base, Adapter(rank=2), seed=0) for base in (folder, file))
    assert of_folder.layout == of_file.layout
    adapter_D = of_folder.initial_D + 0.1
    of_file.save(adapter_D, tmp_path / "adapter")
    examples = random_examples(4, 1)
    plain = plain_loss(tiny_folder, tmp_path / "adapter", examples)
    assert held_out_loss(of_file, adapter_D, examples).value == pytest.approx(plain, abs=1e-4)
