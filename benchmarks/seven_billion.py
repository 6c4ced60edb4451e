"""One private round of a model of LLaMA-7B's shape (D = 8,388,608) on a machine that its weights do not fit.

    python benchmarks/seven_billion.py [--layers 32] [--room 4] [--folder FOLDER] [--keep] [--json FILE] [--smoke]

The weights are random, in bfloat16, in one file for each layer; the model's tokenizer is the embedded one. The whole of `drencoder run`
follows, with `model.device = "spread"`: stage 1, the structured prior of public text, the hybrid encoder, the gate, one round of two
clients with clip, noise and decoding, checkpoint, adapter, certificate, and `drencoder verify`. `--room` is how many GB of weights may stay in
main memory; the others are read from the disk when they are needed. Asserts nothing about time.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from drencoder.models import base_model
from drencoder.models.place import embedded_folder
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
SMOKE_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
VOCABULARY, SMOKE_VOCABULARY = 32_000, 1_600


def make_folder(folder: Path, layers: int, shape: dict[str, int], vocabulary: int) -> int:
    """Writes a Llama of random weights, layer by layer; returns how many values it has."""
    embedded = embedded_folder()
    config = json.loads((embedded / "config.json").read_text()) | shape
    config |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder / name)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    ends = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
    layer = {f"self_attn.{side}_proj": (width, width) for side in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    files = [
        ends,
        *({f"model.layers.{number}.{name}": size for name, size in layer.items()} for number in range(layers)),
    ]
    generator, places, values = torch.Generator().manual_seed(0), {}, 0
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {f"{part}.weight": _weight(size, generator) for part, size in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        values += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * values}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return values


def _weight(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


class Clock:
    """Seconds of wall and of this process, and its peak memory, whenever the run says something."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._wall, self._own = time.perf_counter(), time.process_time()

    def note(self, what: str) -> None:
        """Ends a part of the run that is called `what`."""
        wall, own = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"until": what, "wall_s": wall - self._wall, "cpu_s": own - self._own, "peak_mib": peak}
        self._wall, self._own = wall, own
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def planned(self, overview: Any) -> None:
        self.note(f"planned: D = {overview.adapter_size:,}, code of {overview.code_size:,} values")

    def say(self, text: str) -> None:
        self.note(text)

    def round_done(self, row: Mapping[str, Any]) -> None:
        self.note(f"round {row.get('round', '')}")

    def finished(self, certificate: Mapping[str, Any]) -> None:
        self.note("certificate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--room", type=float, default=4.0, help="GB of weights that may stay in main memory")
    parser.add_argument("--folder", type=Path, help="where model and run lie; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the model's files there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model of two layers: whether all of this works")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=args.folder))
    (place / "model").mkdir()
    clock = Clock()
    shape, vocabulary = (SMOKE_SHAPE, SMOKE_VOCABULARY) if args.smoke else (SHAPE, VOCABULARY)
    values = make_folder(place / "model", 2 if args.smoke else args.layers, shape, vocabulary)
    clock.note(f"{values:,} random weights on the disk")
    room = 100_000 if args.smoke else int(args.room * 1e9)
    base_model.room_for_weights = lambda: {"cpu": room}  # instead of a share of what is free
    settings = {
        "model.source": place / "model", "model.dtype": "bfloat16", "model.device": "spread", "adapter.start": "peft",
        "data.examples_per_client": 1, "local.batch_size": 1, "federation.population": 2, "federation.sampling_rate": 1.0,
        "federation.rounds": 1, "privacy.trust": "central", "privacy.noise_multiplier": 1.0, "encoder.name": "hybrid",
        "encoder.ratio": 64, "encoder.gate": "warn", "prior.public": "embedded", "evaluation.data": "none",
        "speed.tokens": 512,
    }  # fmt: skip
    recipe = load_recipe("quickstart", [f"{key}={value}" for key, value in settings.items()])
    result = experiment.run(recipe, place / "run", clock)
    clock.note("the run's last files")
    check = verify_run(place / "run")
    clock.note("verified")
    table = Table(
        "until", "wall s", "CPU s", "peak MiB", title=f"{values:,} weights, {torch.get_num_threads()} thread(s)"
    )
    for row in clock.rows:
        table.add_row(row["until"][:60], f"{row['wall_s']:.0f}", f"{row['cpu_s']:.0f}", f"{row['peak_mib']:.0f}")
    Console().print(table)
    facts = {"weights": values, "threads": torch.get_num_threads(), "smoke": args.smoke, "rows": clock.rows}
    facts |= {"adapter": sum(file.stat().st_size for file in Path(result.adapter).iterdir()), "trouble": check.trouble}
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    if not args.keep:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
