"""An assessment as tables for the terminal. No torch here."""

from rich.markup import escape
from rich.table import Table

from drencoder.evaluation.statistics import (
    Assessment,
    BenchmarkAssessment,
    Difference,
    Estimate,
    LossAssessment,
    Scores,
)

__all__ = ["assessment_tables"]


def assessment_tables(assessment: Assessment, *, subjects: bool = True) -> list[Table]:
    """One table per benchmark (overall, Hard subset, categories and, if wanted, subjects) and one of the loss."""
    tables = [_benchmark_table(found, subjects) for found in assessment.benchmarks.values()]
    return [*tables, _loss_table(assessment.loss)] if assessment.loss else tables


def _benchmark_table(found: BenchmarkAssessment, subjects: bool) -> Table:
    table = Table(
        title=escape(f"{found.name} ({found.provenance}), {found.template} prompt, {found.shots} shots"),
        title_justify="left",
        caption=_caption(found),
        caption_justify="left",
    )
    for heading in ("", "questions", "base model", *(["adapter"] if found.adapter else [])):
        table.add_column(heading, justify="left" if not heading else "right")
    base, adapter = _rows(found.base, subjects), _rows(found.adapter, subjects) if found.adapter else {}
    for name, estimate in base.items():
        cells = [_estimate(row[name]) for row in (base, adapter) if row]
        table.add_row(name, str(estimate.count), *cells)
    return table


def _rows(scores: Scores, subjects: bool) -> dict[str, Estimate]:
    hard = {"Hard subset": scores.hard} if scores.hard else {}
    below = {f"  {name}": estimate for name, estimate in scores.subjects.items()} if subjects else {}
    return {"overall": scores.overall, **hard, **scores.categories, **below}


def _caption(found: BenchmarkAssessment) -> str:
    lines = ["95 % intervals in brackets"]
    if found.shortened:
        lines.append(f"{found.shortened} prompts had no room for all {found.shots} worked examples")
    if found.difference and found.mcnemar:
        lines.append(f"adapter minus base: {_difference(found.difference)} (paired bootstrap)")
        lines.append(
            f"gained {found.mcnemar.gained}, lost {found.mcnemar.lost} questions: exact McNemar p = {found.mcnemar.p:.2g}"
        )
    return "\n".join(lines)


def _loss_table(loss: LossAssessment) -> Table:
    table = Table(
        title="Held-out loss (nats per token)",
        title_justify="left",
        caption=f"adapter minus base: {_difference(loss.difference)} (paired bootstrap)",
        caption_justify="left",
    )
    for heading in ("texts", "base model", "adapter"):
        table.add_column(heading, justify="right")
    table.add_row(str(loss.base.count), _estimate(loss.base), _estimate(loss.adapter))
    return table


def _difference(found: Difference) -> str:
    return f"{found.value:+.3f} \\[{found.low:+.3f}, {found.high:+.3f}], p = {found.p:.2g}"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [dim]\\[{estimate.low:.3f}, {estimate.high:.3f}][/dim]"
