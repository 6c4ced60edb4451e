"""Tokenizers of the kinds that real models have, small and made here, and folders of random models with them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "Say",
    "the",
    "word",
    "number",
    "about",
    "it",
    "was",
    "red",
    "green",
    "blue",
    "river",
    "stone",
    "bird",
    "house",
    "Answer",
    ":",
    "A",
    "B",
    "C",
    "D",
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('Only the first message may be a system message') }}{% endif %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def _llama2() -> Tokenizer:
    """Puts a space before every text, as LLaMA-1 and -2 do: a response that is tokenised alone begins with another token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


KINDS = {"llama2": _llama2, "mistral": _mistral, "bytes": _bytes}


def make_tokenizer(kind: str, *, start: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer of one of the `KINDS`; with `start` it puts <s> before every text."""
    tokenizer = KINDS[kind]()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list("▁\n</>|" + "abcdefghij"),
        show_progress=False,
    )
    corpus = [f"{' '.join(WORDS[i : i + 6])}\nAnswer: {WORDS[i]}" for i in range(len(WORDS))] * 5
    tokenizer.train_from_iterator(corpus, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
    )
    wrapped.chat_template = template
    return wrapped


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder that loads like any model: the tokenizer and a random one-layer Llama."""
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=3,
                num_key_value_heads=3,
                max_position_embeddings=256,
                initializer_range=0.2,
            )
        )
    model.save_pretrained(folder)
    return folder
