"""Figures hold what they were given, say what is no guarantee, and are written where they can be."""

import io
import math
import subprocess
import sys

import pytest
from rich.console import Console

from drencoder.cli.curves_view import curve_tables
from drencoder.errors import ArtifactError, RecipeError
from drencoder.privacy.curves import budget_curves
from drencoder.privacy.plan import make_plan
from drencoder.privacy.tradeoff import tradeoffs
from drencoder.runs.plots import (
    plot_accuracy_against_bytes,
    plot_curves,
    plot_loss_against_epsilon,
    plot_rounds,
    plot_tradeoff,
    save_figure,
    svg_text,
)

DELTA = 1e-5
SAMPLED = make_plan(trust="central", population=100, sampling_rate=0.05, rounds=3, delta=DELTA, noise_multiplier=1.0)
FULL = make_plan(
    trust="central", population=3, sampling_rate=1.0, rounds=3, delta=DELTA, noise_multiplier=6.0, stage1_rate=1.0
)
LOCAL = make_plan(
    trust="local", population=1000, sampling_rate=0.02, rounds=6, delta=DELTA, noise_multiplier=1.5, participation_cap=2
)
NON_PRIVATE = make_plan(
    trust="central", population=100, sampling_rate=0.05, rounds=3, delta=DELTA, non_private=["round"]
)


def row(method, epsilon, loss, accuracy, sent, spread=0.1):
    return {
        "method": method, "epsilon": epsilon, "loss": loss, "loss_low": loss - spread, "loss_high": loss + 2 * spread,
        "accuracy": accuracy, "accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.02, "bytes": sent,
    }  # fmt: skip


ROWS = [
    row("DP-LoRA", 2.0, 3.0, 0.5, 1.18e9),
    row("DP-LoRA", 8.0, 1.0, 0.7, 1.18e9),
    row("encoded", 8.0, 0.8, 0.75, 1.87e7),
    row("encoded", 1.9997, 2.5, 0.55, 1.87e7),
    row("LoRA, not private", math.inf, 0.1, 0.99, 1.18e9),
    {"method": "base model", "epsilon": None, "loss": 6.0, "accuracy": 0.25, "bytes": 0.0},
    {"method": "zero update", "epsilon": None, "loss": 6.0, "accuracy": 0.25, "bytes": 0.0},
    {"method": "diverged", "epsilon": 2.0, "loss": math.nan, "accuracy": math.nan, "bytes": 1.0},
]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines_of(axis, colour):
    return [line for line in axis.get_lines() if line.get_color() == colour]


def test_curves_hold_the_points_and_name_the_approximation(tmp_path):
    curves = budget_curves(SAMPLED, [1.0, 2.0])
    figure = plot_curves(curves)
    (axis,) = figure.axes
    texts = legend_texts(figure)
    assert texts == ["sigma = 1", "sigma = 2", "PLD", "RDP", "CLT-GDP\n(not a guarantee)"]
    assert len(axis.get_lines()) == 2 * 3
    drawn = {tuple(line.get_ydata()): line for line in axis.get_lines()}
    for curve in curves.curves:
        pld = drawn[tuple(point.epsilon_pld for point in curve.points)]
        limit = drawn[tuple(point.epsilon_clt for point in curve.points)]
        assert pld.get_linestyle() == "-"
        assert limit.get_linestyle() == "--"
        assert list(pld.get_xdata()) == [1, 2, 3]
        assert pld.get_color() == limit.get_color()
    assert len({line.get_color() for line in axis.get_lines()}) == 2
    assert "delta = 1e-05" in axis.get_ylabel()
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        assert save_figure(figure, tmp_path / f"figure{suffix}").read_bytes().startswith(magic)


def test_curves_of_exact_local_and_non_private_plans():
    full = plot_curves(budget_curves(FULL))
    assert legend_texts(full) == ["sigma = 6", "PLD", "RDP", "exact GDP"]
    assert "stage 1" in full.axes[0].get_xlabel()
    local = plot_curves(budget_curves(LOCAL))
    assert all(line.get_drawstyle() == "steps-post" for line in local.axes[0].get_lines())
    nothing = plot_curves(budget_curves(NON_PRIVATE))
    assert not nothing.axes[0].get_lines()
    assert "infinite" in nothing.axes[0].texts[0].get_text()
    svg_text(nothing)  # draws without a warning


def test_tradeoffs_show_the_diagonal_and_mark_the_limit():
    found = tradeoffs(SAMPLED)
    figure = plot_tradeoff(found)
    left, _ = figure.axes
    texts = legend_texts(figure)
    assert texts[0] == f"PLD, AUC {found.whole.auc:.3f}"
    assert "alone" in texts[1]
    assert "CLT-GDP (approximation, not a guarantee)" in texts[2]
    assert texts[3].startswith("perfect privacy")
    assert tuple(left.get_lines()[0].get_ydata()) == found.whole.beta
    assert list(left.get_lines()[3].get_xdata()) == [0, 1]
    assert svg_text(figure).startswith("<svg")
    svg_text(plot_tradeoff(tradeoffs(NON_PRIVATE)))
    assert "exact GDP" in legend_texts(plot_tradeoff(tradeoffs(FULL)))[0]


def test_loss_against_epsilon():
    figure = plot_loss_against_epsilon(ROWS)
    (axis,) = figure.axes
    assert legend_texts(figure) == ["DP-LoRA", "encoded", "LoRA, not private", "base model = zero update"]
    assert axis.get_xscale() == "log"
    series = {container.get_label(): container for container in axis.containers}
    points, _, (bars,) = series["encoded"].lines
    assert list(points.get_ydata()) == [2.5, 0.8]  # ordered by epsilon
    assert list(points.get_xdata()) == pytest.approx([1.9997, 8.0], rel=0.03)
    assert list(points.get_xdata())[1] != 8.0  # beside the other method's
    assert [tuple(end) for segment in bars.get_segments() for end in segment[:, 1:]] == [
        pytest.approx((value,)) for value in (2.4, 2.7, 0.7, 1.0)
    ]
    assert list(axis.get_xticks()) == [2.0, 8.0]
    flat = [line.get_ydata()[0] for line in axis.get_lines() if len(set(line.get_ydata())) == 1]
    assert {0.1, 6.0} <= set(flat)
    svg_text(figure)


def test_accuracy_against_bytes():
    figure = plot_accuracy_against_bytes(ROWS)
    (axis,) = figure.axes
    assert legend_texts(figure) == [
        "DP-LoRA", "encoded", "LoRA, not private", "epsilon = 2", "epsilon = 8", "no finite epsilon",
        "base model = zero update",
    ]  # fmt: skip
    assert axis.get_xscale() == "log"
    places = sorted({round(float(c.lines[0].get_xdata()[0]), -6) for c in axis.containers})
    assert places[0] == pytest.approx(1.87e7, rel=0.03)
    assert places[-1] == pytest.approx(1.18e9, rel=0.03)
    marks = [container.lines[0].get_marker() for container in axis.containers]
    assert marks == ["s", "^", "^", "s", "o"]  # epsilons 2, 8, then 8, 2 in the rows' order, then none
    assert "MB" in axis.xaxis.get_major_formatter()(2e7, None)
    svg_text(figure)


@pytest.mark.parametrize("plot", [plot_loss_against_epsilon, plot_accuracy_against_bytes])
def test_rows_without_a_number_are_refused_and_only_lines_are_fine(plot):
    for rows in ([], ROWS[-1:]):
        with pytest.raises(RecipeError, match="run at least one method"):
            plot(rows)
    figure = plot(ROWS[5:7])
    assert legend_texts(figure) == ["base model = zero update"]
    svg_text(figure)


def test_rounds_of_a_run():
    figure = plot_rounds([{"round": 0, "loss": 6.0, "accuracy": 0.2}, {"round": 5, "loss": 4.0, "accuracy": 0.4}])
    left, right = figure.axes
    assert list(left.get_lines()[0].get_ydata()) == [6.0, 4.0]
    assert list(right.get_lines()[0].get_ydata()) == [0.2, 0.4]


def test_saving_refuses_with_one_sentence(tmp_path):
    figure = plot_rounds([{"round": 0, "loss": 6.0, "accuracy": 0.2}])
    for name in ("figure.jpg", "figure", "png"):
        with pytest.raises(RecipeError, match=r"\.png, \.svg or \.pdf"):
            save_figure(figure, tmp_path / name)
    with pytest.raises(ArtifactError, match="No such file"):
        save_figure(figure, tmp_path / "missing" / "figure.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ArtifactError, match="Cannot write the figure"):
        save_figure(figure, tmp_path / "folder.png")


def test_the_same_figure_is_written_without_a_date(tmp_path):
    figure = plot_rounds([{"round": 0, "loss": 6.0, "accuracy": 0.2}])
    assert "<dc:date>" not in svg_text(figure)
    assert b"CreationDate" not in save_figure(figure, tmp_path / "a.pdf").read_bytes()


def shown(curves):
    console = Console(width=110, record=True, file=io.StringIO())
    for table in curve_tables(curves):
        console.print(table)
    return console.export_text()


def test_tables_mark_what_is_no_guarantee():
    text = shown(budget_curves(SAMPLED, [1.0, 2.0]))
    assert "CLT-GDP*" in text
    assert "PLD*" not in text
    assert "guarantees: PLD, RDP" in text
    assert "not a guarantee" in text.replace("\n", " ")
    for curve in budget_curves(SAMPLED, [1.0, 2.0]).curves:
        assert f"sigma = {curve.noise_multiplier:.4g}" in text
        assert f"{curve.last.epsilon_pld:.3f}" in text
        assert f"{curve.last.epsilon_clt:.3f}" in text
    assert "0.1 │   0.341" in text  # mu = 0.1 at delta = 1e-5


def test_tables_of_exact_and_non_private_plans():
    full = budget_curves(FULL)
    text = shown(full)
    assert "exact GDP" in text
    assert "*" not in text
    assert "whole plan" in text
    assert f"{full.curves[0].last.mu ** 2:.3f}" in text
    swapped = shown(budget_curves(SAMPLED, relation="replace_one"))
    assert "guarantees: PLD" in swapped
    assert "CLT" not in swapped
    nothing = shown(budget_curves(NON_PRIVATE))
    assert "infinite" in nothing
    assert "no guarantee" in nothing
    assert "guarantees:" not in nothing


def test_long_runs_show_at_most_nine_rows():
    long = make_plan(
        trust="local", population=1000, sampling_rate=0.02, rounds=40, delta=DELTA, noise_multiplier=1.5,
        stage1_rate=0.02,
    )  # fmt: skip
    rounds, *_ = curve_tables(budget_curves(long))
    assert rounds.row_count == 9
    names = list(rounds.columns[0].cells)
    assert (names[0], names[-1]) == ("stage 1", "40")


def test_no_global_figures_and_no_import_before_it_is_needed():
    code = (
        "import sys; import drencoder.runs.report, drencoder.cli.curves_view; from drencoder.runs.plots import *;"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules and 'scipy' not in sys.modules;"
        "svg_text(plot_rounds([{'round': 0, 'loss': 1.0, 'accuracy': 0.5}]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
