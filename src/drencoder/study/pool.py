"""Runs the cells of a study in worker processes until every track is finished, is interrupted, or its time is over. No torch."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Protocol

from drencoder import __version__
from drencoder.errors import ArtifactError, DataError, DeviceError, DrencoderError
from drencoder.study.cells import Cell, CellStore, Row, Track, loss_of
from drencoder.study.tuning import TuningPlan, next_cells

_PARENT_CHECK_S = 5.0
Work = Callable[[Cell], Row]


class CellWatcher(Protocol):
    """Is told how far a study is."""

    def cell_done(self, cell: Cell, row: Row) -> None: ...


@dataclass
class Outcome:
    """What a study came to.

    `results` has the rows that the tuning ladder asked for. `given_up` has the tracks that an error of ours ended, which is no result
    of theirs.
    """

    results: dict[Cell, Row] = field(default_factory=dict)
    given_up: dict[Track, Exception] = field(default_factory=dict)


def run_cell(work: Work, cell: Cell) -> Row:
    """The row of one cell, in a worker process.

    A run that cannot be, or that diverges, is a result too: its row has the sentence as `error`.

    Raises:
      DataError, ArtifactError, DeviceError: what may be otherwise tomorrow is no result.
    """
    started = time.monotonic()
    row: Row = {"key": cell.key, "seed": cell.seed, "rate_step": cell.rate_step, "clip_step": cell.clip_step}
    try:
        row |= work(cell)
    except (DataError, ArtifactError, DeviceError):
        raise
    except DrencoderError as error:
        row["error"] = str(error)
    return row | {"version": __version__, "seconds": round(time.monotonic() - started, 2)}


def stored_results(
    tracks: Sequence[Track], plans: Mapping[Track, TuningPlan], rows: Mapping[str, Row]
) -> dict[Cell, Row]:
    """The stored rows that these plans ask for: a study's folder may hold more, of plans that were asked for before."""
    results: dict[Cell, Row] = {}
    for track in tracks:
        losses: dict[Cell, float] = {}
        while known := [cell for cell in next_cells(track, plans[track], losses) if cell.key in rows]:
            results |= {cell: rows[cell.key] for cell in known}
            losses |= {cell: loss_of(rows[cell.key]) for cell in known}
    return results


def run_study(
    tracks: Sequence[Track],
    plans: Mapping[Track, TuningPlan],
    store: CellStore,
    work: Work,
    watcher: CellWatcher,
    *,
    processes: int = 0,
    minutes: float = math.inf,
) -> Outcome:
    """Runs every cell that has no row yet, first track first; each finished cell is stored before the next is asked for.

    Args:
      tracks: all different.
      plans: of each track.
      work: makes a cell's row in a worker process; it must be picklable.
      processes: cells that run at a time, with one thread each; 0 = one per core.
      minutes: no cell is started after this time.

    Raises:
      ArtifactError: a worker process died.
      DrencoderError: what `run_cell` raises. The cells that are finished are stored, and the next start goes on from them.
    """
    outcome = Outcome(stored_results(tracks, plans, store.rows))
    losses: dict[Track, dict[Cell, float]] = {track: {} for track in tracks}
    for cell, row in outcome.results.items():
        losses[cell.track][cell] = loss_of(row)
        watcher.cell_done(cell, row)
    deadline, size = time.monotonic() + 60 * minutes, processes or os.cpu_count() or 1
    pool = ProcessPoolExecutor(size, get_context("spawn"), _start_worker, (os.getpid(),))
    running: dict[Future[Row], Cell] = {}
    try:
        while True:
            left = [track for track in tracks if track not in outcome.given_up and time.monotonic() < deadline]
            for cell in list(islice(_waiting(left, plans, losses, set(running.values())), size - len(running))):
                running[pool.submit(run_cell, work, cell)] = cell
            if not running:
                return outcome
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    row = future.result()
                except (DrencoderError, BrokenProcessPool):
                    raise
                except Exception as error:  # one method's bug must not end the night of all others
                    outcome.given_up[cell.track] = error
                    continue
                store.add(row)
                outcome.results[cell], losses[cell.track][cell] = row, loss_of(row)
                watcher.cell_done(cell, row)
    except BrokenProcessPool:
        raise ArtifactError(
            f"a worker process died (out of memory?): free some, or give fewer --processes. Finished cells are in "
            f"{store.folder}; start the same command again to go on."
        ) from None
    except BaseException:
        _end_workers(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _waiting(
    tracks: Sequence[Track],
    plans: Mapping[Track, TuningPlan],
    losses: Mapping[Track, Mapping[Cell, float]],
    running: set[Cell],
) -> Iterator[Cell]:
    """Cells that could start now, first track first."""
    for track in tracks:
        yield from (cell for cell in next_cells(track, plans[track], losses[track]) if cell not in running)


def _end_workers(pool: ProcessPoolExecutor) -> None:
    """Ends the workers at once: what they did not finish is resumed, or done again, by the next start."""
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _start_worker(parent: int) -> None:
    """Gives a worker one thread, and ends it when its parent was killed, as nobody would read its result."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
