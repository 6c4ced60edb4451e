"""The base model: a frozen causal language model and its tokenizer, from the package, a folder, a GGUF file or the hub."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from drencoder.data.tokenization import RecordTokenizer
from drencoder.errors import DeviceError
from drencoder.models.adapted_layers import is_8_bit
from drencoder.models.loaded_size import room_for_weights
from drencoder.models.model_checks import check_config, check_model, check_tokenizer, explained, num_positions
from drencoder.models.place import UNKNOWN_LICENCE, ModelPlace, licence_in, licence_of, locate
from drencoder.models.quantised import keep_gradients, quantised_weights
from drencoder.recipe import recipe as config


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model and its tokenizer.

    `hub_id` and `revision` (a commit) are empty for a model that has none; `licence` is the tag that its files state.
    """

    model: Any
    tokenizer: Any
    source: str
    hub_id: str = ""
    revision: str = ""
    licence: str = UNKNOWN_LICENCE

    @property
    def device(self) -> torch.device:
        """Where clients' adapters and updates are: the first graphics card that has layers of a model that is spread."""
        places = getattr(self.model, "hf_device_map", {}).values()
        cards = [torch.device(place) for place in places if place not in ("cpu", "disk")]
        return cards[0] if cards else torch.device("cpu") if places else next(self.model.parameters()).device

    @property
    def is_offloaded(self) -> bool:
        """Whether layers come from main memory or from the disk whenever they are computed."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @cached_property
    def mixes_texts(self) -> bool:
        """Whether texts that share a pass move each other's logits: LLM.int8() does not round the columns in which any of them is large."""
        return any(is_8_bit(layer) for layer in self.model.modules())

    def tokenize(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text: LLaMA's start token, say; nothing for many models."""
        plain, whole = self.tokenize("a"), self.tokenizer("a")["input_ids"]
        place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:place])

    def write(self, count: int, max_tokens: int, seed: int) -> list[str]:
        """`count` texts that the model writes by itself, token by token from its own distribution, at most `max_tokens` long
        (and no longer than the model's positions).

        They begin with the start token and, so that they differ, one token of the vocabulary at random. Sampled on the CPU, so
        that the seed decides on every device (up to rounding).
        """
        generator = torch.Generator().manual_seed(seed)
        first = list(self.start_ids)
        special = torch.tensor(self.tokenizer.all_special_ids)
        ordinary = torch.arange(len(self.tokenizer))
        ordinary = ordinary[~torch.isin(ordinary, special)]
        chosen_N = ordinary[torch.randint(len(ordinary), (count,), generator=generator)]
        tokens_NL = torch.cat([torch.tensor([first] * count).long().view(count, -1), chosen_N[:, None]], 1)
        tokens_NL = self.complete(tokens_NL, min(max_tokens, self.positions or max_tokens), generator)
        return [self.words_of(tokens) for tokens in tokens_NL[:, len(first) :].tolist()]

    def words_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special ones, and without those that no word has: a table of embeddings may have more rows than the
        tokenizer has tokens, and a tokenizer without a fast version fails at them.
        """
        known = [token for token in tokens if token < len(self.tokenizer)]
        return self.tokenizer.decode(known, skip_special_tokens=True)

    @torch.inference_mode()
    def complete(
        self,
        tokens_NL: Tensor,
        length: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        stop: int | None = None,
    ) -> Tensor:
        """Texts (N, L) of one length, gone on with to `length` tokens or until each has its end token, which is then repeated.

        Args:
          generator: draws from the model's distribution, on the CPU; None = always the most likely token.
          temperature: divides the logits before a draw.
          stop: another token that ends a text, such as that of a chat template's turn.
        """
        device = self.device
        tokens_NL = tokens_NL.to(device)
        done_N, cache = torch.zeros(len(tokens_NL), dtype=torch.bool), None
        while tokens_NL.shape[1] < length and not bool(done_N.all()):
            fresh_NL = tokens_NL if cache is None else tokens_NL[:, -1:]
            memory: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            answer = self.model(input_ids=fresh_NL, use_cache=True, **memory)
            cache = getattr(answer, "past_key_values", None)  # models without attention have none: all is read again
            logits_NV = answer.logits[:, -1].float().cpu()
            if generator is None:
                next_N = logits_NV.argmax(dim=-1)
            else:
                share_NV = (logits_NV / temperature).softmax(dim=-1)
                next_N = torch.multinomial(share_NV, 1, generator=generator)[:, 0]
            next_N[done_N] = self.end_id
            done_N |= (next_N == self.end_id) | (next_N == (self.end_id if stop is None else stop))
            tokens_NL = torch.cat([tokens_NL, next_N[:, None].to(device)], dim=1)
        return tokens_NL

    @property
    def vocabulary(self) -> int:
        """How many tokens the model chooses from: the width of its logits."""
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", head.weight.shape[0]))  # a quantised weight has another shape

    @property
    def positions(self) -> int:
        """How long a text the model's config foresees; 0 if it says nothing."""
        return num_positions(self.model.config)

    @property
    def end_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad


def open_tokenizer(base: BaseModel, knobs: config.Data) -> RecordTokenizer:
    """What makes this model's tokens of records, under the recipe's template.

    Raises:
      DataError: the template cannot be had or used, or `data.max_tokens` leaves no room beside it.
    """
    return RecordTokenizer.open(
        base.tokenizer, template=knobs.template, max_tokens=knobs.max_tokens, end_id=base.end_id, start=base.start_ids
    )


def resolve_device(name: str) -> torch.device:
    """Where a model is loaded. `auto` and `spread` -> a GPU when there is one; `shard` -> main memory, from where its parts go to the GPUs.

    Raises:
      DeviceError: `cuda` was asked for and there is none, or `shard` and there is one only.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("model.device = 'cuda', but torch sees no GPU here: set model.device=cpu (or auto).")
    if name == "shard" and torch.cuda.device_count() == 1:
        raise DeviceError(
            "model.device = 'shard' splits a model over several GPUs, and torch sees one here: set model.device=cuda (or spread)."
        )
    if name == "shard":
        name = "cpu"
    if name in ("auto", "spread"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_base(knobs: config.Model, max_tokens: int = 0) -> BaseModel:
    """Loads the base model from the package, a folder, a GGUF file or the hub, frozen and in eval mode.

    Code that comes with a model is never run.

    Args:
      max_tokens: of the longest text, for which the model must have positions; 0: not known.

    Raises:
      DeviceError: the device is not there, or cannot have weights of this type.
      ModelError: there is no whole causal language model with a tokenizer that fits it (`model_checks`).
    """
    device, place = resolve_device(knobs.device), locate(knobs)
    name, options = _arguments(place)
    weights = quantised_weights(knobs.dtype, device) or {"dtype": getattr(torch, knobs.dtype)}
    if knobs.device == "spread":
        weights |= {"device_map": "auto", "max_memory": room_for_weights()}
    with _quiet(place):
        with explained(knobs.source, "config"):
            settings = AutoConfig.from_pretrained(name, **options)
        check_config(settings, knobs.source)
        with explained(knobs.source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        check_tokenizer(tokenizer, knobs.source)
        with explained(knobs.source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                **weights,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_model refuses them in one sentence
                **options,
            )
        model, report = loaded[0].requires_grad_(False).eval(), loaded[1]
        if "device_map" not in weights:
            model = model.to(device)
        keep_gradients(model)
        check_model(model, tokenizer, knobs.source, report, max_tokens)
    revision = place.revision if place.path else getattr(settings, "_commit_hash", None) or place.revision
    return BaseModel(model, tokenizer, knobs.source, place.hub_id, revision, _licence(place, name, options))


def _arguments(place: ModelPlace) -> tuple[str, dict[str, Any]]:
    """What transformers is told: a folder or hub id, and options."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if place.path is None:
        return place.hub_id, options | ({"revision": place.revision} if place.revision else {})
    if place.is_gguf:
        return str(place.path.parent), options | {"gguf_file": place.path.name}
    return str(place.path), options


@contextlib.contextmanager
def _quiet(place: ModelPlace) -> Iterator[None]:
    """Keeps the libraries' bars and warnings off the screen: what matters of them is an error of ours."""
    bars = contextlib.redirect_stderr(io.StringIO()) if place.is_gguf else contextlib.nullcontext()
    before, hub_before = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), bars:
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(before)
        hub_logging.set_verbosity(hub_before)


def _licence(place: ModelPlace, name: str, options: dict[str, Any]) -> str:
    """The licence tag that the model's own files state; a hub's card is fetched if need be."""
    if place.path is not None:
        return licence_of(place) or UNKNOWN_LICENCE
    try:
        card = cached_file(
            name, "README.md", _raise_exceptions_for_missing_entries=False, revision=options.get("revision")
        )
    except (OSError, ValueError):
        return UNKNOWN_LICENCE
    return licence_in(Path(card)) if card else UNKNOWN_LICENCE
