"""Training of a cohort against plain PEFT, one client after the other: time and memory, with the same updates.

    python benchmarks/cohort_training.py [--model FOLDER] [--clients 64] [--records 8] [--tokens 1 512] [--threads 1] [--dtype float32] [--repeats 5] [--json FILE]

Plain PEFT is `get_peft_model` on a model of its own and `loss.backward()`, without any code of drencoder. All ways take turns;
printed are medians, the ratio of each repeat to plain PEFT's, and the memory that a way took beyond what was there before it.
Asserts nothing about time.
"""

import argparse
import contextlib
import ctypes
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table

from drencoder.data.tokenization import Example
from drencoder.models.base_model import load_base
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.build import build


class PlainPeft:
    """The same model, adapter and examples in peft and transformers alone."""

    def __init__(self, lora: LoraModel, recipe: Any, targets: Sequence[str]) -> None:
        model = load_base(recipe.model).model
        adapter = LoraConfig(r=lora.rank, lora_alpha=recipe.adapter.alpha, target_modules=list(targets), bias="none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        self.lora, self.pad_id = lora, lora.base.pad_id
        set_peft_model_state_dict(self.model, lora.layout.unflatten(lora.initial_D))

    def gradient(self, examples: Sequence[Example]) -> torch.Tensor:
        """Minus the mean gradient (D,) of one client, in one pass."""
        length = max(len(example.tokens) for example in examples)
        input_ids = torch.full((len(examples), length), self.pad_id)
        labels = torch.full((len(examples), length), -100)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example.tokens)
            input_ids[row, : len(tokens)] = tokens
            labels[row, example.prompt_length : len(tokens)] = tokens[example.prompt_length :]
        self.model.zero_grad()
        self.model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        parameters = dict(self.model.named_parameters())
        names = {name.replace(".default", ""): name for name in parameters}
        gradients = {s.name: parameters[names[s.name]].grad for s in self.lora.layout.segments}
        return -self.lora.layout.flatten(gradients)


def memory(reset: bool = False) -> float:
    """MB in use now after `reset`, else the most since then; 0 where the system does not say."""
    with contextlib.suppress(OSError, AttributeError):
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        field = "VmRSS" if reset else "VmHWM"
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
    return 0.0


def take_turns(
    ways: dict[str, Callable[[], torch.Tensor]], repeats: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Time, memory and difference of every way; the first is the reference."""
    first = next(iter(ways))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    updates, megabytes = {}, {}
    for name, way in ways.items():  # also the warm-up
        before = memory(reset=True)
        updates[name] = way()
        megabytes[name] = memory() - before
    for _ in range(repeats):
        for name, way in ways.items():
            begun = clock()
            way()
            seconds[name].append(clock() - begun)
    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        difference = (updates[name] - updates[first]).norm(dim=1) / updates[first].norm(dim=1)
        rows.append(
            {
                "way": name,
                "ms_per_client": 1000 * statistics.median(seconds[name]) / len(updates[name]),
                "speed_of_plain_peft": statistics.median(ratios),
                "megabytes": megabytes[name],
                "largest_relative_difference": float(difference.max()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, or a model as in model.source")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--records", type=int, default=8, help="records of a client")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 512, 2048, 8192], help="budgets; 1: each client alone"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base, for all ways")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [
        f"model.source={args.model}",
        f"model.dtype={args.dtype}",
        f"data.examples_per_client={args.records}",
        "evaluation.data=none",
    ]
    settings += [f"local.batch_size={args.records}", "evaluation.benchmarks=mmlu", "evaluation.examples=2"]
    recipe = load_recipe(None, [*settings, "prior.public=", "encoder.name=random", "adapter.start=peft"])
    components = build(recipe)
    lora = components.lora
    targets = sorted({s.name.split(".lora_")[0].rpartition(".")[2] for s in lora.layout.segments})
    plain = PlainPeft(lora, recipe, targets)
    clients = [components.texts.client(number, 1) for number in range(args.clients)]
    tokens = sum(len(example.tokens) for client in clients for example in client)
    automatic = lora.batch_tokens

    def together(budget: int) -> Callable[[], torch.Tensor]:
        def train() -> torch.Tensor:
            lora.batch_tokens = budget
            return cohort_updates(lora, lora.initial_D, clients, recipe.local, [0] * len(clients))

        return train

    ways = {"plain PEFT, one by one": lambda: torch.stack([plain.gradient(one) for one in clients])}
    ways |= {f"up to {budget:,} tokens together": together(budget) for budget in args.tokens}
    ways[f"speed.tokens = 0, here {automatic:,}"] = together(automatic)
    # One thread's own time does not see what else runs on the machine.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows = take_turns(ways, args.repeats, clock)
    title = (
        f"{args.model}: {args.clients} clients x {args.records} records, {tokens:,} tokens, {args.threads} thread(s)"
    )
    table = Table("way", "ms a client", "speed of plain PEFT", "MB", "largest difference", title=title)
    for row in rows:
        name, ms, ratio, megabytes, difference = row.values()
        table.add_row(name, f"{ms:.2f}", f"{ratio:.2f}", f"{megabytes:.0f}", f"{difference:.1e}")
    Console().print(table)
    if args.json:
        facts = {"model": args.model, "clients": args.clients, "records": args.records, "tokens": tokens}
        args.json.write_text(json.dumps({**facts, "threads": args.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
