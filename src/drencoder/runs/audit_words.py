"""An audit's numbers in words, for the terminal and for the report. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

AUDIT_FILE = "audit.json"
"""What `drencoder audit RUN` leaves in the run folder, for the report. It is no part of the run and has no digest in its ledger."""


def bound_cell(bound: Mapping[str, Any] | None) -> str:
    """The lower bounds at 95 and 99.9 %, or a dash where there is none."""
    if bound is None:
        return "-"
    near, sure = (value if isinstance(value, str) else f"{value:.2f}" for value in (bound["95"], bound["99.9"]))
    return f"{near} ({sure})"


def short_checks(checks: Sequence[Mapping[str, Any]]) -> list[tuple[bool, str, str]]:
    """(passed, name, what was found) of each check, those that fail first."""
    return sorted(
        ((bool(one["passed"]), str(one["name"]), str(one["found"])) for one in checks), key=lambda row: row[0]
    )
