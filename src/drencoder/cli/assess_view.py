"""An assessment as tables for the terminal. No torch here."""

from rich.table import Table
from rich.text import Text

from drencoder.evaluation.statistics import (
    Assessment,
    BenchmarkAssessment,
    Difference,
    Estimate,
    LossAssessment,
    Scores,
)
from drencoder.runs.display import estimate_cell, make_table, printable

__all__ = ["assessment_tables"]


def assessment_tables(assessment: Assessment, *, subjects: bool = True) -> list[Table]:
    """Returns one table per benchmark (overall, Hard subset, categories; `subjects` too) and one of the loss."""
    tables = [_benchmark_table(benchmark, subjects) for benchmark in assessment.benchmarks.values()]
    return [*tables, _loss_table(assessment.loss)] if assessment.loss else tables


def _benchmark_table(benchmark: BenchmarkAssessment, subjects: bool) -> Table:
    table = make_table(
        f"{benchmark.name} ({benchmark.provenance}), {benchmark.template} prompt, {benchmark.shots} shots",
        *("", "questions", "base model", *(["adapter"] if benchmark.adapter else [])),
        words=("",),
        caption=_caption(benchmark),
    )
    base, adapter = _rows(benchmark.base, subjects), _rows(benchmark.adapter, subjects) if benchmark.adapter else {}
    for name, estimate in base.items():
        cells = [_estimate_cell(row[name]) for row in (base, adapter) if row]
        table.add_row(Text(printable(name)), str(estimate.count), *cells)
    return table


def _rows(scores: Scores, subjects: bool) -> dict[str, Estimate]:
    hard = {"Hard subset": scores.hard} if scores.hard else {}
    below = {f"  {name}": estimate for name, estimate in scores.subjects.items()} if subjects else {}
    return {"overall": scores.overall, **hard, **scores.categories, **below}


def _caption(benchmark: BenchmarkAssessment) -> str:
    lines = ["95 % intervals in brackets"]
    if benchmark.shortened:
        lines.append(f"{benchmark.shortened} prompts had no room for all {benchmark.shots} worked examples")
    if benchmark.difference and benchmark.mcnemar:
        lines.append(f"adapter minus base: {_difference_text(benchmark.difference)} (paired bootstrap)")
        lines.append(
            f"gained {benchmark.mcnemar.gained}, lost {benchmark.mcnemar.lost} questions: exact McNemar p = {benchmark.mcnemar.p:.2g}"
        )
    return "\n".join(lines)


def _loss_table(loss: LossAssessment) -> Table:
    table = make_table(
        "Held-out loss (nats per token)",
        *("texts", "base model", "adapter"),
        caption=f"adapter minus base: {_difference_text(loss.difference)} (paired bootstrap)",
    )
    table.add_row(str(loss.base.count), _estimate_cell(loss.base), _estimate_cell(loss.adapter))
    return table


def _difference_text(difference: Difference) -> str:
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}], p = {difference.p:.2g}"


def _estimate_cell(estimate: Estimate) -> Text:
    return estimate_cell(estimate.value, estimate.low, estimate.high)
