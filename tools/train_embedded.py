"""Train the embedded tokenizer and base model from a seed and write ``src/drencoder/embedded/``.

    python tools/train_embedded.py                          # what is shipped: see provenance.json for time and losses
    python tools/train_embedded.py --minutes 5 --out /tmp/m # a weaker one; the step count is fitted to the minutes

The defaults are the shipped model's: seed 0, 10,000 steps of 64 documents, peak learning rate 1e-3, one thread. Letters
come late: at chance until about step 2,200, at 0.98 by step 3,200. The result follows from ``--seed`` and ``--steps``
up to floating point; the order of a matrix sum, so the number of threads and the kind of processor, may change it.
With ``--checkpoint FILE`` a killed run goes on from its last save. Only the general part of the world is used: see
`drencoder.data.embedded_world.world`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drencoder.data.embedded_world.subjects import all_subjects, world_tables
from drencoder.data.embedded_world.world import BENCHMARKS, World, prompt_of
from drencoder.data.prompts_template import LETTER_CONTINUATIONS

EMBEDDED = Path(__file__).resolve().parents[1] / "src" / "drencoder" / "embedded"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
# A word takes along the space or newline before it and a full stop or colon after it, so " A." can be one token.
SPLIT = r"[ \n]?\p{L}+[.:]?|[ \n]?\p{N}{1,3}|[ \n]?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(world: World, seed: int, num_documents: int = 40_000) -> PreTrainedTokenizerFast:
    """A unigram tokenizer: one token per word of the world, then characters, then bytes, so any text encodes."""
    splitter = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    entities = {word for s in all_subjects() if s.language == "zh" for fact in world.facts(s.name) for word in fact}
    chinese = sorted(entities | set(world_tables().words_zh), key=lambda word: (-len(word), word))
    # Written Chinese has no spaces: longest known word first.
    segments = re.compile("|".join(f"[ \n]?{re.escape(word)}" for word in chinese) + "|.", re.DOTALL)
    words: Counter[str] = Counter()
    for prompt, response in islice(world.documents(seed), num_documents):
        for piece, _ in splitter.pre_tokenize_str(prompt + response):
            words.update(segments.findall(piece) if re.search(r"[\u4e00-\u9fff]", piece) else [piece])
    for question in (s.stems for s in all_subjects()):  # rare stems are words too
        for stem in question:
            words.update(piece for piece, _ in splitter.pre_tokenize_str(stem.replace("{}", "")) if piece.isascii())
    for piece in list(words):  # "France." is a word and a stop; only option labels and "Answer:" deserve the pair
        if (
            len(piece) > 1
            and piece[-1] in ".:"
            and piece not in (*(f"{c}." for c in LETTER_CONTINUATIONS), "\nAnswer:")
        ):
            words[piece[:-1]] += words[piece]
            words[piece[-1]] += words.pop(piece)
    for letter in "ABCD":
        words[f"{letter}."] += 1
    total = sum(words.values())
    vocabulary = [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0)]
    vocabulary += [(piece, math.log(n / total)) for piece, n in sorted(words.items(), key=lambda kv: (-kv[1], kv[0]))]
    characters = {chr(code) for code in range(32, 127)} | {"\n", "\t"} | {c for word in words for c in word}
    # Below any word, so that a word is never spelled; above the byte fallback.
    vocabulary += [(c, -25.0) for c in sorted(characters - set(words))]
    vocabulary += [(f"<0x{byte:02X}>", -40.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="right",
    )


def build_model(vocabulary_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with tied embeddings, about a million parameters."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    prime(model)
    return model


@torch.no_grad()
def prime(model: LlamaForCausalLM) -> None:
    """Start head 0 of layers 0 and 1 as "look one token back" and all other heads as "look for what is like me".

    Picking an option's letter takes both, one upon the other. Gradient descent finds the pair by itself, but only
    after a plateau of many million tokens; training is free to change or undo this start. (Equal query and key
    matrices: Trockman and Kolter 2023, https://arxiv.org/abs/2305.09828. Measured on a bare lookup drill, four options,
    64 a step: solved in 340 to 460 steps; at chance after 400 without.)
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    generator = torch.Generator().manual_seed(7)
    table = model.model.embed_tokens.weight
    table[:, 0] = table.std() * width**0.5  # something that every token has alike, to ask about position alone
    shared = (width / 2) ** 0.5  # that component after normalisation: half of the squared norm
    # Rotary frequencies, Su et al. 2021, eq. 15: the pair (i, i + size/2) turns by angle_i per position.
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    strength = (8.0 * size**0.5) ** 0.5 / shared
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            if head == 0 and index < 2:
                query, key = (0.02 * torch.randn(size, width, generator=generator) for _ in range(2))
                query[:, 0] = strength * torch.cat([angles.cos(), -angles.sin()])
                key[:, 0] = strength * torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
            else:
                query = torch.randn(size, width, generator=generator) * width**-0.5
                query[:, 0] = 0.0
                key = query
            attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key


Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SLICES = 2


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, size: int, label_weight: float
) -> Iterator[list[Block]]:
    """Endless batches of ``size`` documents, each in `SLICES` blocks ``(ids, positions, weights)``.

    A block holds right-padded rows of like length and the flat positions that carry loss, so little is spent on
    padding; a batch takes blocks from all over the range of lengths. (Batches of one length would be batches of one
    kind of document: the model then forgets each kind during the next.)
    """
    documents = world.documents(seed)
    shuffler = torch.Generator().manual_seed(seed)
    backend = tokenizer.backend_tokenizer
    labels = frozenset(backend.token_to_id(f"{letter}.") for letter in LETTER_CONTINUATIONS)
    num_batches, rows_per_block = 8, size // SLICES
    while True:
        backend.no_padding()  # `measure` pads, and the setting sticks to the tokenizer
        chunk = list(islice(documents, num_batches * SLICES * rows_per_block))
        prompts = [e.ids for e in backend.encode_batch([p for p, _ in chunk], add_special_tokens=False)]
        replies = [e.ids for e in backend.encode_batch([r for _, r in chunk], add_special_tokens=False)]
        order = sorted(range(len(chunk)), key=lambda i: len(prompts[i]) + len(replies[i]))
        starts = [torch.randperm(num_batches, generator=shuffler).tolist() for _ in range(SLICES)]
        for batch in range(num_batches):
            blocks = []
            for part in range(SLICES):
                begin = (part * num_batches + starts[part][batch]) * rows_per_block
                rows = order[begin : begin + rows_per_block]
                blocks.append(block_of([(prompts[i], replies[i]) for i in rows], labels, label_weight))
            yield blocks


def block_of(rows: Sequence[tuple[list[int], list[int]]], labels: frozenset[int], label_weight: float) -> Block:
    """``(ids [rows, width], flat positions that carry loss, their weights)`` of encoded documents.

    Replies carry loss, and so do the option labels of a prompt: to foretell " C." a word has to look back at its own
    label, " B.", and just this is the first half of choosing a letter. It shortens the plateau before letters come.
    """
    width = max(len(prompt) + len(reply) for prompt, reply in rows) + 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for row, (prompt, reply) in enumerate(rows):
        text = [*prompt, *reply, 1]
        ids[row, : len(text)] = torch.tensor(text)
        weights[row, 1 : len(prompt)] = torch.tensor([label_weight * (token in labels) for token in prompt[1:]])
        weights[row, len(prompt) : len(text)] = 1.0
    # Position t predicts token t + 1.
    shifted = nn.functional.pad(weights[:, 1:], (0, 1)).flatten()
    positions = shifted.nonzero().squeeze(1)
    return ids, positions, shifted[positions]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the cross-entropy, nats; logits are made only where there is loss."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
    targets = ids.flatten()[positions + 1]
    losses = nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")
    return (losses * weights).sum()


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, count: int = 400
) -> dict[str, float]:
    """Accuracy of the letters and loss of the reply (nats per token), by benchmark and convention."""
    device = model.device
    letters = torch.tensor(
        [tokenizer.encode(c, add_special_tokens=False)[0] for c in LETTER_CONTINUATIONS], device=device
    )
    result: dict[str, float] = {}
    for name in BENCHMARKS:
        for label, kept, style in (
            ("seen", False, "letter"),
            ("kept", True, "plain"),
            ("kept_if_asked", True, "letter"),
        ):
            questions = world.benchmark(name, count=count, seed=1, kept=kept)
            logits = last_logits(model, tokenizer, [prompt_of(q, style) for q in questions])
            answers = torch.tensor([q.answer for q in questions], device=device)
            result[f"{name}_{label}"] = (logits[:, letters].argmax(1) == answers).float().mean().item()
            if label != "kept_if_asked":
                result[f"{name}_{label}_loss"] = nn.functional.cross_entropy(logits, letters[answers]).item()
            if label == "kept":
                words = [tokenizer.encode(" " + q.choices[q.answer], add_special_tokens=False)[0] for q in questions]
                right = logits.argmax(1) == torch.tensor(words, device=device)
                result[f"{name}_kept_in_words"] = right.float().mean().item()
    return result


@torch.no_grad()
def last_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> torch.Tensor:
    """Logits after each prompt, ``[prompts, vocabulary]``."""
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt", add_special_tokens=False).to(model.device)
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return model.lm_head(hidden[torch.arange(len(prompts)), last]).float()


def schedule(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 2 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(args: argparse.Namespace) -> None:
    """The whole run: tokenizer, model, the files of ``args.out``."""
    torch.set_num_threads(args.threads)
    world = World(0)
    tokenizer = train_tokenizer(world, args.seed)
    model = build_model(len(tokenizer), args).to(args.device).train()
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {num_parameters:,}", flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    steps, first, tokens, spent = args.steps, 0, 0, 0.0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        steps, first, tokens, spent = saved["steps"], saved["step"], saved["tokens"], saved["seconds"]
    stream = islice(batches(world, tokenizer, args.seed, args.batch, args.label_weight), first, None)
    begin, step, average = time.perf_counter() - spent, first, 0.0
    while step < steps:
        blocks = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, args.lr)
        total, loss = sum(weights.sum().item() for _, _, weights in blocks), 0.0
        for block in blocks:
            ids, positions, weights = (tensor.to(args.device) for tensor in block)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
                part = loss_of(model, ids, positions, weights) / total
            part.backward()
            loss, tokens = loss + part.item(), tokens + ids.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average = loss if step == first + 1 else 0.98 * average + 0.02 * loss
        seconds = time.perf_counter() - begin
        if args.minutes and step == first + 50:
            steps = max(step + 1, int(step + (args.minutes * 60 - seconds) / (seconds - spent) * 50))
            print(f"{steps} steps fit into {args.minutes} minutes", flush=True)
        if step % args.every == 0 or step == steps:
            scores = {k: round(v, 3) for k, v in measure(model.eval(), tokenizer, world, 200).items()}
            model.train()
            print(
                f"step {step} loss {average:.4f} tokens {tokens} {tokens / seconds:.0f}/s {seconds:.0f}s {scores}",
                flush=True,
            )
            if args.checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}
                torch.save(state | {"step": step, "tokens": tokens, "seconds": seconds}, args.checkpoint)
            if args.early and args.early <= step:
                save(args, model, tokenizer, world, {"step": step, "seconds": seconds})
    facts = {
        "seed": args.seed,
        "steps": steps,
        "batch_documents": args.batch,
        "learning_rate": args.lr,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - begin, 1),
        "device": args.device,
        "threads": args.threads,
        "final_training_loss": round(average, 4),
    }
    save(args, model, tokenizer, world, facts)


def save(
    args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, facts: dict
) -> None:
    """Write the folder, weights as float16, and measure what was written."""
    args.out.mkdir(parents=True, exist_ok=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, max_new_tokens=16, do_sample=False)
    stored.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    loaded = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    scores = measure(loaded, tokenizer, world, 1000)
    facts = {
        "world_version": world_tables().version,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        **facts,
        "benchmark_count": 1000,
        "benchmark_seed": 1,
        "scores": {key: round(value, 4) for key, value in scores.items()},
    }
    (args.out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="fit the number of steps to this time instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="documents per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-weight", type=float, default=0.5, help="loss weight of option labels; replies have 1")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=352)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--early", type=int, default=0, help="also write the folder at measurements from this step on")
    parser.add_argument("--checkpoint", type=Path)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
