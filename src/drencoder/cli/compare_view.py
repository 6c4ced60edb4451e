"""What a person sees of a comparison: one line per track while it runs, then the table. No torch."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from drencoder.reading import printable
from drencoder.runs.display import make_progress, make_table
from drencoder.study.cells import Cell, Track
from drencoder.study.compare_table import Row, short_cells


class CompareDisplay:
    """A live table on a terminal, one line per finished cell elsewhere."""

    def __init__(self, console: Console, *, tuning_seed: int) -> None:
        self.console = console
        self._tuning_seed = tuning_seed
        self._losses: dict[Track, dict[Cell, float]] = {}
        self._failed: dict[Track, int] = {}
        self._progress = make_progress("cells")
        self._began = time.monotonic()
        self._live: Live | None = None

    def started(self, tracks: Sequence[Track], seeds: int, tuning_runs: int) -> None:
        """Shows the empty table: one line per track."""
        self._losses = {track: {} for track in tracks}
        self._failed = dict.fromkeys(tracks, 0)
        self._seeds, self._tuning_runs = seeds, tuning_runs
        self._task = self._progress.add_task("cells", total=len(tracks) * (seeds + tuning_runs))
        if self.console.is_terminal:
            self._live = Live(self._screen(), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)

    def cell_done(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Shows the result of one cell, or why it failed."""
        self._progress.advance(self._task)
        if "error" in result:
            self._failed[cell.track] += 1
            where = f"{cell.track}, seed {cell.seed}: "
            self.console.print(Text.assemble((where, "yellow"), printable(result["error"])))
        self._losses[cell.track][cell] = result.get("loss", math.nan)
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
        elif "error" not in result:
            kind = "tuning" if cell.seed == self._tuning_seed else f"seed {cell.seed}"
            self.console.print(
                f"{time.monotonic() - self._began:7.1f} s  {cell.track}, {kind}, rate step {cell.rate_step:+g}: "
                f"held-out loss {result['loss']:.3f} in {result['seconds']:.0f} s"
            )

    def close(self) -> None:
        """Leaves the last state of the live table on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _screen(self) -> Group:
        headings = ("method", "ε", "tuning", "seeds", "held-out loss so far", "failed")
        table = make_table("Comparison", *headings, words=("method",))
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
    """Returns the means of a finished comparison for the terminal; the file table.md has all numbers."""
    headings, lines = short_cells(rows)
    caption = "Δ loss: paired with DP-LoRA at the same ε; * its 95 % interval over seeds excludes zero"
    table = make_table("Comparison, means over seeds", *headings, words=("method",), caption=caption)
    for column in table.columns:
        column.no_wrap = True
    for line in lines:
        table.add_row(*line)
    return table
