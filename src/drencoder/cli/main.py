"""The command line. Commands parse, call one function each, and print; torch is imported only where it is needed.

Exit codes: 0 done, 1 a check failed, 2 the user can mend it (one sentence says how), 70 an error that nobody foresaw (its
type and place are shown, its message is not: it may quote a record), 130 interrupted, 141 nobody reads the output any more.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from drencoder import __version__
from drencoder.cli.audit import audit
from drencoder.cli.endings import end, end_disk, end_usage, open_streams, stop_writing
from drencoder.cli.flower import add_flower_commands
from drencoder.cli.generate import generate
from drencoder.cli.options import (
    JsonOption,
    OutOption,
    QuietOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    choose_run,
    print_result,
    tell_interrupted,
)
from drencoder.cli.verify import verify
from drencoder.encoders.planning import load_checked_recipe
from drencoder.errors import DrencoderError, RecipeError, hide_crash_messages
from drencoder.reading import printable, shown
from drencoder.recipe.recipe import Recipe, shipped_recipes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # it would print local variables: clients' text
    pretty_exceptions_show_locals=False,
    help="Differentially private federated fine-tuning of language models with encoded LoRA updates.",
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"drencoder {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    twin: Annotated[
        bool,
        typer.Option("--twin", help="train a twin without noise afterwards: NOT private, for who holds all text only"),
    ] = False,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """The main job: stage 1, stage 2, evaluation. Leaves an adapter, a ledger and a certificate.

    The adapted model answers sample prompts at the end, unless -q or --json is given.
    """
    from drencoder.cli.run_view import show_samples, show_twin
    from drencoder.runs.display import RunDisplay, make_console

    alone = quiet or json_
    console = make_console(quiet=alone)
    folder, config = choose_run(recipe, set_, out, resume)
    display = RunDisplay(console, rounds=config.federation.rounds, encoder=config.encoder.name, name=config.name)
    try:
        display.say("loading torch and transformers")
        from drencoder.runs import run as experiment

        result = (
            experiment.resume(folder, display, twin=twin, samples=not alone)
            if resume
            else experiment.run(config, folder, display, twin=twin, samples=not alone)
        )
    except KeyboardInterrupt:
        display.close()
        raise tell_interrupted("run", folder, to_stderr=alone) from None
    finally:
        display.close()
    show_samples(console, result.folder)
    if result.twin is not None:
        show_twin(console, result.certificate, result.twin.certificate)
    print_result(result, quiet=quiet, json_=json_)


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
    """What the data hold, epsilon per observer, noise, code size and bytes, before anything is spent."""
    from drencoder.cli.data_view import data_table, read_data, unit_table
    from drencoder.runs.judgement import judge
    from drencoder.runs.plan_overview import survey
    from drencoder.runs.unit_table import compare_units, other_number

    config = load_checked_recipe(recipe, set_ or ())
    if curve:
        _show_curve(config, _parse_numbers(sigmas), observer, relation, plot, json_)
        return
    if sigmas or observer or relation or plot:
        raise RecipeError("--sigmas, --observer, --relation and --plot belong to --curve: give it too.")
    overview = survey(config)
    data, missing = read_data(config)
    judgement = judge(config, overview.privacy, data.records - data.evaluation_records if data else None)
    units = compare_units(config, data)
    if json_:
        read = {
            "data": data.to_dict() if data else None,
            "judgement": judgement,
            "units": [u.to_dict() for u in units],
        }
        print(json.dumps({**overview.to_dict(), **read}, indent=2))
        return
    from drencoder.runs.display import make_console, plan_tables, show_note

    console = make_console()
    if data is not None:
        console.print(data_table(data, config.data.max_tokens))
    for table in plan_tables(overview, config.name, config.encoder.name):
        console.print(table)
    if units:
        console.print(unit_table(units, config))
    for sentence in judgement:
        show_note(console, "Judgement", sentence, "bold")
    for warning in filter(None, [*overview.warnings(), other_number(config, data), missing]):
        show_note(console, "Note", warning)


def _parse_numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise RecipeError(f"--sigmas {shown(text)} is not a list of numbers: write, say, 0.8,1,1.5.") from None


def _show_curve(
    recipe: Recipe,
    sigmas: list[float] | None,
    observer: str | None,
    relation: str | None,
    plot: Path | None,
    json_: bool,
) -> None:
    from drencoder.cli.budget_view import budget_tables
    from drencoder.privacy.budget_table import budget_table
    from drencoder.runs.display import make_console
    from drencoder.runs.plan_overview import privacy_plan
    from drencoder.runs.plots import plot_budget, save_figure

    budget = budget_table(privacy_plan(recipe), sigmas, observer=observer, relation=relation)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(budget.to_dict(), indent=2))
    else:
        for table in budget_tables(budget):
            make_console().print(table)
    if plot is not None:
        print(f"Plot: {save_figure(plot_budget(budget), plot)}", file=sys.stderr)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the comparison, made or continued; default comparisons/NAME")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=0, max=1024, help="cells at a time; 0 = one per core")
    ] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="show the comparison's folder alone")] = False,
    json_: JsonOption = False,
) -> None:
    """Methods x budgets x seeds under one accountant, tuned alike: a table, two plots, paired tests.

    The recipe's \\[compare] table says what is run, and --set compare.KEY=VALUE overrides it: methods, epsilons, seeds, rates,
    tuning_seed, tuning_runs, tuning_factor. A comparison that was stopped goes on when started again.
    """
    from drencoder.cli.compare_view import CompareDisplay, comparison_table
    from drencoder.runs.display import make_console, show_note
    from drencoder.study.compare import compare as run_comparison
    from drencoder.study.compare import knobs_of_no_method
    from drencoder.study.compare_table import rows_of, write_comparison
    from drencoder.study.settings import load_comparison

    console = make_console(quiet=quiet or json_)
    config, settings = load_comparison(recipe, set_ or ())
    folder = out or Path("comparisons") / config.name
    for sentence in knobs_of_no_method(config, settings):
        show_note(console, "Note", sentence)
    display = CompareDisplay(console, tuning_seed=settings.tuning_seed)
    try:
        results, tracks = run_comparison(config, settings, folder, display, processes=processes)
    except KeyboardInterrupt:
        display.close()
        make_console(stderr=quiet or json_).print(
            "\nInterrupted. Finished cells are kept: start the same command again to go on."
        )
        raise SystemExit(130) from None
    finally:
        display.close()
    rows = rows_of(config, settings, tracks, results, folder)
    console.print(comparison_table(rows))
    for path in write_comparison(config, settings, rows, folder):
        console.print(f"Written: {printable(path)}", soft_wrap=True)
    if json_:
        print((folder / "table.json").read_text("utf-8"), end="")
    elif quiet:
        print(printable(folder))


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model: embedded, folder, hub id")
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="LIST", help="tasks of lm-eval, e.g. mmlu,ceval,hellaswag")
    ] = "",
    from_: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="TASK=FOLDER", help="a task's data, e.g. mmlu=FOLDER with the original CSV files"
        ),
    ] = None,
    subjects: Annotated[str, typer.Option("--subjects", metavar="LIST", help="of mmlu and ceval; default all")] = "",
    shots: Annotated[int | None, typer.Option("--shots", help="worked examples; default as the task says")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="questions per subject, the first ones")] = None,
    batch: Annotated[int, typer.Option("--batch", help="requests of one forward pass")] = 16,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="show no progress")] = False,
) -> None:
    """Benchmark scores by lm-eval, the adapter in pairs with its base model. Nothing is downloaded.

    Without --tasks: the pairs of a finished run's own quick evaluation, which needs no model.
    """
    from drencoder.cli.assess_view import assessment_tables, progress_lines
    from drencoder.runs.assess import assess
    from drencoder.runs.display import make_console

    places = {}
    for entry in from_ or ():
        name, equals, place = entry.partition("=")
        if not equals or not name or not place:
            raise RecipeError(f"--from {shown(entry)} is not TASK=FOLDER: write, say, mmlu=data/mmlu.")
        places[name.strip()] = place
    with progress_lines(quiet) as report_progress:
        assessment = assess(
            target, tasks=_names(tasks), places=places, subjects=_names(subjects), shots=shots, limit=limit,
            batch=batch, device=device, on_progress=report_progress,
        )  # fmt: skip
    if json_:
        print(json.dumps(assessment.to_dict(), indent=2, ensure_ascii=False))
        return
    for table in assessment_tables(assessment):
        make_console().print(table)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


app.command()(audit)


@app.command()
def report(folder: RunArgument) -> None:
    """Writes RUN/report.html anew: one self-contained page."""
    from drencoder.runs.report import remake_report

    print(printable(remake_report(folder)))


@app.command()
def knobs(json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Every knob of a recipe, with its default and its meaning."""
    from drencoder.encoders.registry import ENCODERS
    from drencoder.recipe.recipe import describe_knobs

    names = f" ({', '.join(ENCODERS)})"
    rows = [(key, default, meaning + names * (key == "encoder.name")) for key, default, meaning in describe_knobs()]
    if json_:
        knobs = {key: {"default": default, "meaning": meaning} for key, default, meaning in rows}
        print(json.dumps({"knobs": knobs, "recipes": list(shipped_recipes())}, indent=2, ensure_ascii=False))
        return
    from drencoder.runs.display import make_console, make_table

    headings = ("knob", "default", "meaning")
    table = make_table("Knobs of a recipe", *headings, words=headings)
    for row in rows:
        table.add_row(*row)
    console = make_console()
    console.print(table)
    console.print(f"Shipped recipes: {', '.join(shipped_recipes())}")


app.command()(verify)
app.command()(generate)
add_flower_commands(app)


def main() -> None:
    """Entry point of `drencoder` and of `python -m drencoder`."""
    open_streams()
    with hide_crash_messages():
        try:
            try:
                code = app(standalone_mode=False)
            finally:
                sys.stdout.flush()  # here, where a closed or full output can still be told from a failed check
        except DrencoderError as error:
            end(str(error))
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # typer and rich make exit code 1 of it
                stop_writing(141)
            raise
        except BrokenPipeError:
            stop_writing(141)
        except OSError as error:
            if type(error).__module__ != "builtins" or error.errno is None:  # a library's own
                raise
            end_disk(error)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            end_usage(error)
        raise SystemExit(code or 0)
