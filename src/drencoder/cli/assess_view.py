"""An assessment as tables for the terminal, and its progress. No torch here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from drencoder.evaluation.statistics import Assessment, BenchmarkAssessment, Difference, Estimate, LossAssessment
from drencoder.reading import printable
from drencoder.runs.display import estimate_cell, make_console, make_progress, make_table


class _Report(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextmanager
def progress_lines(quiet: bool) -> Iterator[_Report]:
    """Lends a function that shows on standard error how far each evaluation is; with `quiet` it shows nothing."""
    console = make_console(file=sys.stderr)
    progress = make_progress("requests", console, what=True)
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if quiet:
            return
        progress.start()  # here, so that an error that comes before leaves no empty bar
        if what not in tasks:
            tasks[what] = progress.add_task(printable(what), total=total)
        progress.update(tasks[what], completed=done, total=total)

    if not quiet:
        console.print("loading torch and lm-eval", style="dim")
    try:
        yield report
    finally:
        if tasks:
            progress.stop()


def assessment_tables(assessment: Assessment) -> list[Table]:
    """Returns one table per benchmark (overall, Hard subset, categories and subjects) and one of the loss."""
    tables = [_benchmark_table(benchmark) for benchmark in assessment.benchmarks.values()]
    return [*tables, _loss_table(assessment.loss)] if assessment.loss else tables


def _benchmark_table(benchmark: BenchmarkAssessment) -> Table:
    paired = benchmark.rows[0].adapter is not None
    table = make_table(
        f"{benchmark.name} ({benchmark.provenance}), {benchmark.prompt}",
        *("", "questions", "base model"),
        *(("adapter", "difference", "gained/lost", "p") if paired else ()),
        words=("",),
        caption=_caption(benchmark, paired),
    )
    for row in benchmark.rows:
        name = f"  {row.name}" if row.part == "subject" else row.name
        cells: list[str | Text] = [str(row.base.count), _estimate_cell(row.base)]
        if row.adapter and row.difference and row.mcnemar:
            change, pairs = row.difference, row.mcnemar
            cells += [
                _estimate_cell(row.adapter),
                Text.assemble(f"{change.value:+.3f} ", (f"[{change.low:+.3f}, {change.high:+.3f}]", "dim")),
                f"{pairs.gained}/{pairs.lost}",
                f"{pairs.p:.2g}",
            ]
        table.add_row(Text(printable(name)), *cells)
    return table


def _caption(benchmark: BenchmarkAssessment, paired: bool) -> str:
    lines = [f"accuracy ({benchmark.metric}); 95 % intervals in brackets"]
    if paired:
        lines.append(
            "difference: adapter minus base, paired bootstrap; gained/lost: questions that only the adapter, or only the "
            "base, got right; p: exact McNemar test of that row alone"
        )
    if benchmark.shortened:
        lines.append(f"{benchmark.shortened} prompts were longer than the model's context and lost their beginning")
    whole = {model: table[benchmark.task] for model, table in benchmark.lm_eval.items() if benchmark.task in table}
    if whole:  # a tag of several tasks has no aggregate
        texts = [f"{model} {metric} {value:.4f}" for model, row in whole.items() for metric, value in row.items()]
        lines.append(f"lm-eval's own {benchmark.task}: {', '.join(texts)}")
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
