"""One graphics card: is it right, how fast does it train, what fits, and how much of a round is off the card.

    python benchmarks/gpu.py [--parts correctness training size encoding round shard published] [--shape 0.5B 8B 32B] [--deadline 540] [--json FILE]
    python benchmarks/gpu.py --device cpu --smoke

Weights and texts are random, so that nothing is downloaded. One JSON line a cell, at once; a cell that no longer fits the deadline is
skipped and says so. Each part fits ten minutes on an H100. Times are medians of `--repeats` after one warm-up, and nothing is asserted
about them. `--smoke` runs every part with a tiny model; with `--device cpu` it needs no card.

correctness  updates of the card against the CPU's; bitwise isolation of a client in any company, by shape
training     tokens a second, share of the card's own bf16 matrix rate, memory: 1 to 64 clients with 1 or 8 texts of 512 tokens
size         the largest cohort that trains, with and without recomputation
encoding     encode, clip, noise, pack and decode of 8,388,608 values for 64 clients
round        a private round of 64 clients: seconds on the card, and off it
shard        a cohort on 2, 4 and 8 cards that have a part of each layer each, against one card; needs two cards or more
published    whole runs of `speed.py --part published`: Dolly over 100 clients, 5 a round, LLaMA-7B's shape, 1 and 10 local epochs
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from speed_parts.published import published, tiny_dolly
from speed_parts.shard import make_clients, train_on
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from drencoder.data.tokenization import Example
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.federated.row_encoding import encode_rows, rows_at_once
from drencoder.models.adapter_layout import AdapterLayout
from drencoder.models.base_model import BaseModel
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.models.place import embedded_folder
from drencoder.privacy.mechanism import clip_rows
from drencoder.privacy.noise_source import SecureNoise
from drencoder.recipe import recipe as config
from drencoder.secure_aggregation.quantise import Quantiser

# hidden, intermediate, layers, heads, key-value heads, vocabulary: of Qwen2.5-0.5B, Llama-3-8B and Qwen2.5-32B.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "8B": (4096, 14_336, 32, 32, 8, 128_256),
    "32B": (5120, 27_648, 64, 40, 8, 152_064),
    "smoke": (64, 96, 2, 4, 2, 1_600),
}
PARTS = ("correctness", "training", "size", "encoding", "round", "shard", "published")
_FOUR_BITS = ("32B",)
REPORTED_HOURS = 13.5  # of the published setting, by its authors' public code on an A100


class Bench:
    """The device, the clock, and where results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.smoke, self.repeats = torch.device(args.device), args.smoke, args.repeats
        self.length, self.end = (24 if args.smoke else 512), time.monotonic() + args.deadline
        self.rows: list[dict[str, Any]] = []

    def cell(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measures one cell, unless the time is over, and prints it. Too little memory is a result."""
        row: dict[str, Any] = {"part": part, "cell": name}
        if time.monotonic() > self.end:
            row["skipped"] = "the deadline is over"
        else:
            self.reset()
            try:
                row |= measure()
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            row["peak_gb"] = self.peak()
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def seconds(self, work: Callable[[], object]) -> float:
        """Median wall time of one call, the device's work included."""
        times = []
        for _ in range(1 + self.repeats):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - begun)
        return statistics.median(times[1:])


def make_model(shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama of random weights; of 32 billion in 4 bits, one layer after the other, so that they never stand there in 16."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    settings = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(settings).to(dtype)
    if shape in _FOUR_BITS and device.type == "cuda":
        _make_four_bit(model, device)
    else:
        model.to_empty(device=device)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, std=0.02)
    _fill_buffers(model, settings, device)
    return model.requires_grad_(False).eval()


def _make_four_bit(model: Any, device: torch.device) -> None:
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        for part, parameter in list(layer.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1.0) if value.ndim == 1 else value.normal_(std=0.02)
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                four = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(value, requires_grad=False, quant_type="nf4").to(device)
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, four)
            else:
                setattr(layer, part, torch.nn.Parameter(value, requires_grad=False))
    model.is_loaded_in_4bit, model.config.quantization_config = True, BitsAndBytesConfig(load_in_4bit=True)


def _fill_buffers(model: Any, settings: LlamaConfig, device: torch.device) -> None:
    """Rotary frequencies, which no checkpoint has."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)


def make_lora(bench: Bench, shape: str, dtype: torch.dtype = torch.bfloat16) -> LoraModel:
    model = make_model(shape, bench.device, dtype)
    base = BaseModel(model, AutoTokenizer.from_pretrained(embedded_folder()), shape)
    return LoraModel(base, config.Adapter(rank=8, targets=("q_proj", "k_proj", "v_proj", "o_proj")), seed=0)


def matrix_rate(bench: Bench) -> float:
    """Multiplications and additions a second of one product of 8,192 x 8,192 in bfloat16."""
    size = 256 if bench.smoke else 8192
    left, right = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    return 2 * size**3 / bench.seconds(lambda: left @ right)


def training_flops(lora: LoraModel, tokens: int) -> float:
    """Of a frozen base: forward, and backward to the inputs; attention and the adapter left out; half of the tokens are predicted."""
    hidden = lora.base.model.config.hidden_size
    return 4.0 * tokens * (lora.size.linear_values + lora.base.vocabulary * hidden / 2)


def measure_correctness(bench: Bench) -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.bfloat16):
        yield bench.cell("correctness", str(dtype), partial(_compare_with_cpu, bench, dtype))


def _compare_with_cpu(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    """The same tiny model on both: how far updates are apart, and whether the card's do not depend on company."""
    torch.manual_seed(0)
    model = make_model("smoke", torch.device("cpu"), dtype)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    knobs, local = config.Adapter(rank=8), config.Local(batch_size=2)
    card_model = copy.deepcopy(model).to(bench.device)
    here = LoraModel(BaseModel(model, tokenizer, "smoke"), knobs, seed=0)
    card = LoraModel(BaseModel(card_model, tokenizer, "smoke"), knobs, seed=0)
    card.fixed_slots, card.batch_tokens = True, 1024
    clients = make_clients(here, 6, 2, 24) + make_clients(here, 2, 1, 61)
    adapter_D, seeds = here.initial_D + 0.01, list(range(8))
    expected = cohort_updates(here, adapter_D, clients, local, seeds)
    together = cohort_updates(card, adapter_D, clients, local, seeds)
    alone = [cohort_updates(card, adapter_D, [one], local, [seed]) for one, seed in zip(clients, seeds, strict=True)]
    return {
        "difference_from_cpu": float((together.cpu() - expected).norm() / expected.norm()),
        "bitwise_isolated": torch.equal(together, torch.cat(alone)),
        "shapes": {str(shape): apart for shape, apart in card.tried_shapes.items()},
    }


def measure_training(bench: Bench, shapes: list[str]) -> Iterator[dict[str, Any]]:
    rate = matrix_rate(bench)
    for shape in shapes:
        lora = make_lora(bench, shape)
        for texts in (1, 2, 8):
            for count in (1, 4, 16, 64):
                clients = make_clients(lora, count, texts, bench.length)

                def train(
                    clients: list[list[Example]] = clients, lora: LoraModel = lora, texts: int = texts
                ) -> dict[str, Any]:
                    local = config.Local(batch_size=texts)
                    tokens = sum(len(text.tokens) for client in clients for text in client)
                    took = bench.seconds(
                        lambda: cohort_updates(lora, lora.initial_D, clients, local, [0] * len(clients))
                    )
                    share = training_flops(lora, tokens) / took / rate
                    return {"seconds": took, "tokens_per_second": tokens / took, "share_of_matrix_rate": share}

                yield bench.cell("training", f"{shape}, {count} clients x {texts} x {bench.length}", train)
        del lora


def measure_size(bench: Bench, shapes: list[str]) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        lora = make_lora(bench, shape)
        for recomputed in (False, True):
            for count in (4, 8, 16, 32, 64):
                clients = make_clients(lora, count, 1, bench.length)

                def train(
                    lora: LoraModel = lora, recomputed: bool = recomputed, clients: list[list[Example]] = clients
                ) -> dict[str, Any]:
                    lora.batch_tokens, lora.fit_tokens = 10**9, 0 if recomputed else 10**9
                    lora.fixed_slots = False  # exactly these clients in one pass: memory is asked for, not isolation
                    return {
                        "seconds": bench.seconds(
                            lambda: cohort_updates(lora, lora.initial_D, clients, config.Local(), [0] * len(clients))
                        )
                    }

                row = bench.cell("size", f"{shape}, {count} clients, {'recomputed' if recomputed else 'kept'}", train)
                yield row
                if "out_of_memory" in row:
                    break
        del lora


def layout_of(bench: Bench) -> AdapterLayout:
    """Of rank 8 on q, k, v and o of LLaMA-7B: D = 8,388,608."""
    width, layers = (64, 2) if bench.smoke else (4096, 32)
    sides = {"A": (8, width), "B": (width, 8)}
    return AdapterLayout.from_shapes(
        {
            f"layers.{n}.{part}_proj.lora_{side}.weight": size
            for n in range(layers)
            for part in "qkvo"
            for side, size in sides.items()
        }
    )


def measure_encoding(bench: Bench) -> Iterator[dict[str, Any]]:
    layout, count = layout_of(bench), 4 if bench.smoke or bench.device.type == "cpu" else 64
    encoder = RandomSketch.build(layout.segments, layout.size // 64)
    update_ND = torch.randn(count, layout.size, device=bench.device)

    def times() -> dict[str, Any]:
        rows = rows_at_once(encoder, 1, bench.device)
        wire = WireFormat.of(encoder)
        code_NK = encode_rows(encoder, update_ND, 1, rows)
        bounded = clip_rows(code_NK, 1.0).values_NV
        messages = pack_rows(bounded, wire, 1)
        return {
            "values": layout.size, "clients": count, "rows_at_once": rows,
            "encode_s": bench.seconds(lambda: encode_rows(encoder, update_ND, 1, rows)),
            "clip_s": bench.seconds(lambda: clip_rows(code_NK, 1.0)),
            "noise_of_one_s": bench.seconds(lambda: noise_of(encoder.code_size)),
            "pack_s": bench.seconds(lambda: pack_rows(bounded, wire, 1)),
            "unpack_s": bench.seconds(lambda: unpack_rows(messages, wire, 1)),
            "decode_one_s": bench.seconds(lambda: encoder.decode(code_NK[:1], 1)),
        }  # fmt: skip

    yield bench.cell("encoding", "random sketch, 1/64", times)


def noise_of(values: int) -> torch.Tensor:
    """(values,) float64: discrete Gaussian noise of a central sum of clip 1 and noise multiplier 1."""
    quantiser = Quantiser.fine(values=values, clip_l2=1.0, noise_multiplier=1.0)
    return torch.from_numpy(quantiser.noise(SecureNoise().words())) * quantiser.step


def measure_round(bench: Bench, shapes: list[str]) -> Iterator[dict[str, Any]]:
    """What one round computes: 64 clients train, encode, are clipped and packed; the server adds, noises and decodes."""
    for shape in shapes:
        lora = make_lora(bench, shape)
        clients = make_clients(lora, 4 if bench.smoke else 64, 1, bench.length)
        encoder = RandomSketch.build(lora.layout.segments, max(1, lora.layout.size // 64))

        def one_round(
            lora: LoraModel = lora, clients: list[list[Example]] = clients, encoder: RandomSketch = encoder
        ) -> dict[str, Any]:
            marks = [time.perf_counter()]

            def mark() -> None:
                bench.wait()
                marks.append(time.perf_counter())

            wire, rows = WireFormat.of(encoder), rows_at_once(encoder, 1, bench.device)
            update_ND = cohort_updates(lora, lora.initial_D, clients, config.Local(batch_size=1), [0] * len(clients))
            mark()
            bounded = clip_rows(encode_rows(encoder, update_ND, 1, rows), 1.0).values_NV
            mark()
            received = unpack_rows(pack_rows(bounded, wire, 1), wire, 1).code_NK
            noised = received.double().sum(0) + noise_of(encoder.code_size)
            encoder.decode(noised[None].float(), 1)
            mark()
            train, encode, rest = (b - a for a, b in pairwise(marks))
            return {
                "training_s": train,
                "encode_and_clip_s": encode,
                "off_the_card_s": rest,
                "share_off": rest / (train + encode + rest),
            }

        yield bench.cell("round", shape, one_round)
        del lora


def measure_shard(bench: Bench, shapes: list[str]) -> Iterator[dict[str, Any]]:
    """Of each shape the same cohort on one card and on several. The model is read from a folder, as in a run."""
    card = bench.device.type == "cuda"
    counts = [cards for cards in (1, 2, 4, 8) if cards <= (torch.cuda.device_count() if card else 2)]
    for shape in [shape for shape in shapes if shape not in _FOUR_BITS]:
        if len(counts) == 1:
            yield bench.cell("shard", shape, lambda: {"skipped": "one card is here, and two or more are needed"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            dtype = torch.bfloat16 if card else torch.float32
            make_model(shape, torch.device("cpu"), dtype).save_pretrained(folder)
            AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
            train = partial(
                train_on, Path(folder), device=bench.device.type, dtype=str(dtype).removeprefix("torch."),
                clients=4 if bench.smoke else 64, length=bench.length, repeats=bench.repeats,
            )  # fmt: skip
            alone: dict[str, Any] = {}
            for cards in counts:
                row = bench.cell("shard", f"{shape}, {cards} card(s)", partial(_beside_one, alone, train, cards))
                alone = alone or row
                yield row


def _beside_one(alone: dict[str, Any], train: Callable[[int], dict[str, Any]], cards: int) -> dict[str, Any]:
    """The row of several cards, with how many times as fast as one they are; `alone` is the row of one, or empty."""
    row = train(cards)
    if "seconds" in alone and "seconds" in row:
        row["times_one_card"] = alone["seconds"] / row["seconds"]
    return row


def measure_published(bench: Bench, dolly: Path | None, rounds: int) -> Iterator[dict[str, Any]]:
    """The published setting: `rounds` of its 20 rounds in a process of their own, and what the whole run comes to."""
    shape, length = ("small", 64) if bench.smoke else ("llama-7b", bench.length)

    def run(epochs: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            row = published(
                shape, dolly or tiny_dolly(Path(folder) / "made-up.jsonl"), None, epochs=epochs, rounds=rounds, max_tokens=length,
                device=bench.device.type, dtype="bfloat16" if bench.device.type == "cuda" else "float32",
            )  # fmt: skip
        return {"data": "Dolly" if dolly else "400 made-up records", **row, "hours_reported": REPORTED_HOURS}

    for epochs in (1, 10):
        yield bench.cell("published", f"{shape}, {epochs} local epoch(s)", partial(run, epochs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--shape", nargs="+", choices=[name for name in SHAPES if name != "smoke"], default=["0.5B", "8B", "32B"]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no cell is begun")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--dolly", type=Path, help="databricks-dolly-15k.jsonl, for the part published; else made-up records"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the 20 of the published setting that are run; 2 at least"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: whether every part works")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU with CUDA and torch sees none here: nothing was measured.")
        return 0
    if args.smoke:
        args.repeats = 1
    bench, shapes = Bench(args), ["smoke"] if args.smoke else args.shape
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    facts = {"device": name, "torch": torch.__version__, "smoke": args.smoke}
    print(json.dumps(facts), flush=True)
    parts = {
        "correctness": lambda: measure_correctness(bench), "training": lambda: measure_training(bench, shapes),
        "size": lambda: measure_size(bench, shapes), "encoding": lambda: measure_encoding(bench),
        "round": lambda: measure_round(bench, shapes), "shard": lambda: measure_shard(bench, shapes),
        "published": lambda: measure_published(bench, args.dolly, 2 if args.smoke else args.rounds),
    }  # fmt: skip
    for part in args.parts:
        for _ in parts[part]():
            pass
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": bench.rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
