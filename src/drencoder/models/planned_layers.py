"""Shapes of the matrices that will get a LoRA pair, from the heads of a model's files: a plan is answered without torch."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from drencoder.errors import ModelError
from drencoder.models.gguf_header import read_gguf_header
from drencoder.models.place import ModelPlace
from drencoder.models.targets import ALL_LINEAR, choose_targets, is_automatic, last_part
from drencoder.models.training_size import ModelSize
from drencoder.reading import parse_json, read_bytes, reason

_LLAMA_7B = {
    **{f"self_attn.{side}_proj": (4096, 4096) for side in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
_QWEN_7B = {
    "attn.c_attn": (12288, 4096),  # q, k and v in one
    "attn.c_proj": (4096, 4096),
    "mlp.w1": (11008, 4096),
    "mlp.w2": (11008, 4096),
    "mlp.c_proj": (4096, 11008),
}
# Model id -> family, where its layers are, how many, and each layer's matrices as (out, in).
_PUBLIC: Mapping[str, tuple[str, str, int, Mapping[str, tuple[int, int]]]] = MappingProxyType(
    {
        "huggyllama/llama-7b": ("llama", "model.layers", 32, _LLAMA_7B),
        "Qwen/Qwen-7B": ("qwen", "transformer.h", 32, _QWEN_7B),
        "Qwen/Qwen1.5-7B": ("qwen2", "model.layers", 32, _LLAMA_7B),
    }
)
_TRANSPOSED = ("gpt2", "openai-gpt")  # families whose files have (in, out)
_HEADS = {"lm_head", "embed_out", "output_projection"}
_TABLES = {
    "embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings", "tokens_embed", "positions_embed",
}  # fmt: skip
# Linear layers of which every token passes each once: of a family that has no others a file's head tells all.
_LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "dense",
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj",
    "dense_h_to_4h", "dense_4h_to_h", "project_in", "project_out",
}  # fmt: skip
_RECURRENT = {
    "mamba",
    "mixer",
}  # parts that may read a layer's weights and never call the layer: the loaded model shows which
_MOST_CONFIG = 1 << 24  # bytes
_GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "stablelm")
_GGUF_NAMES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def adapted_matrices(place: ModelPlace, targets: Sequence[str]) -> list[list[int]] | None:
    """Shapes (out, in) of the matrices that get a LoRA pair; None where the files' heads do not tell.

    No weights are read. A pair of rank r has r * (out + in) values.

    Raises:
      ModelError: the model's files cannot be read, or have no weights, or a target names no matrix.
    """
    if place.is_gguf and place.path is not None:
        return _of_gguf(place.path, targets)
    folder = place.folder
    if folder is None:
        return known_matrices(place.hub_id, targets)
    entries = _tensors(folder)
    if not entries:
        if place.path is None or any(folder.glob("*.bin")):
            return None
        raise ModelError(f"{folder} has no .safetensors file: give a local Hugging Face folder or 'embedded'.")
    return _adapted(_matrices(entries), targets, _family(folder), str(folder))


def planned_size(place: ModelPlace) -> ModelSize | None:
    """What memory and time depend on; None where no file's head tells. Raises ModelError as `adapted_matrices` does."""
    if place.is_gguf and place.path is not None:
        entries = {name: shape[::-1] for name, shape in read_gguf_header(place.path).shapes.items()}
        tables, transposed = {"token_embd", "position_embd", "output"}, False
    elif place.folder is not None:
        entries = _tensors(place.folder)
        tables, transposed = _TABLES | _HEADS, _family(place.folder) in _TRANSPOSED
    else:
        return None
    matrices = _matrices(entries)
    linear = [shape[:: -1 if transposed else 1] for name, shape in matrices.items() if last_part(name) not in tables]
    vocabulary = max((shape[0] for name, shape in matrices.items() if last_part(name) in tables), default=0)
    return ModelSize.of(sum(map(math.prod, entries.values())), linear, vocabulary) if linear else None


def _tensors(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a folder's .safetensors files, by name."""
    return {name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _header(file).items()}


def _matrices(entries: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {
        name.removesuffix(".weight"): shape
        for name, shape in entries.items()
        if len(shape) == 2 and name.endswith(".weight")
    }


def known_matrices(model_id: str, targets: Sequence[str]) -> list[list[int]] | None:
    """`adapted_matrices` of a public model that recipes name, without its files; None for any other model.

    The shapes are those of the models' published config.json. Only attention and MLP matrices are known.
    ModelError if a target names none of them.
    """
    if model_id not in _PUBLIC:
        return None
    family, prefix, num_layers, shapes = _PUBLIC[model_id]
    entries = {f"{prefix}.{layer}.{name}": shape for layer in range(num_layers) for name, shape in shapes.items()}
    return _adapted(entries, targets, family, model_id)


def _adapted(
    shapes: Mapping[str, Sequence[int]], targets: Sequence[str], family: str, model: str
) -> list[list[int]] | None:
    automatic = is_automatic(targets)
    names = [
        name for name in shapes if last_part(name) not in _TABLES and not (automatic and last_part(name) in _HEADS)
    ]
    chosen = choose_targets(targets, names, family, model)
    every = tuple(targets) == (ALL_LINEAR,) or (automatic and len(chosen) == len(names))
    unsure = any(not _RECURRENT.isdisjoint(name.split(".")) or ".experts." in name for name in chosen)
    if unsure or (every and not {last_part(name) for name in names} <= _LINEAR):
        return None
    transposed = {name for name in chosen if family in _TRANSPOSED and last_part(name) not in _HEADS}
    return [list(shapes[name])[:: -1 if name in transposed else 1] for name in chosen]


def _of_gguf(file: Path, targets: Sequence[str]) -> list[list[int]] | None:
    header = read_gguf_header(file)
    family = str(header.facts.get("general.architecture"))
    if family not in _GGUF_FAMILIES or any(len(shape) > 2 for shape in header.shapes.values()):
        return None
    shapes = {}
    for name, shape in header.shapes.items():
        block, _, inner = name.removesuffix(".weight").rpartition(".")
        if inner in _GGUF_NAMES and len(shape) == 2 and name.endswith(".weight"):
            part = "self_attn" if inner.startswith("attn") else "mlp"
            shapes[f"model.{block.replace('blk.', 'layers.')}.{part}.{_GGUF_NAMES[inner]}"] = shape[::-1]
    if not shapes or (not is_automatic(targets) and "lm_head" in targets):
        return None
    return _adapted(shapes, targets, family, str(file))


def _family(folder: Path) -> str:
    """`model_type` of the folder's config.json, or nothing; whether the config is readable shows when it is loaded."""
    try:
        return str(parse_json(read_bytes(folder / "config.json", _MOST_CONFIG)).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _header(file: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from the JSON at a safetensors file's beginning."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:  # the format's own limit
                raise ValueError("header too long")
            entries = parse_json(stream.read(length))
        shapes = {name: list(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        if not all(type(size) is int and 0 <= size < 1 << 40 for shape in shapes.values() for size in shape):
            raise ValueError("a shape of no tensor")
        return shapes
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({reason(error)}): copy the model again."
        ) from None
    except (LookupError, TypeError, AttributeError, struct.error):
        raise ModelError(f"{file} is not a readable safetensors file: copy the model again.") from None
