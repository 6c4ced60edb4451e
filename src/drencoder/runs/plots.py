"""Every figure of the package, and the only door to matplotlib. No pyplot, so nothing global.

A function takes plain numbers and returns a `Figure`; `save_figure` and `svg_text` write it. Importing
matplotlib takes half a second, so each function does it when it is called.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drencoder.encoders.code_sizes import bytes_text
from drencoder.errors import ArtifactError, RecipeError
from drencoder.privacy.budget_table import BudgetTable, NoiseBudget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe & Ito's palette (2008): told apart with every common kind of colour vision. Yellow left out, black last.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5539", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#57606a"
_STYLES: dict[str, Any] = {"epsilon_pld": "-", "epsilon_rdp": "-."}
_LOG_FROM = 30.0  # ratio of largest to smallest value from which an axis is logarithmic
_DODGE = 1.035  # points of different methods at one place of a logarithmic axis stand this factor apart


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes the figure as .png, .svg or .pdf, by the suffix of `path`, and returns the path.

    Raises:
      RecipeError: another suffix.
      ArtifactError: the file cannot be written there.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"{str(path)!r} does not say what to draw: end the name in {', '.join(SUFFIXES[:-1])} or .pdf."
        )
    buffer = io.BytesIO()
    kind = path.suffix.lower()[1:]
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    figure.savefig(buffer, format=kind, dpi=150, metadata=undated)
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ArtifactError(
            f"Cannot write the figure {path}: {error.strerror}. Name a file in a folder that exists and is yours."
        ) from None
    return path


def svg_text(figure: "Figure") -> str:
    """The figure as an <svg> element, to stand inside a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "drencoder"}):  # else the same figure gets other ids each time
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


# A run


def plot_rounds(rows: Sequence[Row]) -> "Figure":
    """Held-out loss and accuracy per round; rows have "round", "loss" and, where questions were asked, "accuracy"."""
    shown = [("loss", "held-out loss (nats per token)")]
    if all("accuracy" in row for row in rows):
        shown.append(("accuracy", "accuracy"))
    width, height = 4.5 * len(shown), 3.2
    # Every run draws this figure, and to search a layout takes as long as all else: inches around the axes, by hand.
    figure = _figure(width, height, layout=None)
    figure.subplots_adjust(0.8 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.35 / height, wspace=0.25)
    rounds = [row["round"] for row in rows]
    for axis, (key, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot(rounds, [row[key] for row in rows], marker="o", markersize=3, color=_COLOURS[0])
        axis.set_xlabel("round")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        if key == "accuracy":
            axis.axhline(0.25, linestyle=":", color=_GREY, label="chance")
            axis.legend(fontsize=8, loc="lower right")  # searching the best place takes long
    return figure


# Privacy


def plot_budget(table: BudgetTable) -> "Figure":
    """Epsilon after each round: a colour for each noise multiplier, a line style for each accountant.

    A budget without a finite value is named instead of drawn.
    """
    figure = _figure(8.5, 4.8)
    axis = figure.subplots()
    shown: dict[str, str] = {}  # field -> label, in the order of the legend
    values: list[float] = []
    colours = _cycle(_COLOURS, len(table.budgets))
    for label, field in (("PLD", "epsilon_pld"), ("RDP", "epsilon_rdp")):
        for budget, colour in zip(table.budgets, colours, strict=True):
            drawn = _draw_budget(axis, budget, field, colour, staircase=table.staircase)
            values += drawn
            if drawn:
                shown[field] = label
    points = table.budgets[0].points
    if not values:
        axis.text(0.5, 0.5, "no guarantee: epsilon is infinite", transform=axis.transAxes, ha="center", color="#b00020")
        axis.set_yticks([])
        axis.set_xlim(points[0].round, points[-1].round)
    elif min(values) > 0 and max(values) > _LOG_FROM * min(values):
        _plain_log(axis, "y")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("round" + (" (0: stage 1 alone)" if points[0].round == 0 else ""))
    axis.set_ylabel(f"epsilon spent, delta = {table.delta:g}")
    adjacency = {"add_remove": "add/remove one client", "replace_one": "replace one client"}[table.relation]
    axis.set_title(f"Accumulated budget, {table.observer}'s view, {adjacency}", fontsize=11)
    axis.grid(alpha=0.3)
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=_sigma_text(budget.noise_multiplier))
        for budget, colour in zip(table.budgets, colours, strict=True)
    ]
    handles += [Line2D([], [], color=_GREY, linestyle=_STYLES[field], label=label) for field, label in shown.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _draw_budget(axis: "Axes", budget: NoiseBudget, field: str, colour: str, *, staircase: bool) -> list[float]:
    """Draws the finite points and returns their values."""
    pairs = [(point.round, getattr(point, field)) for point in budget.points]
    pairs = [(number, value) for number, value in pairs if value is not None and math.isfinite(value)]
    if not pairs:
        return []
    rounds, values = zip(*pairs, strict=True)
    axis.plot(
        rounds,
        values,
        color=colour,
        linestyle=_STYLES[field],
        linewidth=1.8 if field == "epsilon_pld" else 1.3,
        drawstyle="steps-post" if staircase else "default",
        marker="o" if len(pairs) == 1 else "",
        markerfacecolor="none",
    )
    return list(values)


# Methods compared


def plot_loss_against_epsilon(rows: Sequence[Row]) -> "Figure":
    """Held-out loss against epsilon, one series for each method; lower is better.

    Rows have "method", "epsilon", "loss" and, where there are several seeds, "loss_low" and "loss_high". Without
    a finite epsilon (base model, non-private training) a row is a horizontal line. Raises RecipeError without rows.
    """
    figure = _figure(8.5, 4.8)
    axis = figure.subplots()
    drawn = _series(axis, rows, x_key="epsilon", y_key="loss")
    _horizontals(axis, [row for row in rows if not _drawable(row.get("epsilon"))], "loss")
    if drawn:
        _plain_log(axis, "x", [_two_digits(row["epsilon"]) for row in rows if _drawable(row.get("epsilon"))])
    axis.set_xlabel("epsilon (smaller is more private)")
    axis.set_ylabel("held-out loss (nats per token)")
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    methods = {row["method"] for row in rows if _drawable(row.get("epsilon"))}
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in methods)  # series first, then the lines
    _side_legend(figure, [handles[i] for i in order], [labels[i] for i in order])
    return figure


def plot_accuracy_against_bytes(rows: Sequence[Row]) -> "Figure":
    """Accuracy against bytes uploaded, a colour for each method, a marker for each epsilon.

    Rows have "method", "epsilon", "bytes", "accuracy" and, where there are several seeds, "accuracy_low" and
    "accuracy_high". A row that uploads nothing is a horizontal line. Raises RecipeError without rows.
    """
    from matplotlib.lines import Line2D

    figure = _figure(8.5, 4.8)
    axis = figure.subplots()
    epsilons = sorted({_two_digits(row["epsilon"]) for row in rows if _drawable(row.get("epsilon"))})
    markers = dict(zip(epsilons, _cycle(_MARKERS[1:], len(epsilons)), strict=True))

    def marker(row: Row) -> str:
        return markers[_two_digits(row["epsilon"])] if _drawable(row.get("epsilon")) else "o"

    drawn = _series(axis, rows, x_key="bytes", y_key="accuracy", marker_fn=marker)
    if drawn:
        _plain_log(axis, "x", text_fn=_tick_bytes)
    labels = list(drawn)
    handles: list[Any] = [Line2D([], [], color=colour, linewidth=4) for colour in drawn.values()]
    shapes = [(f"epsilon = {epsilon:g}", shape) for epsilon, shape in markers.items()]
    if any(not _drawable(row.get("epsilon")) and _drawable(row.get("bytes")) for row in rows):
        shapes.append(("no finite epsilon", "o"))
    for text, shape in shapes:
        handles.append(Line2D([], [], color=_GREY, linestyle="", marker=shape, markersize=6))
        labels.append(text)
    _horizontals(axis, [row for row in rows if not _drawable(row.get("bytes"))], "accuracy")
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
        handles.append(handle)
        labels.append(label)
    axis.set_xlabel("bytes uploaded, all clients and rounds")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)
    _side_legend(figure, handles, labels)
    return figure


def _series(
    axis: "Axes", rows: Sequence[Row], *, x_key: str, y_key: str, marker_fn: Callable[[Row], str] | None = None
) -> dict[str, str]:
    """Points with ranges for each method, joined unless `marker_fn` picks markers; returns method -> colour."""
    if not any(_drawable(row.get(y_key), positive=False) for row in rows):
        raise RecipeError(f"There is no row with a finite {y_key} to plot: run at least one method first.")
    good = [row for row in rows if _drawable(row.get(x_key)) and _drawable(row.get(y_key), positive=False)]
    methods = list(dict.fromkeys(row["method"] for row in good))
    colours = dict(zip(methods, _cycle(_COLOURS, len(methods)), strict=True))
    for i, (method, colour) in enumerate(colours.items()):
        mine = sorted((row for row in good if row["method"] == method), key=lambda row: float(row[x_key]))
        places = [_dodged(row, good, x_key) for row in mine]
        joined = [slice(0, len(mine))] if marker_fn is None else [slice(k, k + 1) for k in range(len(mine))]
        for part in joined:
            group = mine[part]
            axis.errorbar(
                places[part],
                [float(row[y_key]) for row in group],
                yerr=[[_reach(row, y_key, side) for row in group] for side in ("low", "high")],
                color=colour, label=method if marker_fn is None else None, linewidth=1.3, capsize=3, markersize=6,
                marker=_MARKERS[i % len(_MARKERS)] if marker_fn is None else marker_fn(group[0]), alpha=0.9,
            )  # fmt: skip
    return colours


def _dodged(row: Row, rows: Sequence[Row], key: str) -> float:
    """The row's place on a logarithmic axis, beside those of other methods with the same value."""
    peers = list(dict.fromkeys(r["method"] for r in rows if _two_digits(r[key]) == _two_digits(row[key])))
    return float(row[key]) * _DODGE ** (peers.index(row["method"]) - (len(peers) - 1) / 2)


def _two_digits(value: Any) -> float:
    return float(f"{float(value):.2g}")


def _reach(row: Row, key: str, side: str) -> float:
    """How far the range reaches from the mean to this side; 0 where none is given."""
    end: Any = row.get(f"{key}_{side}")
    return abs(float(end) - float(row[key])) if _drawable(end, positive=False) else 0.0


def _horizontals(axis: "Axes", rows: Sequence[Row], key: str) -> None:
    """A grey line, with its range as a band, for each value; rows of one value share a line and its label."""
    styles: tuple[Any, ...] = (":", "--", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
    groups: dict[float, list[Row]] = {}
    for row in rows:
        if _drawable(row.get(key), positive=False):
            groups.setdefault(float(row[key]), []).append(row)
    for (value, group), style in zip(groups.items(), _cycle(styles, len(groups)), strict=True):
        label = " = ".join(dict.fromkeys(row["method"] for row in group))
        axis.axhline(value, color=_GREY, linestyle=style, linewidth=1.3, label=label)
        low, high = (max(_reach(row, key, side) for row in group) for side in ("low", "high"))
        if low or high:
            axis.axhspan(value - low, value + high, color=_GREY, alpha=0.10, linewidth=0)


def _side_legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


# Small parts


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _cycle(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]


def _drawable(value: Any, *, positive: bool = True) -> bool:
    """Finite, and on a logarithmic axis above 0. Files write an infinite epsilon as "inf"."""
    if value is None:
        return False
    number = float(value)
    return math.isfinite(number) and (number > 0 or not positive)


def _plain_log(
    axis: "Axes",
    which: str,
    ticks: Sequence[float] | None = None,
    text_fn: Callable[[float, Any], str] = lambda value, _: f"{value:g}",
) -> None:
    """A logarithmic axis with plain numbers; `ticks` stand exactly where the values are."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    part = axis.xaxis if which == "x" else axis.yaxis
    axis.set_xscale("log") if which == "x" else axis.set_yscale("log")
    part.set_major_locator(FixedLocator(sorted(set(ticks))) if ticks else LogLocator(subs=(1.0, 2.0, 5.0)))
    part.set_major_formatter(text_fn)
    part.set_minor_formatter(NullFormatter())


def _tick_bytes(count: float, _: Any = None) -> str:
    return bytes_text(count).replace(".0 ", " ")


def _sigma_text(noise_multiplier: float) -> str:
    return f"sigma = {noise_multiplier:.4g}" if noise_multiplier else "no noise"
