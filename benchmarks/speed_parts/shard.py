"""One cohort on a model whose layers are split over several graphics cards, against the same cohort on one card."""

import multiprocessing
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from drencoder.data.tokenization import Example
from drencoder.models.base_model import load_base
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.models.sharded import open_lora
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_clients(lora: LoraModel, count: int, texts: int, length: int) -> list[list[Example]]:
    """Texts of `length` tokens of which the second half is predicted."""
    draw = random.Random(count)
    vocabulary = lora.base.vocabulary
    return [
        [Example(tuple(draw.randrange(vocabulary) for _ in range(length)), length // 2) for _ in range(texts)]
        for _ in range(count)
    ]


def train_on(
    folder: Path, cards: int, *, device: str, dtype: str, clients: int, length: int, repeats: int
) -> dict[str, Any]:
    """Trains `clients` clients with one text of `length` tokens each on `cards` cards, in a process that sees no others.

    Without a card, 2 is two processes on the CPU. `seconds` is the median of a cohort's gradient; `peak_gb` is of the first card.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = before.split(",") if before else [str(card) for card in range(cards)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[:cards])
    try:
        process = context.Process(
            target=_train, args=(folder, cards, device, dtype, clients, length, repeats, theirs), daemon=False
        )
        process.start()
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return {"failed": f"the process on {cards} card(s) ended without a result"}
    finally:
        process.join()


def _train(
    folder: Path, cards: int, device: str, dtype: str, clients: int, length: int, repeats: int, pipe: Any
) -> None:
    recipe = Recipe(
        model=config.Model(source=str(folder), dtype=dtype, device=device if cards == 1 else "shard"),
        adapter=config.Adapter(rank=8, targets=_TARGETS), speed=config.Speed(parallel_clients=clients),
    )  # fmt: skip
    begun = time.perf_counter()
    lora = open_lora(load_base(recipe.model), recipe)
    loaded = time.perf_counter() - begun
    texts = make_clients(lora, clients, 1, length)
    seconds = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        update_KD = cohort_updates(lora, lora.initial_D, texts, config.Local(), [0] * clients)
        total = float(update_KD.double().sum())  # waits for the card
        seconds.append(time.perf_counter() - begun)
    took = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    pipe.send(
        {"cards": cards, "clients": clients, "start_s": loaded, "seconds": took, "tokens_per_second": clients * length / took,
         "peak_gb_first_card": peak, "sum_of_updates": total}
    )  # fmt: skip
