"""What a person sees of a comparison: one line per track while it runs, then the table. No torch."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from drencoder.study.compare import Cell, Track
from drencoder.study.compare_table import Row, short_cells

__all__ = ["CompareDisplay", "comparison_table"]


class CompareDisplay:
    """A live table on a terminal, one line per finished cell elsewhere."""

    def __init__(self, console: Console, *, tuning_seed: int) -> None:
        self.console = console
        self._tuning_seed = tuning_seed
        self._losses: dict[Track, dict[Cell, float]] = {}
        self._failed: dict[Track, int] = {}
        self._progress = Progress(
            TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._began = time.monotonic()
        self._live: Live | None = None

    def started(self, tracks: Sequence[Track], seeds: int, tuning_runs: int) -> None:
        self._losses = {track: {} for track in tracks}
        self._failed = dict.fromkeys(tracks, 0)
        self._seeds, self._tuning_runs = seeds, tuning_runs
        self._task = self._progress.add_task("cells", total=len(tracks) * (seeds + tuning_runs))
        if self.console.is_terminal:
            self._live = Live(self._screen(), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)

    def cell_done(self, cell: Cell, result: Mapping[str, Any]) -> None:
        self._progress.advance(self._task)
        if "error" in result:
            self._failed[cell.track] += 1
            self.console.print(f"[yellow]{cell.track}, seed {cell.seed}:[/yellow] {result['error']}", highlight=False)
        self._losses[cell.track][cell] = result.get("loss", math.nan)
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
        elif "error" not in result:
            kind = "tuning" if cell.seed == self._tuning_seed else f"seed {cell.seed}"
            self.console.print(
                f"{time.monotonic() - self._began:7.1f} s  {cell.track}, {kind}, rate step {cell.step:+g}: "
                f"held-out loss {result['loss']:.3f} in {result['seconds']:.0f} s",
                highlight=False,
            )

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _screen(self) -> Group:
        table = Table(title="Comparison", title_justify="left")
        for heading in ("method", "ε", "tuning", "seeds", "held-out loss so far", "failed"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for track, losses in self._losses.items():
            tuning = [loss for cell, loss in losses.items() if cell.seed == self._tuning_seed]
            final = [loss for cell, loss in losses.items() if cell.seed != self._tuning_seed and loss == loss]
            table.add_row(
                track.method,
                "-" if track.epsilon is None else f"{track.epsilon:g}",
                f"{len(tuning)}/{self._tuning_runs}",
                f"{len(final)}/{self._seeds}",
                f"{sum(final) / len(final):.3f}" if final else "-",
                str(self._failed[track] or "-"),
            )
        return Group(table, self._progress)


def comparison_table(rows: Sequence[Row]) -> Table:
    """The table of a finished comparison, for the terminal: means; table.md has all."""
    headings, lines = short_cells(rows)
    table = Table(
        title="Comparison, means over seeds",
        title_justify="left",
        caption="Δ loss: paired with DP-LoRA at the same ε; * its 95 % interval over seeds excludes zero",
        caption_justify="left",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
