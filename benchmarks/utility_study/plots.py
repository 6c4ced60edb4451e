"""The two figures of the utility study."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drencoder.runs.plots import save_figure
from utility_study.grid import COHORTS, EPSILONS, Setting
from utility_study.results import AUTOMATIC, REFERENCE, Comparison, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS, _GREY = "#0072b2", "#d55e00", "#57606a"


def dumbbells(pairs: Sequence[Comparison], results: Results, path: Path) -> Path:
    """Loss of ours and of DP-LoRA in every setting, and of training without noise where it was run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.2 + 0.24 * len(pairs)), layout="constrained")
    axis: Any = figure.subplots()
    for place, pair in enumerate(pairs):
        ours, theirs = pair.ours.loss, pair.theirs.loss
        axis.plot([ours, theirs], [place, place], color=_GREY, linewidth=1, zorder=1)
        for result, colour in ((pair.ours, _OURS), (pair.theirs, _THEIRS)):
            axis.plot(result.losses, [place] * len(result.losses), ".", color=colour, alpha=0.35, markersize=4)
            axis.plot(result.loss, place, "o", color=colour, markersize=6)
        without_noise = replace(pair.ours.setting, trust="non-private").track("lora", None)
        if without_noise in results:
            axis.plot(results[without_noise].loss, place, "|", color="black", markersize=9)
    axis.set_yticks(range(len(pairs)), [setting_words(pair) for pair in pairs], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_xlabel("held-out loss (nats per token); small dots: seeds; bars: no noise")
    _legend(axis, pairs[0].ours.track.method)
    axis.grid(alpha=0.3, axis="x")
    return save_figure(figure, path)


def setting_words(pair: Comparison) -> str:
    """A setting in a few words; * marks those in which noise dominates."""
    setting, mark = pair.ours.setting, " *" if pair.ours.noisy else ""
    epsilon = f"{pair.ours.track.epsilon:g}"
    return f"{setting.trust}, {setting.task}, {setting.adapter}, n {setting.cohort}, ε {epsilon}{mark}"


def _legend(axis: "Axes", arm: str) -> None:
    from matplotlib.lines import Line2D

    pairs = ((arm, _OURS), (REFERENCE, _THEIRS))
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=label) for label, colour in pairs]
    axis.legend(handles=handles, fontsize=8, loc="upper left")  # "best" warns on a busy machine


def loss_against_bytes(results: Results, path: Path) -> Path | None:
    """Whole updates and codes of the automatic size, a line each through the cohorts; the same place on the x axis is the same upload."""
    from matplotlib.figure import Figure

    ours = [result.setting for track, result in results.items() if track.method == AUTOMATIC]
    keys = sorted({(setting.trust, setting.task, setting.adapter) for setting in ours})
    if not keys:
        return None
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, (trust, task, adapter) in zip(grid.flat, keys, strict=False):
        for epsilon, line in zip(EPSILONS, ("-", "--"), strict=True):
            for arm, colour in ((AUTOMATIC, _OURS), (REFERENCE, _THEIRS)):
                places = [Setting(trust, task, adapter, cohort).track(arm, epsilon) for cohort in COHORTS]
                known = [results[place] for place in places if place in results and not results[place].failed]
                sizes = [result.first("bytes_up") for result in known]
                axis.plot(sizes, [result.loss for result in known], line, color=colour, marker="o", markersize=4)
        axis.set_xscale("log")
        axis.set_title(f"{trust}, {task}, {adapter}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("bytes uploaded, all clients and rounds; dots: n = 8, 64, 512", fontsize=9)
    figure.supylabel("held-out loss", fontsize=9)
    _bytes_legend(figure)
    return save_figure(figure, path)


def _bytes_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    shapes: list[tuple[str, str, Any]] = [(AUTOMATIC, _OURS, "-"), (REFERENCE, _THEIRS, "-")]
    shapes += [(f"ε {epsilon:g}", _GREY, line) for epsilon, line in zip(EPSILONS, ("-", "--"), strict=True)]
    handles = [Line2D([], [], color=colour, linestyle=line, label=label) for label, colour, line in shapes]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
