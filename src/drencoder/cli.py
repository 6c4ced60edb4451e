"""The command line. Commands parse, call one function each, and print; torch is imported only where it is needed.

Exit codes: 0 done, 1 a check failed, 2 the user can mend it (one sentence says how), 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drencoder import __version__
from drencoder.config import Recipe, load_recipe, shipped_recipes
from drencoder.errors import DrencoderError, RecipeError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Differentially private federated fine-tuning of language models with encoded LoRA updates.",
)

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="TOML file or shipped recipe; none = the embedded quickstart")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one knob, e.g. privacy.epsilon=2")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"drencoder {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="run folder to make; default runs/NAME, runs/NAME-2, ...")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="go on with a killed run")] = None,
) -> None:
    """The main job: stage 1, stage 2, evaluation. Leaves an adapter, a ledger and a certificate."""
    from drencoder.console import RunDisplay

    console = Console()
    if resume is not None:
        if recipe is not None or set_ or out is not None:
            raise RecipeError("--resume continues a run with its own recipe: give no recipe, --set or --out beside it.")
        folder = resume
        wanted = _recipe_of(resume)
    else:
        wanted = load_recipe(recipe, set_ or ())
        folder = out or _fresh_folder(Path("runs"), wanted.name)
    display = RunDisplay(console, rounds=wanted.federation.rounds, encoder=wanted.encoder.name, name=wanted.name)
    display.say("loading torch and transformers")
    from drencoder import experiment

    try:
        result = experiment.resume(folder, display) if resume else experiment.run(wanted, folder, display)
    except KeyboardInterrupt:
        display.close()
        if (folder / "ledger.jsonl").exists():
            console.print(f"\nInterrupted. Nothing is lost: drencoder run --resume {escape(str(folder))}")
        raise SystemExit(130) from None
    finally:
        display.close()
    console.print(f"Run folder: {escape(str(result.folder))}  (adapter/, ledger.jsonl, certificate.json, report.html)")


def _fresh_folder(parent: Path, name: str) -> Path:
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def _recipe_of(folder: Path) -> Recipe:
    from drencoder.artifacts import RunFolder

    return load_recipe(RunFolder.open(folder).recipe)


@app.command()
def plan(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Epsilon per observer, noise, code size and bytes, before anything is spent."""
    from drencoder.overview import survey

    wanted = load_recipe(recipe, set_ or ())
    overview = survey(wanted)
    if json_:
        import json

        print(json.dumps(overview.to_dict(), indent=2))
        return
    from drencoder.console import plan_tables

    console = Console()
    for table in plan_tables(overview, wanted.name, wanted.encoder.name):
        console.print(table)
    for warning in overview.warnings():
        console.print(f"[yellow]Note:[/yellow] {escape(warning)}")


@app.command()
def verify(folder: RunArgument) -> None:
    """Re-accounts a run's ledger and compares it with its certificate."""
    from drencoder.verify import verify_run

    report = verify_run(folder)
    table = Table("observer", "adjacency", "certificate", "ledger", title="Epsilon, re-computed from the ledger")
    for row in report.rows:
        table.add_row(*map(str, row))
    console = Console()
    console.print(table)
    if report.trouble:
        console.print(f"[bold red]Does not hold:[/bold red] {escape(report.trouble)}")
        raise SystemExit(1)
    console.print(f"[green]Holds:[/green] {report.charges} charges, chain of hashes intact, numbers agree to 1e-6.")


@app.command()
def report(folder: RunArgument) -> None:
    """Writes RUN/report.html anew: one self-contained page."""
    from drencoder.report import write_report

    print(write_report(folder))


@app.command()
def knobs() -> None:
    """Every knob of a recipe, with its default and its meaning."""
    from drencoder.config import describe_knobs

    table = Table("knob", "default", "meaning")
    for key, default, meaning in describe_knobs():
        table.add_row(key, escape(default), escape(meaning))
    console = Console()
    console.print(table)
    console.print(f"Shipped recipes: {', '.join(shipped_recipes())}")


def main() -> None:
    """Entry point of `drencoder` and of `python -m drencoder`."""
    try:
        app()
    except DrencoderError as error:
        print(f"drencoder: {error}", file=sys.stderr)
        raise SystemExit(2) from None
