"""The budget per round as tables for a terminal. No torch."""

import math

from rich.table import Table

from drencoder.privacy.budget_table import BudgetPoint, BudgetTable, NoiseBudget

_SHOWN_ROUNDS = 9


def budget_tables(table: BudgetTable) -> list[Table]:
    """For each noise multiplier the budget after a selection of rounds."""
    return [_rounds(table, budget) for budget in table.budgets]


def _rounds(table: BudgetTable, budget: NoiseBudget) -> Table:
    columns = {"PLD": "epsilon_pld", "RDP": "epsilon_rdp"}
    if any(point.epsilon_rdp is None for point in budget.points):  # sub-sampling under replace-one has no bound
        del columns["RDP"]
    caption = ["no guarantee: this observer sees a release without noise"]
    if math.isfinite(budget.last.epsilon_pld):
        caption = [f"guarantees: {', '.join(columns)}"]
    if budget.grid_error > 0:
        caption.append(f"PLD before the last round: an upper bound, high by at most about {budget.grid_error:.0e}")
    adjacency = {"add_remove": "add/remove", "replace_one": "replace-one"}[table.relation]
    shown = Table(
        title=f"Epsilon spent at sigma = {budget.noise_multiplier:.4g}: {table.observer}'s view, {adjacency}, "
        f"delta = {table.delta:g}",
        title_justify="left",
        caption="\n".join(caption),
        caption_justify="left",
    )
    shown.add_column("after round", justify="right")
    for label in columns:
        shown.add_column(label, justify="right")
    for point in _selection(budget):
        name = "stage 1" if point.round == 0 else str(point.round)
        shown.add_row(name, *(_number(getattr(point, field)) for field in columns.values()))
    return shown


def _selection(budget: NoiseBudget) -> list[BudgetPoint]:
    """At most nine of the points, the first and the last among them."""
    last, count = len(budget.points) - 1, min(len(budget.points), _SHOWN_ROUNDS)
    return [budget.points[i] for i in sorted({round(last * k / max(1, count - 1)) for k in range(count)})]


def _number(value: float) -> str:
    return "[red]infinite[/red]" if math.isinf(value) else f"{value:.3f}"
