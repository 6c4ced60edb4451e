"""The command line. Commands parse, call one function each, and print; torch is imported only where it is needed.

Exit codes: 0 done, 1 a check failed, 2 the user can mend it (one sentence says how), 130 interrupted.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drencoder import __version__
from drencoder.cli.flower import add_flower_commands
from drencoder.errors import DrencoderError, RecipeError
from drencoder.recipe.recipe import Recipe, load_recipe, shipped_recipes

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
    from drencoder.runs.display import RunDisplay, interrupted

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
    try:
        display.say("loading torch and transformers")
        from drencoder.runs import run as experiment

        result = experiment.resume(folder, display) if resume else experiment.run(wanted, folder, display)
    except KeyboardInterrupt:
        display.close()
        console.print(interrupted("run", folder))
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
    from drencoder.runs.run_folder import RunFolder

    return load_recipe(RunFolder.open(folder).recipe)


@app.command()
def plan(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="the accumulated budget per round under PLD and RDP")] = False,
    sigmas: Annotated[
        str, typer.Option("--sigmas", metavar="LIST", help="with --curve: noise multipliers, e.g. 0.8,1,1.5")
    ] = "",
    observer: Annotated[str | None, typer.Option("--observer", help="with --curve: server, clients or public")] = None,
    relation: Annotated[str | None, typer.Option("--relation", help="with --curve: add_remove or replace_one")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="with --curve: draw it")] = None,
) -> None:
    """Epsilon per observer, noise, code size and bytes, before anything is spent."""
    from drencoder.runs.plan_overview import survey

    wanted = load_recipe(recipe, set_ or ())
    if curve:
        _plan_curve(wanted, _numbers(sigmas), observer, relation, plot, json_)
        return
    if sigmas or observer or relation or plot:
        raise RecipeError("--sigmas, --observer, --relation and --plot belong to --curve: give it too.")
    overview = survey(wanted)
    if json_:
        print(json.dumps(overview.to_dict(), indent=2))
        return
    from drencoder.runs.display import plan_tables

    console = Console()
    for table in plan_tables(overview, wanted.name, wanted.encoder.name):
        console.print(table)
    for warning in overview.warnings():
        console.print(f"[yellow]Note:[/yellow] {escape(warning)}")


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise RecipeError(f"--sigmas {text!r} is not a list of numbers: write, say, 0.8,1,1.5.") from None


def _plan_curve(
    recipe: Recipe,
    sigmas: list[float] | None,
    observer: str | None,
    relation: str | None,
    plot: Path | None,
    json_: bool,
) -> None:
    from drencoder.cli.budget_view import budget_tables
    from drencoder.privacy.budget_table import budget_table
    from drencoder.runs.plan_overview import privacy_plan
    from drencoder.runs.plots import plot_budget, save_figure

    budget = budget_table(privacy_plan(recipe), sigmas, observer=observer, relation=relation)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(budget.to_dict(), indent=2))
    else:
        for table in budget_tables(budget):
            Console().print(table)
    if plot is not None:
        print(f"Plot: {save_figure(plot_budget(budget), plot)}", file=sys.stderr)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the comparison, made or continued; default comparisons/NAME")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=0, help="cells at a time; 0 = one per core")] = 0,
) -> None:
    """Methods x budgets x seeds under one accountant, tuned alike: a table, two plots, paired tests.

    The recipe's [compare] section says what is run. A comparison that was stopped goes on when started again.
    """
    from drencoder.cli.compare_view import CompareDisplay, comparison_table
    from drencoder.study.compare import compare as run_comparison
    from drencoder.study.compare_table import rows_of, write_comparison

    console = Console()
    wanted = load_recipe(recipe, set_ or ())
    folder = out or Path("comparisons") / wanted.name
    display = CompareDisplay(console, tuning_seed=wanted.compare.tuning_seed)
    try:
        results, tracks = run_comparison(wanted, folder, display, processes=processes)
    except KeyboardInterrupt:
        display.close()
        console.print("\nInterrupted. Finished cells are kept: start the same command again to go on.")
        raise SystemExit(130) from None
    finally:
        display.close()
    rows = rows_of(wanted, tracks, results, folder)
    console.print(comparison_table(rows))
    for path in write_comparison(wanted, rows, folder):
        console.print(f"Written: {escape(str(path))}")


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model: embedded, folder, hub id")
    ],
    benchmark: Annotated[list[str] | None, typer.Option("--benchmark", help="mmlu or ceval; may be repeated")] = None,
    from_: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="NAME=WHERE", help="e.g. mmlu=FOLDER, ceval=hub:ceval/ceval-exam"),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="part of the benchmark")] = None,
    subject: Annotated[list[str] | None, typer.Option("--subject", help="only this subject; may be repeated")] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="worked examples, 0 to 5")] = None,
    template: Annotated[str | None, typer.Option("--template", help="plain or standard")] = None,
    count: Annotated[int | None, typer.Option("--count", help="questions per benchmark; 0 = all")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Log-likelihood multiple choice per subject and category, and held-out loss, against the base model."""
    from drencoder.cli.assess_view import assessment_tables
    from drencoder.runs.assess import assess

    where = {}
    for entry in from_ or ():
        name, equals, place = entry.partition("=")
        if not equals or not place:
            raise RecipeError(f"--from {entry!r} is not NAME=WHERE: write, say, mmlu=data/mmlu.")
        where[name] = place
    found = assess(
        target, benchmarks=benchmark, where=where, split=split, subjects=subject, shots=shots, template=template,
        count=count, device=device,
    )  # fmt: skip
    if json_:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    for table in assessment_tables(found):
        Console().print(table)


@app.command()
def audit(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|RUN]", help="a recipe, or a run folder to take it from")
    ] = None,
    set_: SetOption = None,
    clients: Annotated[int, typer.Option("--clients", min=8, help="clients under attack")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="of the audit")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="write the findings as JSON")] = None,
) -> None:
    """Attacks on the three leakages: a client's text, the encoder's training set, who took part.

    Each attack meets the same updates without protection, under FedCG, DR-Encoder and this project's default. Exit code 1
    if an attack beats its bound or misses a planted sabotage.
    """
    from drencoder.cli.audit_view import audit_tables

    console = Console()
    is_run = recipe is not None and (Path(recipe) / "recipe.resolved.toml").is_file()
    wanted = load_recipe(str(Path(recipe or "") / "recipe.resolved.toml") if is_run else recipe, set_ or ())
    from drencoder.audit.leakages import audit_leakages
    from drencoder.runs.build import build

    class Lines:
        def say(self, text: str) -> None:
            console.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    found = audit_leakages(build(wanted), clients=clients, seed=seed, listener=Lines())
    for table in audit_tables(found):
        console.print(table)
    if out is not None:
        from drencoder.runs.run_folder import storing

        with storing(out):
            out.write_text(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    if found.broken or found.toothless:
        raise SystemExit(1)


@app.command()
def verify(folder: RunArgument) -> None:
    """Re-accounts a run's ledger and compares it with its certificate."""
    from drencoder.runs.verify import verify_run

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
    from drencoder.runs.report import write_report

    print(write_report(folder))


@app.command()
def knobs() -> None:
    """Every knob of a recipe, with its default and its meaning."""
    from drencoder.recipe.recipe import describe_knobs

    table = Table("knob", "default", "meaning")
    for key, default, meaning in describe_knobs():
        table.add_row(key, escape(default), escape(meaning))
    console = Console()
    console.print(table)
    console.print(f"Shipped recipes: {', '.join(shipped_recipes())}")


add_flower_commands(app)


def main() -> None:
    """Entry point of `drencoder` and of `python -m drencoder`."""
    try:
        app()
    except DrencoderError as error:
        print(f"drencoder: {error}", file=sys.stderr)
        raise SystemExit(2) from None
