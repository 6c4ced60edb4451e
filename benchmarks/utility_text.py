"""How the utility study's page and README write numbers, losses and tables. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from utility_plots import name
from utility_results import Duel, Result

FEW_SEEDS = 6  # whose losses a table can show one by one; utility.json has all
Line = Sequence[str]


def duel_head(ours: str, theirs: str) -> list[str]:
    sides = [ours, "its seeds", theirs, "its seeds"]
    return ["setting (*: noise dominates)", "k*", "base model", "zero update", *sides, "Δ [95 %]", "Δ / loss"]


def duel_cells(duel: Duel) -> list[str]:
    result, interval = duel.ours, duel.interval
    models = [loss_cells([row[key]["loss"] for row in duel.theirs.rows])[0] for key in ("base", "zero")]
    change = f"{duel.mean:+.3f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")
    losses = [*loss_cells(duel.ours.losses), *loss_cells(duel.theirs.losses)]
    return [name(duel), number_text(result.k_star), *models, *losses, change, f"{duel.relative:+.1%}"]


def spread_text(found: Sequence[Duel]) -> str:
    """The size of the gain in one sentence."""
    gains = sorted(duel.relative for duel in found if math.isfinite(duel.relative))
    if not gains:
        return ""
    middle = gains[len(gains) // 2]
    return (
        f"Δ / loss: from {gains[0]:+.1%} to {gains[-1]:+.1%}, in the middle {middle:+.1%}; below zero ours is better."
    )


def right_share(result: Result) -> str:
    """Share of multiple-choice questions answered rightly, over benchmarks and seeds; "-" if the task does not teach them."""
    known = [share for row in result.rows for share in row.get("accuracy", {}).values()]
    return f"{fmean(known):.2f}" if known else "-"


def loss_cells(values: Sequence[float]) -> list[str]:
    """Mean, and every seed; of more than FEW_SEEDS the least, the quartiles and the most."""
    if not values:
        return ["-", "-"]
    ordered = sorted(values)
    few = len(values) <= FEW_SEEDS
    shown = values if few else [ordered[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
    texts = [f"{value:.3f}" if math.isfinite(value) else "failed" for value in shown]
    return [f"{fmean(values):.3f}", " ".join(texts) if few else f"{' / '.join(texts)} ({len(values)})"]


def accuracy_cells(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    known = [row["accuracy"] for row in rows if row.get("accuracy")]
    return [f"{fmean(one[name] for one in known):.2f}" if known else "-" for name in ("mmlu", "ceval")]


def number_text(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def table(head: Line, rows: Sequence[Line]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
