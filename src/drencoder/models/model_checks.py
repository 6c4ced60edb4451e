"""What can be wrong with a base model, one sentence each, told when it is loaded and before anything is charged."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from drencoder.errors import DrencoderError, ModelError
from drencoder.reading import cut, shown

_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_TOLERANCE = {torch.float32: 1e-5}  # of a probe's largest logit; 16-bit types round at 2^-8
_COARSE_TOLERANCE = 1e-2
_CURE = "choose a decoder-only language model, such as one of the Llama, Qwen, Gemma or GPT families"


def num_positions(settings: Any) -> int:
    """How many positions the config says the model has, or can have without `num_steady_positions` to be left; 0 if it says nothing."""
    text = settings.get_text_config()
    values = (getattr(text, key, None) for key in _POSITION_KEYS)
    stated = next((value for value in values if isinstance(value, int) and value > 0), 0)
    return num_steady_positions(settings) or stated


def num_steady_positions(settings: Any) -> int:
    """Up to how many tokens each token is read in the same way, however long its text is; 0: always.

    Rotary frequencies of some kinds depend on the longest text of a batch once it is longer ("dynamic": on those before, too). There another
    client's text would change what a model makes of one's own.
    """
    text = settings.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    bounds = []
    for one in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):  # of all layers, or of each kind
        kind = str(one.get("rope_type", ""))
        stated = one.get("original_max_position_embeddings") if kind == "longrope" else None
        if kind == "longrope" or "dynamic" in kind:
            bounds.append(int(stated or getattr(text, "max_position_embeddings", 0) or 1))
    return min(bounds, default=0)


@contextlib.contextmanager
def explained(source: str, part: str = "model") -> Iterator[None]:
    """Turns whatever a library raises while it reads a model's files into one sentence: raises ModelError.

    Nothing of a client is read here, so the library's own words may be shown.
    """
    try:
        yield
    except DrencoderError:
        raise
    except Exception as error:  # each format and library has an error type of its own
        words = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(_explanation(source, part, words, isinstance(error, ImportError))) from None


def _explanation(source: str, part: str, words: str, missing_library: bool) -> str:
    if "trust_remote_code" in words or "custom code" in words:
        return (
            f"model.source = {shown(source)} comes with code of its own, which drencoder never runs: choose a model that "
            "transformers supports by itself."
        )
    if missing_library and "gguf" in words.lower():
        return f"model.source = {shown(source)} needs the package gguf: pip install 'drencoder[gguf]'."
    if re.search("quantiz", words, re.IGNORECASE):
        return (
            f"model.source = {shown(source)} is quantised already, and its weights cannot be read here ({words.rstrip('. :')}): give the "
            "model's own weights, and set model.dtype = 'nf4' or 'int8' where they are to be loaded in fewer bits."
        )
    if part == "tokenizer" and re.search("tiktoken|sentencepiece|protobuf", words, re.IGNORECASE):
        return (
            f"model.source = {shown(source)} has a tokenizer of another library and no tokenizer.json, and it cannot be converted here "
            f"({words.rstrip('. :')}): pip install sentencepiece protobuf (where versions clash, in an environment of its own, and there "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or take the model's own tokenizer.json."
        )
    if "Weights only load failed" in words:
        return (
            f"model.source = {shown(source)}: its .bin weights hold more than numbers, which could be code and is never run: convert "
            "them to safetensors."
        )
    if "does not recognize this architecture" in words or "`model_type`" in words:
        named = re.search(r"model type `([^`]{1,60})`", words)
        kind = f"the model_type {named[1]!r}" if named else "no model_type in its config.json"
        return (
            f"model.source = {shown(source)} has {kind}, so that transformers cannot tell what it is: choose another model, or install "
            "a transformers that knows it."
        )
    cure = (
        "put the model's own tokenizer.json and tokenizer_config.json beside its weights"
        if part == "tokenizer"
        else "give 'embedded', a local Hugging Face folder with config.json, weights and tokenizer, a .gguf file, or a hub id that "
        "this machine can reach"
    )
    return f"model.source = {shown(source)}: its {part} cannot be loaded ({words.rstrip('. :')}): {cure}."


def check_config(settings: Any, source: str) -> None:
    """Raises ModelError for a model that is no causal language model by its own config."""
    family, architectures = settings.model_type, settings.architectures or []
    if settings.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif any(getattr(settings, f"{sense}_config", None) is not None for sense in ("vision", "audio")):
        kind = "a model of images or sound beside text"
    elif family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = "not a language model that writes from left to right"
    elif any("MaskedLM" in name for name in architectures) and not getattr(settings, "is_decoder", False):
        kind = "a model that reads in both directions"
    else:
        return
    raise ModelError(f"model.source = {shown(source)} is {kind} (model_type {shown(family)}): {_CURE}.")


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises ModelError for a tokenizer without an end-of-text token, or one that transformers had to guess and guessed otherwise."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {shown(source)} has no end-of-text token: set eos_token in its files.")
    own = Path(source) / "tokenizer.model"
    if type(tokenizer) is not TokenizersBackend or not own.is_file() or (own.parent / "tokenizer.json").is_file():
        return
    try:
        spec = SentencePieceExtractor(str(own)).proto.normalizer_spec
    except Exception:  # protobuf's own; a file of tiktoken may have that name, and is read as such
        return
    if spec.add_dummy_prefix and not tokenizer.tokenize("answer", add_special_tokens=False)[0].startswith("\u2581"):
        raise ModelError(
            f"the tokenizer of {shown(source)} is of no class that transformers knows, and transformers reads its tokenizer.model without the "
            "space that this puts before a text, so that the model would get other tokens than it was trained with: put a tokenizer.json "
            "of this tokenizer beside it, or name the class in tokenizer_config.json (such as LlamaTokenizer)."
        )


@torch.inference_mode()
def check_model(model: Any, tokenizer: Any, source: str, report: Mapping[str, Any], max_tokens: int) -> None:
    """Raises ModelError for a loaded model that cannot be trained as it is.

    Args:
      report: transformers' account of the checkpoint: keys that were missing or did not fit.
      max_tokens: of the longest text; 0: not known.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(_reachable_ids(tokenizer), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {shown(source)} has {largest + 1} tokens and the model's embedding table has {rows} rows: take the "
            "tokenizer that belongs to the model, or enlarge the table."
        )
    _check_causal(model, source, rows)
    for trouble, keys in (
        ("lacks", report.get("missing_keys", ())),
        ("has another shape than the config says of", [key for key, *_ in report.get("mismatched_keys", ())]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"the checkpoint of {shown(source)} {trouble} {min(keys)}{more}, so that random numbers would stand there: give the "
                "folder of the whole language model, with its own config.json."
            )
    _check_positions(model, source, max_tokens)


def _reachable_ids(tokenizer: Any) -> set[int]:
    """Ids that a text can have: all but special tokens that nobody puts there, which some tokenizer classes add by themselves."""
    template = str(tokenizer.chat_template or "")
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    used |= set(tokenizer("a \u2603 \u0f3a")["input_ids"])
    added = tokenizer.added_tokens_decoder.items()
    unused = {number for number, token in added if token.special and token.content not in template} - used
    return (set(tokenizer.get_vocab().values()) | used) - unused


def _check_causal(model: Any, source: str, rows: int) -> None:
    """A causal model's logits do not depend on later tokens: two texts that differ in the last token show it."""
    device = _input_device(model)
    text_RL = torch.arange(8, device=device).remainder(rows).repeat(2, 1)
    text_RL[1, -1] = rows - 1
    try:
        logits_RLV = model(input_ids=text_RL, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (
        AttributeError,
        AssertionError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(  # eight tokens by number: a library's words about them are about the model
            f"the model of {shown(source)} cannot read eight tokens ({type(error).__name__}: {cut(error)}): its config.json does "
            "not fit its weights or this version of transformers; try it in transformers alone."
        ) from None
    if not bool(logits_RLV.isfinite().all()):
        raise ModelError(
            f"the model of {shown(source)} gives numbers that are not finite: set model.dtype = 'float32', or copy its files again."
        )
    change = float((logits_RLV[0, :-1] - logits_RLV[1, :-1]).abs().max())
    if change > _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE) * float(logits_RLV.abs().max()):
        raise ModelError(
            f"model.source = {shown(source)} is not causal: what it says of a token depends on the tokens after it (model_type "
            f"{shown(model.config.model_type)}): {_CURE}."
        )


def _check_positions(model: Any, source: str, max_tokens: int) -> None:
    """Where the config says fewer positions than `max_tokens`, tries: most rotary positions have no end, tables have."""
    steady = num_steady_positions(model.config)
    if 0 < steady < max_tokens:
        raise ModelError(
            f"the model of {shown(source)} reads all tokens of a text otherwise if the text has more than {steady} (its rotary positions "
            f"are scaled by length), so that a longer text of one client would change what another sends, and data.max_tokens = {max_tokens}: "
            f"set data.max_tokens = {steady} or less."
        )
    positions = num_positions(model.config)
    if not 0 < positions < max_tokens:
        return
    device = _input_device(model)
    try:
        model(input_ids=torch.zeros((1, max_tokens), dtype=torch.int64, device=device), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        raise ModelError(
            f"the model of {shown(source)} has {positions} positions and data.max_tokens = {max_tokens}: set data.max_tokens = "
            f"{positions} or less."
        ) from None


def _input_device(model: Any) -> torch.device:
    """Of a model that is spread, its hooks move the tokens."""
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
