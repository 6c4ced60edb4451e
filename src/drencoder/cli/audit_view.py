"""An audit in the terminal: one table per leakage."""

from rich.table import Table
from rich.text import Text

from drencoder.audit.findings import LEAKAGES, Audit, Finding

__all__ = ["audit_tables"]

_CAPTION = (
    "AUC with 95 % interval: 0.5 is guessing, 1 is certainty. max AUC: the most that the accounting allows for this release; "
    "- where nothing is promised."
)


def audit_tables(audit: Audit) -> list[Table]:
    """One table per leakage; then one text read from an unprotected upload; then what to keep in mind."""
    tables = [
        _findings_table(title, [finding for finding in audit.findings if finding.leakage == leakage])
        for leakage, title in LEAKAGES.items()
    ]
    return [*tables, _example_table(audit), _verdict_table(audit)]


def _findings_table(title: str, findings: list[Finding]) -> Table:
    found = any(finding.found is not None for finding in findings)
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    for heading in ("arm", "the attacker sees", "attack"):
        table.add_column(heading)
    for heading in ("AUC", "max AUC", *(("found",) if found else ()), "pos / neg"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(finding.note for finding in findings):
        table.add_column("note")
    for finding in findings:
        style = "red" if finding.max_auc is None else "dim" if finding.sabotaged else ""
        cells = [finding.arm, finding.sees, finding.attack, _auc(finding)]
        cells.append("-" if finding.max_auc is None else f"{finding.max_auc:.3f}")
        if found:
            cells.append("" if finding.found is None else f"{finding.found:.0%}")
        cells += [f"{finding.auc.positives} / {finding.auc.negatives}", finding.note]
        table.add_row(*cells[: len(table.columns)], style=style)
    return table


def _auc(finding: Finding) -> str:
    auc = finding.auc
    mark = " [bold]![/bold]" if finding.exposed else ""
    return f"{auc.value:.3f} \\[{auc.low:.3f}, {auc.high:.3f}]{mark}"


def _example_table(audit: Audit) -> Table:
    example = audit.example
    table = Table(title="One text, read from an unprotected upload", title_justify="left", show_header=False)
    table.add_row("the client's text", Text(example["text"]))
    table.add_row(f"{example['wanted']} best tokens", Text(" | ".join(token.strip() for token in example["recovered"])))
    table.add_row("of them right", str(example["right"]))
    return table


def _verdict_table(audit: Audit) -> Table:
    table = Table(title="What to keep in mind", title_justify="left", show_header=False)
    for finding in audit.broken:
        table.add_row(
            f"[red]A promise was measured not to hold[/red]: {finding.arm}, {finding.sees}, {finding.attack}."
        )
    for finding in audit.toothless:
        table.add_row(f"Sabotage went unnoticed ({finding.arm}, {finding.attack}): raise trials, or lower epsilon.")
    for note in audit.notes:
        table.add_row(note)
    return table
