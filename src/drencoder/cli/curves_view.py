"""The privacy curves as tables for a terminal. Each table says which of its columns are guarantees. No torch here."""

import math

from rich.table import Table
from rich.text import Text

from drencoder.privacy.curves import ACCOUNTANTS, BudgetPoint, CompositionPart, PrivacyCurves, SigmaCurve, mu_conversion
from drencoder.runs.display import make_table

__all__ = ["curve_tables"]

_SHOWN_ROUNDS = 9
_MUS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_MARK = "*"
_NOT_A_GUARANTEE = f"{_MARK} an approximation, not a guarantee: it can lie far below the truth"


def curve_tables(curves: PrivacyCurves) -> list[Table]:
    """Returns for each sigma the budget after some of the rounds and its composition, and then what mu is worth."""
    tables = []
    for curve in curves.curves:
        tables += [_rounds_table(curves, curve), _composition_table(curves, curve)]
    return [*tables, _conversion_table(curves)]


def _rounds_table(curves: PrivacyCurves, curve: SigmaCurve) -> Table:
    used = [a for a in ACCOUNTANTS if any(getattr(point, a.field) is not None for point in curve.points)]
    caption = ["guarantees: " + ", ".join(a.label for a in used if a.is_guarantee)]
    if math.isinf(curve.last.epsilon_pld):
        caption = ["no guarantee: this observer sees a release without noise"]
    if not all(a.is_guarantee for a in used):
        caption.append(_NOT_A_GUARANTEE)
    if curve.grid_error > 0:
        caption.append(f"PLD before the last round: an upper bound, high by at most about {curve.grid_error:.0e}")
    adjacency = {"add_remove": "add/remove", "replace_one": "replace-one"}[curves.relation]
    table = make_table(
        f"Epsilon spent at sigma = {curve.noise_multiplier:.4g}: {curves.observer}'s view, {adjacency}, "
        f"delta = {curves.delta:g}",
        "after round",
        *(accountant.label + ("" if accountant.is_guarantee else _MARK) for accountant in used),
        caption="\n".join(caption),
    )
    for point in _select_points(curve):
        name = "stage 1" if point.round == 0 else str(point.round)
        table.add_row(name, *(_number_cell(getattr(point, accountant.field)) for accountant in used))
    return table


def _select_points(curve: SigmaCurve) -> list[BudgetPoint]:
    """Returns at most nine of the points, the first and the last among them."""
    last, count = len(curve.points) - 1, min(len(curve.points), _SHOWN_ROUNDS)
    return [curve.points[i] for i in sorted({round(last * k / max(1, count - 1)) for k in range(count)})]


def _composition_table(curves: PrivacyCurves, curve: SigmaCurve) -> Table:
    """Returns the parts of the plan and their mu, whose squares add up."""
    exact = curve.last.mu is not None
    mark, limit = ("", False) if exact else (_MARK, curve.last.mu_clt is not None)
    caption = "mu^2 adds up over the parts" + ("" if exact else f"; {_NOT_A_GUARANTEE}")
    shown = exact or limit
    table = make_table(
        f"Composition at sigma = {curve.noise_multiplier:.4g}",
        *("part", "releases", *((f"mu{mark}", f"mu^2{mark}") if shown else ())),
        words=("part", "releases"),
        caption=caption if shown else "sub-sampled: no exact mu; the PLD composes these releases",
    )
    for part in curve.parts:
        table.add_row(part.name, part.events, *(_mu_cells(_mu_of(part, exact=exact)) if shown else ()))
    if shown:
        total = curve.last.mu if exact else curve.last.mu_clt
        table.add_row("whole plan", "", *_mu_cells(total), style="bold")
    return table


def _mu_of(part: CompositionPart, *, exact: bool) -> float | None:
    # Beside sub-sampled parts an exact part enters the limit with its own mu.
    return part.mu if exact or part.mu_clt is None else part.mu_clt


def _mu_cells(mu: float | None) -> tuple[Text, Text]:
    return _number_cell(mu), _number_cell(None if mu is None else mu * mu)


def _conversion_table(curves: PrivacyCurves) -> Table:
    """Returns epsilon(delta) for some mu. The conversion is exact, whatever the mu came from."""
    table = make_table(
        f"What mu-GDP is worth at delta = {curves.delta:g}",
        *("mu", "epsilon", "from"),
        words=("from",),
        caption="the conversion is exact; an approximate mu gives an approximate epsilon",
    )
    rows = [(mu, "") for mu in _MUS]
    for curve in curves.curves:
        sigma = f"sigma = {curve.noise_multiplier:.4g}"
        if curve.last.mu is not None and math.isfinite(curve.last.mu):
            rows.append((curve.last.mu, f"{sigma}, exact"))
        elif curve.last.mu_clt is not None:
            rows.append((curve.last.mu_clt, f"{sigma}, CLT{_MARK}"))
    rows.sort()
    for (mu, source), (_, epsilon) in zip(rows, mu_conversion([m for m, _ in rows], curves.delta), strict=True):
        table.add_row(f"{mu:.4g}", _number_cell(epsilon), source)
    return table


def _number_cell(value: float | None) -> Text:
    if value is None:
        return Text("-")
    return Text("infinite", style="red") if math.isinf(value) else Text(f"{value:.3f}")
