"""Which base model and tokenizer a machine computes with, by their contents: names and paths say nothing.

A federation's machines have files of their own. If one of them has another base model, its updates are of another function and
spoil everybody's adapter without an error. So server and sites compare these digests before a site answers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, final

# Where a model came from and how it is run: not what it computes.
_FREE_CONFIG = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_PROBE = "The answer is 42.\n\tÜber naïve 你好 🙂  end"


@final
@dataclass(frozen=True)
class BaseDigests:
    """SHA-256 of a base model and of its tokenizer, in hex."""

    model: str
    tokenizer: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "BaseDigests":
        """Of a model as it was loaded: before an adapter is put into it, which renames its tensors."""
        return cls(digest_model(model), digest_tokenizer(tokenizer))

    def to_dict(self) -> dict[str, str]:
        """As the heads of messages have it."""
        return asdict(self)


def digest_model(model: Any) -> str:
    """SHA-256 in hex over all tensors (names, types, shapes, bytes; shared ones once) and the configuration's own values.

    It depends neither on how the weights are spread over files nor on the device. It takes about three seconds a gigabyte on one core.
    """
    from torch import uint8

    digest = hashlib.sha256(_canonical(_plain(model.config.to_diff_dict())))
    seen: dict[tuple[int | str, tuple[int, ...]], str] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in sorted(model.state_dict().items()):
        place = (tied.get(name, name) if tensor.is_meta else tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            digest.update(f"{name} is {seen[place]}".encode())
            continue
        seen[place] = name
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            tensor = _fetched(model, name).to(tensor.dtype)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _fetched(model: Any, name: str) -> Any:
    """A tensor of a layer that is in main memory or on the disk until it is computed."""
    layer, _, part = name.rpartition(".")
    return model.get_submodule(layer)._hf_hook.weights_map[part]


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 in hex over what turns text into tokens: the whole tokenizer, its special tokens, its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(parts, dict):  # how long a batch may be belongs to a call, not to the tokenizer
        parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
    special = [str(tokenizer.bos_token), str(tokenizer.eos_token), str(tokenizer.pad_token)]
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(_canonical([parts, special, template, tokenizer(_PROBE)["input_ids"]])).hexdigest()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what names it; nested ones (of vision, of text) likewise."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _FREE_CONFIG and not key.startswith("_")
    }


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
