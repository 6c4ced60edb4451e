"""The three figures of the utility study."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utility_forecast import REACHED, Forecast
from utility_grid import COHORTS, EPSILONS, Setting, Track
from utility_results import AUTOMATIC, REFERENCE, Duel, Results

from drencoder.runs.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS, _GREY = "#0072b2", "#d55e00", "#57606a"


def dumbbells(found: Sequence[Duel], results: Results, path: Path) -> Path:
    """Loss of ours and of DP-LoRA in every setting, and of training without noise where it was run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.2 + 0.24 * len(found)), layout="constrained")
    axis: Any = figure.subplots()
    for place, duel in enumerate(found):
        ours, theirs = duel.ours.loss, duel.theirs.loss
        axis.plot([ours, theirs], [place, place], color=_GREY, linewidth=1, zorder=1)
        for result, colour in ((duel.ours, _OURS), (duel.theirs, _THEIRS)):
            axis.plot(result.losses, [place] * len(result.losses), ".", color=colour, alpha=0.35, markersize=4)
            axis.plot(result.loss, place, "o", color=colour, markersize=6)
        setting = duel.ours.track.setting
        silent = results.get(Track("lora", Setting("non-private", setting.task, setting.adapter, setting.cohort, None)))
        if silent is not None:
            axis.plot(silent.loss, place, "|", color="black", markersize=9)
    axis.set_yticks(range(len(found)), [name(duel) for duel in found], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_xlabel("held-out loss (nats per token); small dots: seeds; bars: no noise")
    _legend(axis, found[0].ours.track.arm)
    axis.grid(alpha=0.3, axis="x")
    return save_figure(figure, path)


def name(duel: Duel) -> str:
    """A setting in a few words; * marks those in which noise dominates."""
    setting = duel.ours.track.setting
    mark = " *" if duel.ours.noisy else ""
    return f"{setting.trust}, {setting.task}, {setting.adapter}, n {setting.cohort}, ε {setting.epsilon:g}{mark}"


def _legend(axis: "Axes", arm: str) -> None:
    from matplotlib.lines import Line2D

    pairs = ((arm, _OURS), (REFERENCE, _THEIRS))
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=label) for label, colour in pairs]
    axis.legend(handles=handles, fontsize=8)


def loss_against_bytes(results: Results, path: Path) -> Path | None:
    """Whole updates and codes of the automatic size, a line each through the cohorts; the same place on the x axis is the same upload."""
    from matplotlib.figure import Figure

    keys = sorted({(t.setting.trust, t.setting.task, t.setting.adapter) for t in results if t.arm == AUTOMATIC})
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
                places = [Track(arm, Setting(trust, task, adapter, cohort, epsilon)) for cohort in COHORTS]
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


def forecast_against_outcome(found: Sequence[Forecast], path: Path) -> Path | None:
    """R against how much lower our loss is; the formula is right in the upper right and the lower left quarter."""
    from matplotlib.figure import Figure

    if not found:
        return None
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    axes: Any = figure.subplots(1, 3, sharey=True)
    _forecast_panel(axes[0], found, [one.gain for one in found], "R of METHOD 2.6, the predicted gain per round")
    _forecast_panel(
        axes[1],
        found,
        [one.reached for one in found],
        f"R mended (curvature over noise as long as a run's), over {REACHED:g}",
    )
    _forecast_panel(axes[2], found, [one.stable for one in found], "the longest stable step's gain, ours / DP-LoRA's")
    axes[0].set_ylabel("measured: loss below DP-LoRA's (%)")
    figure.suptitle("blue: names the winner; orange: does not", fontsize=9)
    return save_figure(figure, path)


def _forecast_panel(axis: Any, found: Sequence[Forecast], gains: Sequence[float], words: str) -> None:
    arms = list(dict.fromkeys(one.duel.ours.track.arm for one in found))
    for arm, marker in zip(arms, "os^D", strict=False):
        mine = [(one, gain) for one, gain in zip(found, gains, strict=True) if one.duel.ours.track.arm == arm]
        colours = [_OURS if one.right(gain) else _THEIRS for one, gain in mine]
        lower = [-100 * one.duel.relative for one, _ in mine]
        axis.scatter([gain for _, gain in mine], lower, marker=marker, c=colours, s=26, label=arm, alpha=0.8)
    axis.axhline(0, color=_GREY, linewidth=0.8)
    axis.axvline(1, color=_GREY, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=10)
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.set_xlabel(words)
    for handle in axis.legend(fontsize=8).legend_handles:
        handle.set_color(_GREY)
    axis.grid(alpha=0.3)
