"""`drencoder audit`: canaries in a recipe's or a run's own releases, and what they prove about epsilon."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from drencoder.cli.options import SetOption
from drencoder.encoders.planning import load_checked_recipe
from drencoder.encoders.unused_knobs import unused_knobs
from drencoder.errors import ArtifactError, RecipeError
from drencoder.reading import printable


def audit(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|RUN]", help="a recipe, or a finished run's folder; none = the embedded quickstart"
        ),
    ] = None,
    set_: SetOption = None,
    canaries: Annotated[int, typer.Option("--canaries", min=16, max=1_000_000, help="canaries of each kind")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="of the canaries' coins; the noise is the run's own")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="write all findings as JSON, those about clients' records, too; RUN/audit.json has the others",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="show no progress")] = False,
) -> None:
    """Audits your own recipe or run: what can an attacker really tell, and is it less than was promised?

    Canary clients, or units of sites, are in or out by a coin, in the real encoder, clip, noise and release. Their scores give lower bounds on epsilon for every
    observer; real records are attacked, and the noise, the masks and everything that a run leaves are tested. Trains nothing into
    a run and charges nothing to it. Exit code 1 if a promise does not hold.
    """
    from drencoder.runs.audit_words import AUDIT_FILE
    from drencoder.runs.display import make_console, show_note
    from drencoder.runs.run_folder import storing

    console = make_console(file=sys.stderr if json_ else sys.stdout)
    folder = _run_folder(target, set_)
    config = None if folder else load_checked_recipe(target, set_ or ())
    if out is not None and not out.parent.is_dir():
        raise ArtifactError(
            f"--out {printable(out)} is in a folder that is not there: make {printable(out.parent)} first."
        )

    class DimLines:
        def say(self, text: str) -> None:
            if not quiet:
                console.print(printable(text), style="dim", soft_wrap=True)

    listener = DimLines()
    for sentence in unused_knobs(config).values() if config and not quiet else ():
        show_note(console, "Note", sentence)
    try:
        listener.say("loading torch and transformers")
        from drencoder.audit.audit import audit_recipe, audit_run_folder

        if config is None:
            assert folder is not None
            result = audit_run_folder(folder, listener, canaries=canaries, seed=seed)
        else:
            result = audit_recipe(config, listener, canaries=canaries, seed=seed)
    except KeyboardInterrupt:
        console.print(
            "\nInterrupted. An audit leaves nothing behind and costs no budget: start it again when you like."
        )
        raise SystemExit(130) from None
    found = result.to_dict()
    text = _as_json(found)
    # What stays with a run may be handed on with it, and so has nothing that was measured on clients' records.
    kept = [(folder / AUDIT_FILE, _as_json(result.without_records().to_dict()))] if folder else []
    for path, content in [*kept, *([(out, text)] if out else [])]:
        with storing(path):
            path.write_text(content, "utf-8")
    if folder is not None:
        from drencoder.runs.report import remake_report

        listener.say(f"the report has it now: {remake_report(folder)}")
    if json_:
        print(text, end="")
    else:
        from drencoder.cli.audit_view import audit_tables

        for table in audit_tables(found):
            console.print(table)
        for note in found["notes"]:
            show_note(console, "Note", note)
        show_note(console, "What the promise means", found["sentence"])
        for failure in found["failures"]:
            show_note(console, "Broken", failure, "bold red")
        console.print(Text(found["verdict"], "bold red" if found["failures"] else "green"), soft_wrap=True)
    if found["failures"]:
        raise SystemExit(1)


def _as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _run_folder(target: str | None, overrides: list[str] | None) -> Path | None:
    """The run folder that is meant; None for a recipe.

    Raises:
      RecipeError: a run is to be audited with other settings than its own.
      ArtifactError: it is a folder and no finished run's.
    """
    if target is None or not Path(target).is_dir():
        return None
    if overrides:
        raise RecipeError("A run is audited with its own recipe: leave --set out, or give a recipe.")
    from drencoder.runs.run_folder import RunFolder

    folder = RunFolder.open(Path(target))
    if not folder.certificate.is_file():
        raise ArtifactError(
            f"{printable(target)} has no certificate yet: finish it with drencoder run --resume {printable(target)}."
        )
    return folder.path
