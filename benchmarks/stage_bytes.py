"""What each stage uploads: DR-Encoder's statistics against FedCG's real gradients and plain LoRA. Computed, no model needed.

    python benchmarks/stage_bytes.py [--json FILE]

Counts are those of `drencoder plan`: expected uploads of all clients, message headers included. FedCG's stage 1 sends whole
gradients in float32 (CG-FedLLM, arXiv 2405.13746); DR-Encoder's sends two statistics per LoRA tensor.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from drencoder import load_recipe
from drencoder.encoders.code_sizes import bytes_text
from drencoder.runs.plan_overview import survey
from drencoder.study.methods import METHODS

_RECIPES = (
    "paper/embedded-dolly",
    "paper/llama-7b-dolly",
    "paper/qwen-7b-dolly",
    "paper/qwen-7b-mmlu",
    "paper/llama-7b-ceval",
)
# The first Qwen-7B has fused projections; its own row, since the recipes take its successor (same shapes, q/k/v/o apart).
_FUSED = {"model.source": "Qwen/Qwen-7B", "adapter.targets": ["c_attn", "attn.c_proj"]}
_METHODS = ("dr-encoder", "fedcg-dp", "dp-lora")


def rows(recipes: Sequence[str]) -> list[dict[str, Any]]:
    made = []
    named = [(name, load_recipe(name)) for name in recipes]
    named.append(("Qwen-7B, fused", load_recipe("paper/qwen-7b-dolly").changed(_FUSED)))
    for name, base in named:
        for method in _METHODS:
            recipe = METHODS[method].recipe(
                base, epsilon=base.privacy.epsilon, seed=0, rate=1.0
            )  # bytes do not depend on it
            overview = survey(recipe)
            made.append(
                {
                    "recipe": name,
                    "method": method,
                    "adapter_values": overview.adapter_size,
                    "code_values": overview.code_size,
                    "stage1_clients": overview.privacy.stage1_cohort,
                    "stage1_bytes": overview.stage1_bytes,
                    "message_bytes": overview.message_bytes,
                    "stage2_bytes": overview.stage2_bytes,
                }
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    made = rows(_RECIPES[: 1 if args.smoke else None])
    table = Table("recipe", "method", "adapter", "code", "stage 1", "one message", "stage 2", "both")
    for row in made:
        table.add_row(
            row["recipe"],
            row["method"],
            f"{row['adapter_values']:,}",
            f"{row['code_values']:,}",
            bytes_text(row["stage1_bytes"]),
            bytes_text(row["message_bytes"]),
            bytes_text(row["stage2_bytes"]),
            bytes_text(row["stage1_bytes"] + row["stage2_bytes"]),
        )
    Console(width=130).print(table)
    if args.json:
        args.json.write_text(json.dumps({"rows": made}, indent=2) + "\n")


if __name__ == "__main__":
    main()
