"""This module draws every figure of the package; no other module imports matplotlib. No pyplot, so nothing is global.

A function takes plain numbers and returns a `Figure`; `save_figure` and `svg_text` write it. Importing
matplotlib takes half a second, so each function does it when it is called.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drencoder.encoders.code_sizes import bytes_text
from drencoder.errors import ArtifactError, RecipeError
from drencoder.privacy.curves import ACCOUNTANTS, Accountant, PrivacyCurves, SigmaCurve
from drencoder.privacy.tradeoff import TradeOff, TradeOffs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_accuracy_against_bytes",
    "plot_curves",
    "plot_loss_against_epsilon",
    "plot_rounds",
    "plot_tradeoff",
    "save_figure",
    "svg_text",
]

Row = Mapping[str, Any]

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe & Ito's palette (2008): told apart with every common kind of colour vision. Yellow left out, black last.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5539", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#57606a"
_STYLES: dict[str, Any] = {"epsilon_pld": "-", "epsilon_rdp": "-.", "epsilon_gdp": "", "epsilon_clt": (0, (4, 2))}
_LOG_FROM = 30.0  # ratio of largest to smallest value from which an axis is logarithmic
_SHIFT = 1.035  # points of different methods at one place of a logarithmic axis stand this factor apart


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
    """Returns the figure as an <svg> element, to stand inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


# A run


def plot_rounds(rows: Sequence[Row]) -> "Figure":
    """Draws held-out loss and accuracy per round; rows have "round", "loss" and, where questions were asked, "accuracy"."""
    shown = [("loss", "held-out loss (nats per token)")]
    if all("accuracy" in row for row in rows):
        shown.append(("accuracy", "accuracy"))
    figure = _make_figure(4.5 * len(shown), 3.2)
    rounds = [row["round"] for row in rows]
    for axis, (key, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot(rounds, [row[key] for row in rows], marker="o", markersize=3, color=_COLOURS[0])
        axis.set_xlabel("round")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        if key == "accuracy":
            axis.axhline(0.25, linestyle=":", color=_GREY, label="chance")
            axis.legend(fontsize=8)
    return figure


# Privacy


def plot_curves(curves: PrivacyCurves) -> "Figure":
    """Draws epsilon after each round: a colour for each sigma, a line style for each accountant.

    An approximation is dashed and called so. A budget without a finite value is named instead of drawn.
    """
    figure = _make_figure(8.5, 4.8)
    axis = figure.subplots()
    shown: list[Accountant] = []
    values: list[float] = []
    for curve, colour in zip(curves.curves, _repeat_to(_COLOURS, len(curves.curves)), strict=True):
        for accountant in ACCOUNTANTS:
            drawn = _draw_budget(axis, curve, accountant, colour, staircase=curves.staircase)
            values += drawn
            if drawn and accountant not in shown:
                shown.append(accountant)
    if not values:
        axis.text(0.5, 0.5, "no guarantee: epsilon is infinite", transform=axis.transAxes, ha="center", color="#b00020")
        axis.set_yticks([])
        axis.set_xlim(curves.curves[0].points[0].round, curves.curves[0].last.round)
    elif min(values) > 0 and max(values) > _LOG_FROM * min(values):
        _set_log_scale(axis, "y")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("round" + (" (0: stage 1 alone)" if curves.curves[0].points[0].round == 0 else ""))
    axis.set_ylabel(f"epsilon spent, delta = {curves.delta:g}")
    axis.set_title(f"Accumulated budget, {curves.observer}'s view, {_adjacency_words(curves.relation)}", fontsize=11)
    axis.grid(alpha=0.3)
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _add_budget_legend(figure, curves, sorted(shown, key=ACCOUNTANTS.index))
    return figure


def _draw_budget(
    axis: "Axes", curve: SigmaCurve, accountant: Accountant, colour: str, *, staircase: bool
) -> list[float]:
    """Draws the finite points and returns their values."""
    pairs = [(point.round, getattr(point, accountant.field)) for point in curve.points]
    pairs = [(number, value) for number, value in pairs if value is not None and math.isfinite(value)]
    if not pairs:
        return []
    rounds, values = zip(*pairs, strict=True)
    exact = accountant.field == "epsilon_gdp"  # lies on the PLD's line: rings around it
    alone = len(pairs) == 1
    axis.plot(
        rounds,
        values,
        color=colour,
        linestyle=_STYLES[accountant.field],
        linewidth=1.8 if accountant.field == "epsilon_pld" else 1.3,
        drawstyle="steps-post" if staircase else "default",
        marker="o" if exact or alone else "",
        markevery=max(1, len(pairs) // 12),
        markerfacecolor="none",
        markersize=6,
    )
    return list(values)


def _add_budget_legend(figure: "Figure", curves: PrivacyCurves, shown: Sequence[Accountant]) -> None:
    from matplotlib.lines import Line2D

    colours = _repeat_to(_COLOURS, len(curves.curves))
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=_sigma_text(curve.noise_multiplier))
        for curve, colour in zip(curves.curves, colours, strict=True)
    ]
    for accountant in shown:
        handles.append(
            Line2D(
                [], [], color=_GREY, linestyle=_STYLES[accountant.field],
                marker="o" if accountant.field == "epsilon_gdp" else "", markerfacecolor="none",
                label=accountant.label + ("" if accountant.is_guarantee else "\n(not a guarantee)"),
            )
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)


def plot_tradeoff(tradeoffs: TradeOffs) -> "Figure":
    """Draws type I against type II error of the best attack (left), and its power at small false positive rates (right)."""
    figure = _make_figure(11, 4.8)
    left, right = figure.subplots(1, 2)
    curves: list[tuple[TradeOff, dict[str, Any]]] = [
        (tradeoffs.whole, {"color": _COLOURS[0], "linewidth": 2.0}),
        (tradeoffs.point, {"color": _COLOURS[1], "linestyle": "-.", "linewidth": 1.3}),
    ]
    if tradeoffs.limit is not None:
        curves.append((tradeoffs.limit, {"color": _COLOURS[2], "linestyle": _STYLES["epsilon_clt"], "linewidth": 1.5}))
    lowest = 10.0 ** math.floor(math.log10(tradeoffs.delta) / 2 - 1)
    rates = [lowest ** (1 - i / 300) for i in range(301)]
    for curve, style in curves:
        label = curve.label if curve.is_guarantee else f"{curve.label} (approximation, not a guarantee)"
        left.plot(curve.alpha, curve.beta, label=f"{label}, AUC {curve.auc:.3f}", **style)
        right.plot(rates, [max(1 - curve.beta_at(rate), lowest / 10) for rate in rates], **style)
    perfect = {"color": _GREY, "linestyle": ":", "linewidth": 1.3}
    left.plot([0, 1], [1, 0], label="perfect privacy, AUC 0.500", **perfect)
    right.plot(rates, rates, **perfect)
    left.set(xlabel="type I error alpha (false alarm)", ylabel="smallest type II error beta (miss)", aspect="equal")
    left.set(xlim=(0, 1), ylim=(0, 1))
    right.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.2))
    right.set(xlabel="false positive rate alpha", ylabel="largest true positive rate 1 - beta")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"What a membership attack can reach: {tradeoffs.observer}'s view, {_adjacency_words(tradeoffs.relation)}, "
        f"{_sigma_text(tradeoffs.noise_multiplier)}",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


# Methods compared


def plot_loss_against_epsilon(rows: Sequence[Row]) -> "Figure":
    """Draws held-out loss against epsilon, one series for each method; lower is better.

    Rows have "method", "epsilon", "loss" and, where there are several seeds, "loss_low" and "loss_high". Without
    a finite epsilon (base model, non-private training) a row is a horizontal line. Raises RecipeError without rows.
    """
    figure = _make_figure(8.5, 4.8)
    axis = figure.subplots()
    drawn = _draw_series(axis, rows, x_key="epsilon", y_key="loss")
    _draw_horizontals(axis, [row for row in rows if not _is_drawable(row.get("epsilon"))], "loss")
    if drawn:
        _set_log_scale(
            axis, "x", [_round_to_two_digits(row["epsilon"]) for row in rows if _is_drawable(row.get("epsilon"))]
        )
    axis.set_xlabel("epsilon (smaller is more private)")
    axis.set_ylabel("held-out loss (nats per token)")
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    methods = {row["method"] for row in rows if _is_drawable(row.get("epsilon"))}
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in methods)  # series first, then the lines
    _add_side_legend(figure, [handles[i] for i in order], [labels[i] for i in order])
    return figure


def plot_accuracy_against_bytes(rows: Sequence[Row]) -> "Figure":
    """Draws accuracy against bytes uploaded, a colour for each method, a marker for each epsilon.

    Rows have "method", "epsilon", "bytes", "accuracy" and, where there are several seeds, "accuracy_low" and
    "accuracy_high". A row that uploads nothing is a horizontal line. Raises RecipeError without rows.
    """
    from matplotlib.lines import Line2D

    figure = _make_figure(8.5, 4.8)
    axis = figure.subplots()
    epsilons = sorted({_round_to_two_digits(row["epsilon"]) for row in rows if _is_drawable(row.get("epsilon"))})
    markers = dict(zip(epsilons, _repeat_to(_MARKERS[1:], len(epsilons)), strict=True))

    def marker(row: Row) -> str:
        return markers[_round_to_two_digits(row["epsilon"])] if _is_drawable(row.get("epsilon")) else "o"

    drawn = _draw_series(axis, rows, x_key="bytes", y_key="accuracy", marker_fn=marker)
    if drawn:
        _set_log_scale(axis, "x", text_fn=_bytes_tick)
    labels = list(drawn)
    handles: list[Any] = [Line2D([], [], color=colour, linewidth=4) for colour in drawn.values()]
    shapes = [(f"epsilon = {epsilon:g}", shape) for epsilon, shape in markers.items()]
    if any(not _is_drawable(row.get("epsilon")) and _is_drawable(row.get("bytes")) for row in rows):
        shapes.append(("no finite epsilon", "o"))
    for text, shape in shapes:
        handles.append(Line2D([], [], color=_GREY, linestyle="", marker=shape, markersize=6))
        labels.append(text)
    _draw_horizontals(axis, [row for row in rows if not _is_drawable(row.get("bytes"))], "accuracy")
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
        handles.append(handle)
        labels.append(label)
    axis.set_xlabel("bytes uploaded, all clients and rounds")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)
    _add_side_legend(figure, handles, labels)
    return figure


def _draw_series(
    axis: "Axes", rows: Sequence[Row], *, x_key: str, y_key: str, marker_fn: Callable[[Row], str] | None = None
) -> dict[str, str]:
    """Draws points with ranges for each method, joined unless `marker_fn` picks markers; returns method -> colour."""
    if not any(_is_drawable(row.get(y_key), positive=False) for row in rows):
        raise RecipeError(f"There is no row with a finite {y_key} to plot: run at least one method first.")
    usable = [row for row in rows if _is_drawable(row.get(x_key)) and _is_drawable(row.get(y_key), positive=False)]
    methods = list(dict.fromkeys(row["method"] for row in usable))
    colours = dict(zip(methods, _repeat_to(_COLOURS, len(methods)), strict=True))
    for i, (method, colour) in enumerate(colours.items()):
        own_rows = sorted((row for row in usable if row["method"] == method), key=lambda row: float(row[x_key]))
        places = [_shift_beside_others(row, usable, x_key) for row in own_rows]
        joined = [slice(0, len(own_rows))] if marker_fn is None else [slice(k, k + 1) for k in range(len(own_rows))]
        for part in joined:
            group = own_rows[part]
            axis.errorbar(
                places[part],
                [float(row[y_key]) for row in group],
                yerr=[[_range_length(row, y_key, side) for row in group] for side in ("low", "high")],
                color=colour, label=method if marker_fn is None else None, linewidth=1.3, capsize=3, markersize=6,
                marker=_MARKERS[i % len(_MARKERS)] if marker_fn is None else marker_fn(group[0]), alpha=0.9,
            )  # fmt: skip
    return colours


def _shift_beside_others(row: Row, rows: Sequence[Row], key: str) -> float:
    """Returns the row's place on a logarithmic axis, beside those of other methods with the same value."""
    peers = list(
        dict.fromkeys(r["method"] for r in rows if _round_to_two_digits(r[key]) == _round_to_two_digits(row[key]))
    )
    return float(row[key]) * _SHIFT ** (peers.index(row["method"]) - (len(peers) - 1) / 2)


def _round_to_two_digits(value: Any) -> float:
    return float(f"{float(value):.2g}")


def _range_length(row: Row, key: str, side: str) -> float:
    """Returns how far the range reaches from the mean to this side; 0 where none is given."""
    end: Any = row.get(f"{key}_{side}")
    return abs(float(end) - float(row[key])) if _is_drawable(end, positive=False) else 0.0


def _draw_horizontals(axis: "Axes", rows: Sequence[Row], key: str) -> None:
    """Draws a grey line, with its range as a band, for each value; rows of one value share a line and its label."""
    styles: tuple[Any, ...] = (":", "--", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
    groups: dict[float, list[Row]] = {}
    for row in rows:
        if _is_drawable(row.get(key), positive=False):
            groups.setdefault(float(row[key]), []).append(row)
    for (value, group), style in zip(groups.items(), _repeat_to(styles, len(groups)), strict=True):
        label = " = ".join(dict.fromkeys(row["method"] for row in group))
        axis.axhline(value, color=_GREY, linestyle=style, linewidth=1.3, label=label)
        low, high = (max(_range_length(row, key, side) for row in group) for side in ("low", "high"))
        if low or high:
            axis.axhspan(value - low, value + high, color=_GREY, alpha=0.10, linewidth=0)


def _add_side_legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


# Small parts


def _make_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _repeat_to(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]


def _is_drawable(value: Any, *, positive: bool = True) -> bool:
    """Returns whether a value is finite, and above 0 where the axis is logarithmic. Files write an infinite epsilon as "inf"."""
    if value is None:
        return False
    number = float(value)
    return math.isfinite(number) and (number > 0 or not positive)


def _set_log_scale(
    axis: "Axes",
    which: str,
    ticks: Sequence[float] | None = None,
    text_fn: Callable[[float, Any], str] = lambda value, _: f"{value:g}",
) -> None:
    """Gives an axis a logarithmic scale with plain numbers; `ticks` stand exactly where the values are."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    part = axis.xaxis if which == "x" else axis.yaxis
    axis.set_xscale("log") if which == "x" else axis.set_yscale("log")
    part.set_major_locator(FixedLocator(sorted(set(ticks))) if ticks else LogLocator(subs=(1.0, 2.0, 5.0)))
    part.set_major_formatter(text_fn)
    part.set_minor_formatter(NullFormatter())


def _bytes_tick(count: float, _: Any = None) -> str:
    return bytes_text(count).replace(".0 ", " ")


def _adjacency_words(relation: str) -> str:
    return {"add_remove": "add/remove one client", "replace_one": "replace one client"}[relation]


def _sigma_text(noise_multiplier: float) -> str:
    return f"sigma = {noise_multiplier:.4g}" if noise_multiplier else "no noise"
