"""What a person sees at the end of a run beside its table: sample answers, and the twin, if there is one. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from drencoder.reading import printable
from drencoder.runs.display import estimate_cell, make_table, show_note
from drencoder.runs.run_folder import RunFolder


def show_samples(console: Console, path: Path) -> None:
    """Prints what base and adapted model answered to public prompts, if they were asked."""
    folder = RunFolder(path)
    if not folder.samples.exists():
        return
    samples = folder.read_json(folder.samples)
    for row in samples["rows"]:
        console.print(Text.assemble(("Prompt: ", "bold"), printable(row["prompt"])))
        for name, words in (("base model", row["base"]), ("this run", row["adapted"])):
            console.print(Text.assemble((f"  {name}: ", "dim"), printable(" ".join(words.split())) or "(nothing)"))
    if samples["rows"]:
        console.print(
            Text(f"The prompts are {printable(samples['prompts_are'])}; no client's text is among them.", "dim")
        )


def show_twin(console: Console, certificate: Mapping[str, Any], twin: Mapping[str, Any]) -> None:
    """Prints run and twin side by side, and that the twin's numbers are for this user only."""
    table = make_table("Twin without noise (NOT private)", "model", "held-out loss", words=("model",))
    pairs = (
        ("base model", certificate, "base model"),
        ("this run", certificate, "this run"),
        ("twin", twin, "this run"),
    )
    for name, facts, result in pairs:
        loss = facts["results"][result]["loss"]
        table.add_row(name, "-" if loss is None else estimate_cell(loss["value"], loss["low"], loss["high"]))
    console.print(table)
    show_note(console, "NOT PRIVATE", certificate["twin"], "bold red")
