"""An audit in the terminal: empirical epsilon beside the promise, checks, attacks, and a verdict. No torch here."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from drencoder.runs.audit_words import bound_cell, short_checks
from drencoder.runs.display import make_table

_CAPTION = (
    "Lower bounds with 95 % (99.9 %) confidence, each under its own assumption. Gaussian: scores are independent and Gaussian. GDP: scores are "
    "independent, releases are Gaussian differentially private. one run: the coins are fair. any: any (epsilon, delta) mechanism. "
    "Where a draw is secret the first three take releases to be Gaussian and sub-sampled at the plan's rates."
)


def audit_tables(audit: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of an audit, as `RunAudit.to_dict` gives it."""
    tables = [_views_table(audit), _checks_table(audit)]
    return [*tables, _attacks_table(audit)] if audit["attacks"] else tables


def _views_table(audit: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for view in audit["views"] for name in view["bounds"]))
    titles = {"gaussian": "Gaussian", "gdp": "GDP", "one_run": "one run", "any": "any"}
    table = make_table("Empirical epsilon: canaries in the run's own releases", caption=_CAPTION)
    table.show_header = True
    for heading in ("observer", "sees", "canaries", "in / out"):
        table.add_column(heading)
    for heading in ("promised", *(titles[name] for name in names)):
        table.add_column(heading, justify="right")
    for view in audit["views"]:
        relation = "replaced" if view["relation"] == "replace_one" else "in or out"
        cells: list[str | Text] = [
            view["observer"],
            view["sees"],
            f"{view['canary']}, {relation}",
            f"{view['inside']} / {view['outside']}",
        ]
        cells.append(f"{view['promised']:.2f}")
        for name in names:
            text = bound_cell(view["bounds"].get(name))
            cells.append(Text(text, "bold red") if name in view["exceeded"] else text)
        table.add_row(*cells)
    return table


def _checks_table(audit: Mapping[str, Any]) -> Table:
    table = make_table("What must hold")
    for passed, name, found in short_checks(audit["checks"]):
        table.add_row(Text("holds", "green") if passed else Text("FAILS", "bold red"), Text(name), Text(found))
    return table


def _attacks_table(audit: Mapping[str, Any]) -> Table:
    table = make_table(
        "Real records, attacked",
        caption="AUC with 95 % interval: 0.5 is guessing. found: tokens of a text among as many best guesses.",
    )
    table.show_header = True
    for heading in ("attack", "the attacker sees"):
        table.add_column(heading)
    for heading in ("AUC", "promised at most", "found", "found without a message"):
        table.add_column(heading, justify="right")
    for one in audit["attacks"]:
        auc = one["auc"]
        table.add_row(
            one["name"], one["sees"], f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]",
            "-" if one["max_auc"] is None else f"{one['max_auc']:.3f}",
            *("" if one[key] is None else f"{one[key]:.0%}" for key in ("found", "blind")),
        )  # fmt: skip
    return table
