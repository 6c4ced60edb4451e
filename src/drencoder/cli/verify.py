"""`drencoder verify`: for an auditor. No torch."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from drencoder.reading import printable


def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="sign the ledger's last line if everything holds")
    ] = None,
    signed_by: Annotated[
        list[Path] | None,
        typer.Option("--signed-by", metavar="PUB|DIR", help="public keys of those who must have signed"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print only what does not hold")] = False,
) -> None:
    """Re-accounts a run's ledger and compares it with its certificate and all files; signs it on request."""
    from drencoder.runs.run_folder import RunFolder
    from drencoder.runs.signatures import fingerprint, read_signers, sign_run
    from drencoder.runs.verify import verify_run

    names = {key: name for place in signed_by or () for key, name in read_signers(place).items()}
    report = verify_run(folder, names)
    signed = [f"{fingerprint(key)}{f' ({names[key]})' if key in names else ''}" for key in report.signers]
    signer = sign_run(RunFolder.open(folder), sign) if sign is not None and not report.trouble else None
    if json_:
        rows = [dict(zip(("observer", "adjacency", "certificate", "ledger"), row, strict=True)) for row in report.rows]
        facts = {
            "run": str(folder),
            "holds": not report.trouble,
            "troubles": list(report.troubles),
            "charges": report.charges,
            "epsilon": rows,
            "signed": signed,
            "signed_now": signer,
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(report.rows, signed, report.charges, report.trouble, signer, quiet)
    if report.trouble:
        raise SystemExit(1)


def _show(
    rows: list[tuple[str, str, str, str]],
    signed: list[str],
    charges: int,
    trouble: str,
    signer: str | None,
    quiet: bool,
) -> None:
    from drencoder.runs.display import make_console, make_table

    console = make_console()
    if not quiet:
        headings = ("observer", "adjacency", "certificate", "ledger")
        table = make_table("Epsilon, re-computed from the ledger", *headings, words=headings)
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)
        for key in signed:
            console.print(Text.assemble(("Signed: ", "green"), printable(key)), soft_wrap=True)
    if trouble:
        console.print(Text.assemble(("Does not hold: ", "bold red"), printable(trouble)))
    elif not quiet:
        words = f"{charges} charges, chain of hashes intact, numbers agree to 1e-6."
        console.print(Text.assemble(("Holds: ", "green"), words))
        if signer is not None:
            console.print(Text.assemble(("Signed now: ", "green"), signer), soft_wrap=True)
