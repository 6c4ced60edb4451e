"""`drencoder generate`: one text, one answer. Torch is imported when it is needed."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from drencoder.errors import RecipeError
from drencoder.reading import shown


def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="an instruction; - reads it from the standard input")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=1_000_000, help="tokens of the answer at most")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the most likely token; 1: as the model has it")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="of what is drawn with --temperature")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda; default as the run")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print the answer alone")] = False,
) -> None:
    """What a finished run's model answers: base and adapter, prompted as the clients' records were."""
    if not math.isfinite(temperature):
        raise RecipeError(f"--temperature {temperature} is not finite: give 0 or a number such as 0.7.")
    if not -(1 << 63) <= seed < 1 << 63:
        raise RecipeError(f"--seed {shown(seed)} is out of range: give a number of at most 63 bits.")
    if device not in (None, "auto", "cpu", "cuda"):
        raise RecipeError(f"--device {shown(device)} is not known: choose one of auto, cpu, cuda.")
    if text == "-":
        text = sys.stdin.read()
    from drencoder.reading import printable

    if not (quiet or json_):
        print("loading torch and the model", file=sys.stderr)
    from drencoder.runs.generate import generate as ask

    answer = ask(folder, text, max_tokens=max_tokens, temperature=temperature, seed=seed, device=device)
    if json_:
        print(json.dumps({"run": str(folder), **answer.to_dict()}, indent=2, ensure_ascii=False))
        return
    print("\n".join(map(printable, answer.text.splitlines())))
    if not (quiet or answer.ended):
        print(f"(cut after {answer.tokens} tokens; --max-tokens gives more)", file=sys.stderr)
