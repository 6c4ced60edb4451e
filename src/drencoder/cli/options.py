"""Options that several commands share, and what they mean together."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drencoder.encoders.planning import load_checked_recipe
from drencoder.errors import ArtifactError, RecipeError
from drencoder.recipe.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from drencoder.runs.run import RunResult

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="TOML file or shipped recipe; none = the embedded quickstart, or the defaults where --set names a model or data of your own",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one knob, e.g. privacy.epsilon=2")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="run folder to make; default runs/NAME, runs/NAME-2, ...")
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="show the run folder alone")]
JsonOption = Annotated[bool, typer.Option("--json", help="print nothing but the result, as JSON")]
ResumeOption = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="go on with a killed run")]


def choose_run(
    recipe: str | None,
    overrides: list[str] | None,
    out: Path | None,
    resume: Path | None,
    *,
    needs_ledger: bool = False,
) -> tuple[Path, Recipe]:
    """Returns the run folder and the recipe of a new run, or with `resume` those of the run that goes on.

    Raises:
      RecipeError: `resume` stands beside options of a new run, or the recipe cannot be meant.
      ArtifactError: `resume` is no run folder or, with `needs_ledger`, has no ledger; or the new run's folder is taken.
    """
    from drencoder.runs.run_folder import RunFolder

    if resume is not None:
        if recipe is not None or overrides or out is not None:
            raise RecipeError("--resume continues a run with its own recipe: give no recipe, --set or --out beside it.")
        if needs_ledger and not (resume / "ledger.jsonl").exists():
            raise ArtifactError(
                f"{resume} has no ledger: give the folder of a started run; if it is one, restore its ledger from a copy."
            )
        return resume, load_recipe(RunFolder.open(resume).recipe)
    config = load_checked_recipe(recipe, overrides or ())
    folder, number = out or Path("runs") / config.name, 1
    while out is None and folder.exists():
        number += 1
        folder = Path("runs") / f"{config.name}-{number}"
    RunFolder.check_free(folder)
    return folder, config


def print_result(result: "RunResult", *, quiet: bool, json_: bool) -> None:
    """Prints where a finished run lies, with its certificate (`json_`), alone (`quiet`), or for a person."""
    from drencoder.reading import printable
    from drencoder.runs.display import make_console, show_run_folder

    if json_:
        twin = None if result.twin is None else result.twin.certificate
        print(json.dumps({"folder": str(result.folder), "certificate": result.certificate, "twin": twin}, indent=2))
    elif quiet:
        print(printable(result.folder))
    else:
        show_run_folder(make_console(), result.folder)


def tell_interrupted(command: str, folder: Path, *, to_stderr: bool) -> SystemExit:
    """Says how an interrupted run goes on; returns what the command ends with."""
    from drencoder.runs.display import make_console
    from drencoder.runs.interrupted import resume_hint

    make_console(stderr=to_stderr).print(resume_hint(command, folder), soft_wrap=True)
    return SystemExit(130)
