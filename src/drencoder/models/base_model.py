"""The base model: a frozen causal language model and its tokenizer, from the package, a folder or the hub.

This file and `lora.py` are the only ones that import transformers.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from drencoder.errors import DeviceError, ModelError
from drencoder.recipe import recipe as config

__all__ = ["BaseModel", "embedded_folder", "load_base", "resolve_device"]


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model and its tokenizer."""

    model: Any
    tokenizer: Any
    source: str

    def tokenize(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text: LLaMA's start token, say; nothing for many models."""
        plain, whole = self.tokenize("a"), self.tokenizer("a")["input_ids"]
        place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:place])

    @torch.inference_mode()
    def write(self, count: int, max_tokens: int, seed: int) -> list[str]:
        """`count` texts that the model writes by itself, token by token from its own distribution, at most `max_tokens` long.

        They begin with the start token and, so that they differ, one token of the vocabulary at random. Sampled on the CPU, so
        that the seed decides on every device (up to rounding).
        """
        generator = torch.Generator().manual_seed(seed)
        device = next(self.model.parameters()).device
        first = list(self.start_ids)
        special = torch.tensor(self.tokenizer.all_special_ids)
        ordinary = torch.arange(len(self.tokenizer))
        ordinary = ordinary[~torch.isin(ordinary, special)]
        chosen_N = ordinary[torch.randint(len(ordinary), (count,), generator=generator)]
        tokens_NL = torch.cat([torch.tensor([first] * count).long().view(count, -1), chosen_N[:, None]], 1).to(device)
        done_N, cache = torch.zeros(count, dtype=torch.bool), None
        while tokens_NL.shape[1] < max_tokens and not bool(done_N.all()):
            fresh_NL = tokens_NL if cache is None else tokens_NL[:, -1:]
            answer = self.model(input_ids=fresh_NL, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            share_NV = answer.logits[:, -1].float().cpu().softmax(dim=-1)
            next_N = torch.multinomial(share_NV, 1, generator=generator)[:, 0]
            next_N[done_N] = self.end_id
            done_N |= next_N == self.end_id
            tokens_NL = torch.cat([tokens_NL, next_N[:, None].to(device)], dim=1)
        return self.tokenizer.batch_decode(tokens_NL[:, len(first) :], skip_special_tokens=True)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model chooses from: the width of its logits."""
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", head.weight.shape[0]))  # a quantised weight has another shape

    @property
    def end_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad


def embedded_folder() -> Path:
    """The folder of the model that is shipped inside the package."""
    return Path(str(resources.files("drencoder") / "embedded"))


def resolve_device(name: str) -> torch.device:
    """`auto` -> a GPU when there is one.

    Raises:
      DeviceError: `cuda` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("model.device = 'cuda', but torch sees no GPU here: set model.device=cpu (or auto).")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_base(knobs: config.Model) -> BaseModel:
    """Loads the base model from the package, a local folder or the hub, frozen and in eval mode.

    Raises:
      DeviceError: the device is not there.
      ModelError: the folder or hub id has no causal language model, or its tokenizer has no end token.
    """
    device = resolve_device(knobs.device)
    source = str(embedded_folder()) if knobs.source == "embedded" else knobs.source
    hf_logging.disable_progress_bar()  # a bar for a model of two megabytes hides our own lines
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, knobs.dtype))
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.source = {knobs.source!r} cannot be loaded ({first_line}): give 'embedded', a local Hugging Face "
            "folder with config.json, weights and tokenizer, or a hub id that this machine can reach."
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {knobs.source!r} has no end-of-text token: set eos_token in its files.")
    model.requires_grad_(False)
    return BaseModel(model.eval().to(device), tokenizer, knobs.source)
