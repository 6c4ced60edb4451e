"""The privacy curves as tables for a terminal. Says of every column whether it is a guarantee. No torch."""

import math

from rich.table import Table

from drencoder.privacy.curves import ACCOUNTANTS, BudgetPoint, CompositionPart, PrivacyCurves, SigmaCurve, mu_conversion

__all__ = ["curve_tables"]

_SHOWN_ROUNDS = 9
_MUS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_MARK = "*"
_NOT_A_GUARANTEE = f"{_MARK} an approximation, not a guarantee: it can lie far below the truth"


def curve_tables(curves: PrivacyCurves) -> list[Table]:
    """For each sigma the budget after a selection of rounds and its composition, then what mu is worth."""
    tables = []
    for curve in curves.curves:
        tables += [_rounds(curves, curve), _composition(curves, curve)]
    return [*tables, _conversion(curves)]


def _rounds(curves: PrivacyCurves, curve: SigmaCurve) -> Table:
    used = [a for a in ACCOUNTANTS if any(getattr(point, a.field) is not None for point in curve.points)]
    caption = ["guarantees: " + ", ".join(a.label for a in used if a.is_guarantee)]
    if math.isinf(curve.last.epsilon_pld):
        caption = ["no guarantee: this observer sees a release without noise"]
    if not all(a.is_guarantee for a in used):
        caption.append(_NOT_A_GUARANTEE)
    if curve.grid_error > 0:
        caption.append(f"PLD before the last round: an upper bound, high by at most about {curve.grid_error:.0e}")
    adjacency = {"add_remove": "add/remove", "replace_one": "replace-one"}[curves.relation]
    table = Table(
        title=f"Epsilon spent at sigma = {curve.noise_multiplier:.4g}: {curves.observer}'s view, {adjacency}, "
        f"delta = {curves.delta:g}",
        title_justify="left",
        caption="\n".join(caption),
        caption_justify="left",
    )
    table.add_column("after round", justify="right")
    for accountant in used:
        table.add_column(accountant.label + ("" if accountant.is_guarantee else _MARK), justify="right")
    for point in _selection(curve):
        name = "stage 1" if point.round == 0 else str(point.round)
        table.add_row(name, *(_number(getattr(point, accountant.field)) for accountant in used))
    return table


def _selection(curve: SigmaCurve) -> list[BudgetPoint]:
    """At most nine of the points, the first and the last among them."""
    last, count = len(curve.points) - 1, min(len(curve.points), _SHOWN_ROUNDS)
    return [curve.points[i] for i in sorted({round(last * k / max(1, count - 1)) for k in range(count)})]


def _composition(curves: PrivacyCurves, curve: SigmaCurve) -> Table:
    """The parts and their mu; squares add up."""
    exact = curve.last.mu is not None
    mark, limit = ("", False) if exact else (_MARK, curve.last.mu_clt is not None)
    caption = "mu^2 adds up over the parts" + ("" if exact else f"; {_NOT_A_GUARANTEE}")
    table = Table(
        title=f"Composition at sigma = {curve.noise_multiplier:.4g}",
        title_justify="left",
        caption=caption if exact or limit else "sub-sampled: no exact mu; the PLD composes these releases",
        caption_justify="left",
    )
    table.add_column("part")
    table.add_column("releases")
    shown = exact or limit
    if shown:
        table.add_column(f"mu{mark}", justify="right")
        table.add_column(f"mu^2{mark}", justify="right")
    for part in curve.parts:
        table.add_row(part.name, part.events, *(_mu_cells(_mu_of(part, exact=exact)) if shown else ()))
    if shown:
        total = curve.last.mu if exact else curve.last.mu_clt
        table.add_row("whole plan", "", *_mu_cells(total), style="bold")
    return table


def _mu_of(part: CompositionPart, *, exact: bool) -> float | None:
    # Beside sub-sampled parts an exact part enters the limit with its own mu.
    return part.mu if exact or part.mu_clt is None else part.mu_clt


def _mu_cells(mu: float | None) -> tuple[str, str]:
    return _number(mu), _number(None if mu is None else mu * mu)


def _conversion(curves: PrivacyCurves) -> Table:
    """mu -> epsilon(delta), exact whatever the mu came from."""
    table = Table(
        title=f"What mu-GDP is worth at delta = {curves.delta:g}",
        title_justify="left",
        caption="the conversion is exact; an approximate mu gives an approximate epsilon",
        caption_justify="left",
    )
    table.add_column("mu", justify="right")
    table.add_column("epsilon", justify="right")
    table.add_column("from")
    rows = [(mu, "") for mu in _MUS]
    for curve in curves.curves:
        sigma = f"sigma = {curve.noise_multiplier:.4g}"
        if curve.last.mu is not None and math.isfinite(curve.last.mu):
            rows.append((curve.last.mu, f"{sigma}, exact"))
        elif curve.last.mu_clt is not None:
            rows.append((curve.last.mu_clt, f"{sigma}, CLT{_MARK}"))
    rows.sort()
    for (mu, source), (_, epsilon) in zip(rows, mu_conversion([m for m, _ in rows], curves.delta), strict=True):
        table.add_row(f"{mu:.4g}", _number(epsilon), source)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "[red]infinite[/red]" if math.isinf(value) else f"{value:.3f}"
