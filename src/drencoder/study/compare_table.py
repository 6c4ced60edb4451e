"""From a comparison's cells to its table, its paired tests and its files. No torch.

Every row is one method at one epsilon over all seeds, with its tuned learning rate. A difference is always against
DP-LoRA at the same epsilon, paired by seed (held-out loss) and by question (accuracy).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from drencoder.encoders.code_sizes import bytes_text
from drencoder.evaluation.statistics import Difference, McNemar, mcnemar, paired_over_seeds
from drencoder.privacy.observers import json_ready
from drencoder.recipe.recipe import Recipe
from drencoder.runs.plots import plot_accuracy_against_bytes, plot_loss_against_epsilon, save_figure
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import Cell, Track, loss_of
from drencoder.study.compare import cell_folder, tuning_plan
from drencoder.study.methods import METHODS, start_rates
from drencoder.study.settings import Compare
from drencoder.study.tables import Spread, markdown_table, mean_of_known
from drencoder.study.tuning import tuned_steps

REFERENCE = "dp-lora"
Results = Mapping[Cell, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table. Byte counts are means over seeds and sums over clients; epsilons the largest of all seeds.

    `learning_rate` is that of the method's tuned knob. `seeds` lists those that finished, `failures` the sentences of
    those that did not. `loss_difference` and `accuracy_difference` compare with DP-LoRA at the same epsilon, over seeds;
    `answers` do so question by question, one test per seed, since a seed's questions share one model.
    """

    method: str
    epsilon: float | None
    seeds: list[int]
    failures: list[str]
    learning_rate: float | None = None
    loss: Spread | None = None
    accuracy: Mapping[str, Spread] | None = None
    cosine: float | None = None
    captured_energy: float | None = None
    bytes_stage1: float | None = None
    bytes_stage2: float | None = None
    epsilon_server: float | None = None
    epsilon_clients: float | None = None
    epsilon_public: float | None = None
    seconds: float | None = None
    loss_difference: Difference | None = None
    accuracy_difference: Difference | None = None
    answers: list[McNemar] | None = None


def rows_of(recipe: Recipe, settings: Compare, tracks: Sequence[Track], results: Results, folder: Path) -> list[Row]:
    """The base model, the zero update, and every track, in the order of the recipe."""
    of_seed = {cell.seed: result for cell, result in results.items() if "error" not in result}
    finished = [of_seed[seed] for seed in settings.seeds if seed in of_seed]  # all of a seed have the same base
    rows = [_reference_row("base model", "base", finished), _reference_row("zero update", "zero", finished)]
    for track in tracks:
        rows.append(_row(track, recipe, settings, results, folder))
    return [row for row in rows if row is not None]


def _reference_row(name: str, key: str, finished: Sequence[Mapping[str, Any]]) -> Row | None:
    if not finished:
        return None
    shown = [result[key] for result in finished]
    return Row(name, None, [], [], loss=Spread.of([row["loss"] for row in shown]), accuracy=_accuracies(shown))


def _accuracies(shown: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    return {name: Spread.of([row["accuracy"][name] for row in shown]) for name in shown[0]["accuracy"]}


def _row(track: Track, recipe: Recipe, settings: Compare, results: Results, folder: Path) -> Row:
    cells = _final_cells(track, settings, results)
    done = {cell.seed: results[cell] for cell in cells if "error" not in results[cell]}
    failures = [f"seed {cell.seed}: {results[cell]['error']}" for cell in cells if "error" in results[cell]]
    if not done:
        return Row(track.method, track.epsilon, [], failures)
    shown = list(done.values())
    loss_difference, accuracy_difference, answers = _against_reference(track, settings, results, folder)
    return Row(
        track.method, track.epsilon, sorted(done), failures, learning_rate=_learning_rate(recipe, settings, cells[0]),
        loss=Spread.of([row["loss"] for row in shown]), accuracy=_accuracies(shown),
        cosine=mean_of_known(row["encoder"].get("gate_public_cosine") for row in shown),
        captured_energy=mean_of_known(row["encoder"].get("gate_public_captured_energy") for row in shown),
        bytes_stage1=mean_of_known(row["bytes_stage1"] for row in shown),
        bytes_stage2=mean_of_known(row["bytes_up"] - row["bytes_stage1"] for row in shown),
        epsilon_server=max(float(row["epsilon"]["server"]) for row in shown),
        epsilon_clients=max(float(row["epsilon"]["clients"]) for row in shown),
        epsilon_public=max(float(row["epsilon"]["public"]) for row in shown),
        seconds=median(row["seconds"] for row in shown), loss_difference=loss_difference,
        accuracy_difference=accuracy_difference, answers=answers,
    )  # fmt: skip


def _final_cells(track: Track, settings: Compare, results: Results) -> list[Cell]:
    losses = {cell: loss_of(row) for cell, row in results.items() if cell.track == track}
    rate_step, clip_step = tuned_steps(tuning_plan(settings), losses)
    return [Cell(track, seed, rate_step, clip_step) for seed in settings.seeds]


def _learning_rate(recipe: Recipe, settings: Compare, cell: Cell) -> float:
    first = METHODS[cell.track.method].first_rate(recipe, start_rates(settings.rates))
    return tuning_plan(settings).rate(first, cell)


def _against_reference(
    track: Track, settings: Compare, results: Results, folder: Path
) -> tuple[Difference | None, Difference | None, list[McNemar] | None]:
    """Paired by seed (loss, mean accuracy) and by question; None without a budget, DP-LoRA, or enough seeds in common."""
    reference = Track(REFERENCE, track.epsilon)
    if track == reference or track.epsilon is None or REFERENCE not in settings.methods:
        return None, None, None
    pairs = [
        (theirs, ours)
        for theirs, ours in zip(
            _final_cells(reference, settings, results), _final_cells(track, settings, results), strict=True
        )
        if "error" not in results[theirs] and "error" not in results[ours]
    ]
    if not pairs:
        return None, None, None
    losses = [results[ours]["loss"] - results[theirs]["loss"] for theirs, ours in pairs]
    answers = [
        (_right_answers(cell_folder(folder, theirs)), _right_answers(cell_folder(folder, ours)))
        for theirs, ours in pairs
    ]
    asked = all(before for before, _ in answers)  # a recipe of one's own text asks no questions
    tests = [mcnemar(before, after) for before, after in answers] if asked else None
    if len(pairs) < 3:
        return None, None, tests
    if not asked:
        return paired_over_seeds(losses), None, None
    gains = [(sum(after) - sum(before)) / len(before) for before, after in answers]
    return paired_over_seeds(losses), paired_over_seeds(gains), tests


def _right_answers(folder: Path) -> list[bool]:
    """Every question of every benchmark, answered rightly or not."""
    outcomes = RunFolder(folder).read_json(RunFolder(folder).outcomes)["this run"]["right"]
    return [bool(hit) for name in sorted(outcomes) for hit in outcomes[name]]


# --- the table in words ----------------------------------------------------------------------------


def cells_of_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of text of the whole table, the same for Markdown and CSV."""
    benchmarks = list(next((row.accuracy for row in rows if row.accuracy), {}))
    headings = ["method", "ε target", "held-out loss", *benchmarks, "cosine", "energy", "stage 1 up", "stage 2 up"]
    headings += ["ε server", "ε clients", "ε public", "rate", "seconds"]
    headings += ["Δ loss vs DP-LoRA", "Δ accuracy vs DP-LoRA", "answers gained, lost per seed"]
    return headings, [_line(row, benchmarks) for row in rows]


def short_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The same table for a terminal of 80 columns: means only, uploads of both stages together."""
    benchmarks = list(next((row.accuracy for row in rows if row.accuracy), {}))
    headings = ["method", "ε", "loss", *benchmarks, "cosine", "uploads", "Δ loss"]
    return headings, [_short_line(row, benchmarks) for row in rows]


def _short_line(row: Row, benchmarks: Sequence[str]) -> list[str]:
    target = "-" if row.epsilon is None else f"{row.epsilon:g}"
    if row.loss is None or row.accuracy is None:
        return [row.method, target, "failed", *[""] * (len(benchmarks) + 3)]
    sent = None if row.bytes_stage2 is None else (row.bytes_stage1 or 0) + row.bytes_stage2
    change = row.loss_difference
    return [
        row.method, target, f"{row.loss.mean:.2f}", *(f"{row.accuracy[key].mean:.2f}" for key in benchmarks),
        _number(row.cosine, "{:.3f}"), _bytes(sent),
        "-" if change is None else f"{change.value:+.2f}" + ("" if change.low <= 0 <= change.high else " *"),
    ]  # fmt: skip


def _line(row: Row, benchmarks: Sequence[str]) -> list[str]:
    target = "-" if row.epsilon is None else f"{row.epsilon:g}"
    if row.loss is None or row.accuracy is None:
        return [row.method, target, "failed: " + "; ".join(row.failures), *[""] * (len(benchmarks) + 12)]
    name = row.method + (f" ({len(row.failures)} seeds failed)" if row.failures else "")
    return [
        name, target, row.loss.text(3), *(row.accuracy[key].text(2) for key in benchmarks),
        _number(row.cosine, "{:.3f}"), _number(row.captured_energy, "{:.2%}"), _bytes(row.bytes_stage1),
        _bytes(row.bytes_stage2), _epsilon(row.epsilon_server), _epsilon(row.epsilon_clients),
        _epsilon(row.epsilon_public), _number(row.learning_rate, "{:.3g}"), _number(row.seconds, "{:.0f}"),
        _difference(row.loss_difference), _difference(row.accuracy_difference),
        "-" if row.answers is None else "; ".join(map(_answer_words, row.answers)),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _epsilon(value: float | None) -> str:
    return "-" if value is None else "none" if math.isinf(value) else f"{value:.2f}"


def _bytes(count: float | None) -> str:
    return "-" if count is None else bytes_text(count)


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _answer_words(change: McNemar) -> str:
    chance = "p < 1e-9" if change.p < 1e-9 else f"p = {change.p:.2g}"
    return f"+{change.gained} -{change.lost}, {chance}"


# --- files -----------------------------------------------------------------------------------------


def write_comparison(recipe: Recipe, settings: Compare, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes table.md, table.csv, table.json and the plots (of accuracy where questions were asked); returns their paths.

    Raises:
      ArtifactError: the folder cannot be written.
    """
    store = RunFolder(folder)
    headings, lines = cells_of_table(rows)
    store.write(folder / "table.md", _markdown(recipe, settings, headings, lines).encode())
    buffer = io.StringIO()
    csv.writer(buffer).writerows([headings, *lines])
    store.write(folder / "table.csv", buffer.getvalue().encode("utf-8-sig"))
    record = {
        "recipe": recipe.to_dict(),
        "compare": asdict(settings),
        "rows": [json_ready(asdict(row)) for row in rows],
    }
    store.write_json(folder / "table.json", record)
    points = [_point(row) for row in rows if row.loss is not None]
    plots = {"loss-against-epsilon.png": plot_loss_against_epsilon(points)}
    if any(point["accuracy"] is not None for point in points):
        plots["accuracy-against-bytes.png"] = plot_accuracy_against_bytes(points)
    for name, figure in plots.items():
        save_figure(figure, folder / name)
    return [folder / name for name in ("table.md", "table.csv", "table.json", *plots)]


def _markdown(recipe: Recipe, settings: Compare, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = (
        f"Recipe `{recipe.name}`, seeds {', '.join(map(str, settings.seeds))}. Mean (smallest to largest) over seeds; lower "
        f"loss is better. Every method tried {settings.tuning_runs} learning rates per ε on seed {settings.tuning_seed}, a "
        f"factor of {settings.tuning_factor:g} apart, chosen by held-out loss. δ = {recipe.privacy.delta:g}, "
        f"{recipe.privacy.relation.replace('_', '/')}; `none` = no guarantee. Cosine and energy: what the encoder alone "
        "carries of updates of server-held text. Uploads are sums over all clients. Differences are paired with DP-LoRA "
        "at the same ε: 95 % t intervals over seeds (accuracy: all benchmarks' questions); and per seed the questions gained "
        "and lost, with the exact McNemar test.\n"
    )
    arms = "\n".join(f"- `{name}`: {METHODS[name].words}." for name in settings.methods)
    return f"{rule}\n{markdown_table(headings, lines)}\n\n{arms}\n"


def _point(row: Row) -> dict[str, Any]:
    """A row as the plots take it; accuracy is the mean over benchmarks."""
    assert row.loss is not None
    shown = list((row.accuracy or {}).values())
    sent = None if row.bytes_stage2 is None else (row.bytes_stage1 or 0) + row.bytes_stage2
    return {
        "method": row.method, "epsilon": row.epsilon,
        "loss": row.loss.mean, "loss_low": row.loss.low, "loss_high": row.loss.high,
        "accuracy": fmean(spread.mean for spread in shown) if shown else None,
        "accuracy_low": fmean(spread.low for spread in shown) if shown else None,
        "accuracy_high": fmean(spread.high for spread in shown) if shown else None,
        "bytes": sent,
    }  # fmt: skip
