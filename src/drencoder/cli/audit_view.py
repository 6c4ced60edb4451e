"""An audit in the terminal: one table per leakage."""

from rich.table import Table
from rich.text import Text

from drencoder.audit.findings import LEAKAGES, Audit, Finding
from drencoder.reading import printable
from drencoder.runs.display import make_table

__all__ = ["audit_tables"]

_CAPTION = (
    "AUC with 95 % interval: 0.5 is guessing, 1 is certainty. max AUC: the most that the accounting allows for this release; "
    "- where nothing is promised."
)


def audit_tables(audit: Audit) -> list[Table]:
    """Returns one table per leakage, one text that was read from an unprotected upload, and what to keep in mind."""
    tables = [
        _findings_table(title, [finding for finding in audit.findings if finding.leakage == leakage])
        for leakage, title in LEAKAGES.items()
    ]
    return [*tables, _example_table(audit), _verdict_table(audit)]


def _findings_table(title: str, findings: list[Finding]) -> Table:
    has_tokens = any(finding.tokens_found is not None for finding in findings)
    table = make_table(title, caption=_CAPTION)
    table.show_header = True
    for heading in ("arm", "the attacker sees", "attack"):
        table.add_column(heading)
    for heading in ("AUC", "max AUC", *(("found",) if has_tokens else ()), "pos / neg"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(finding.note for finding in findings):
        table.add_column("note")
    for finding in findings:
        style = "red" if finding.max_auc is None else "dim" if finding.sabotaged else ""
        cells: list[str | Text] = [finding.arm, finding.sees, finding.attack, _auc_cell(finding)]
        cells.append("-" if finding.max_auc is None else f"{finding.max_auc:.3f}")
        if has_tokens:
            cells.append("" if finding.tokens_found is None else f"{finding.tokens_found:.0%}")
        cells += [f"{finding.auc.positives} / {finding.auc.negatives}", finding.note]
        table.add_row(*cells[: len(table.columns)], style=style)
    return table


def _auc_cell(finding: Finding) -> Text:
    auc = finding.auc
    return Text.assemble(f"{auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]", (" !" if finding.exposed else "", "bold"))


def _example_table(audit: Audit) -> Table:
    example = audit.example
    table = make_table("One text, read from an unprotected upload")
    table.add_row("the client's text", Text(printable(example["text"])))
    best = " | ".join(token.strip() for token in example["recovered"])
    table.add_row(f"{example['num_tokens']} best tokens", Text(printable(best)))
    table.add_row("of them right", str(example["right"]))
    return table


def _verdict_table(audit: Audit) -> Table:
    table = make_table("What to keep in mind")
    for finding in audit.broken:
        where = f": {finding.arm}, {finding.sees}, {finding.attack}."
        table.add_row(Text.assemble(("A promise was measured not to hold", "red"), where))
    for finding in audit.unnoticed:
        table.add_row(f"Sabotage went unnoticed ({finding.arm}, {finding.attack}): raise trials, or lower epsilon.")
    for note in audit.notes:
        table.add_row(note)
    return table
