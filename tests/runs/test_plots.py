"""Figures hold what they were given and are written where they can be; budget tables name their guarantees."""

import io
import math
import subprocess
import sys

import pytest
from rich.console import Console

from drencoder.cli.budget_view import budget_tables
from drencoder.errors import ArtifactError, RecipeError
from drencoder.privacy.budget_table import budget_table
from drencoder.privacy.make_plan import make_plan
from drencoder.runs.plots import (
    plot_accuracy_against_bytes,
    plot_budget,
    plot_loss_against_epsilon,
    plot_rounds,
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


def test_a_budget_has_a_colour_per_noise_and_a_style_per_accountant(tmp_path):
    table = budget_table(SAMPLED, [1.0, 2.0])
    figure = plot_budget(table)
    (axis,) = figure.axes
    assert legend_texts(figure) == ["sigma = 1", "sigma = 2", "PLD", "RDP"]
    assert len(axis.get_lines()) == 2 * 2
    drawn = {tuple(line.get_ydata()): line for line in axis.get_lines()}
    for budget in table.budgets:
        pld = drawn[tuple(point.epsilon_pld for point in budget.points)]
        rdp = drawn[tuple(point.epsilon_rdp for point in budget.points)]
        assert pld.get_linestyle() == "-"
        assert rdp.get_linestyle() == "-."
        assert list(pld.get_xdata()) == [1, 2, 3]
        assert pld.get_color() == rdp.get_color()
    assert len({line.get_color() for line in axis.get_lines()}) == 2
    assert "delta = 1e-05" in axis.get_ylabel()
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        assert save_figure(figure, tmp_path / f"figure{suffix}").read_bytes().startswith(magic)


def test_budgets_of_exact_local_and_non_private_plans():
    full = plot_budget(budget_table(FULL))
    assert legend_texts(full) == ["sigma = 6", "PLD", "RDP"]
    assert "stage 1" in full.axes[0].get_xlabel()
    assert legend_texts(plot_budget(budget_table(SAMPLED, relation="replace_one"))) == ["sigma = 1", "PLD"]
    local = plot_budget(budget_table(LOCAL))
    assert all(line.get_drawstyle() == "steps-post" for line in local.axes[0].get_lines())
    nothing = plot_budget(budget_table(NON_PRIVATE))
    assert not nothing.axes[0].get_lines()
    assert "infinite" in nothing.axes[0].texts[0].get_text()
    svg_text(nothing)  # draws without a warning


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


def shown(table):
    console = Console(width=110, record=True, file=io.StringIO())
    for one in budget_tables(table):
        console.print(one)
    return console.export_text()


def test_tables_name_the_guarantees():
    table = budget_table(SAMPLED, [1.0, 2.0])
    text = shown(table)
    assert text.count("guarantees: PLD, RDP") == 2
    for budget in table.budgets:
        assert f"sigma = {budget.noise_multiplier:.4g}" in text
        assert f"{budget.last.epsilon_pld:.3f}" in text
        assert f"{budget.last.epsilon_rdp:.3f}" in text
    swapped = shown(budget_table(SAMPLED, relation="replace_one"))
    assert "guarantees: PLD" in swapped
    assert "RDP" not in swapped
    nothing = shown(budget_table(NON_PRIVATE))
    assert "infinite" in nothing
    assert "no guarantee" in nothing
    assert "guarantees:" not in nothing


def test_long_runs_show_at_most_nine_rows():
    long = make_plan(
        trust="local", population=1000, sampling_rate=0.02, rounds=40, delta=DELTA, noise_multiplier=1.5,
        stage1_rate=0.02,
    )  # fmt: skip
    (rounds,) = budget_tables(budget_table(long))
    assert rounds.row_count == 9
    names = list(rounds.columns[0].cells)
    assert (names[0], names[-1]) == ("stage 1", "40")


def test_no_global_figures_and_no_import_before_it_is_needed():
    code = (
        "import sys; import drencoder.runs.report, drencoder.cli.budget_view; from drencoder.runs.plots import plot_rounds, svg_text;"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules and 'scipy' not in sys.modules;"
        "svg_text(plot_rounds([{'round': 0, 'loss': 1.0, 'accuracy': 0.5}]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
