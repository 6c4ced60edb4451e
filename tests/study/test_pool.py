"""The pool and the store: what is kept when a cell fails, when a worker dies, when a person interrupts, and when all is killed."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from drencoder.errors import ArtifactError, DataError, PrivacyError
from drencoder.study.cells import Cell, CellStore, Row, Track, loss_of, read_rows
from drencoder.study.pool import Outcome, run_study, stored_results
from drencoder.study.tuning import TuningPlan

TRACKS = [Track("good", 2.0), Track("odd", 2.0)]
PLAN = TuningPlan(seeds=(0, 1), tuning_seeds=(100,), least_rates=1, most_rates=1, rate_factor=2.0)
PLANS = dict.fromkeys(TRACKS, PLAN)


def made_up(cell: Cell, odd: str = "", noted: Path | None = None) -> Row:
    """The work of a cell in a worker process; the method `odd` fails in the way that is asked for."""
    if noted is not None:
        (noted / cell.key.replace("/", "-")).touch()
    if cell.track.method == "odd":
        if odd == "diverges":
            raise PrivacyError("the run diverged")
        if odd == "data":
            raise DataError("the data are away today")
        if odd == "bug":
            raise ZeroDivisionError("ours")
        if odd == "dies":
            os._exit(3)
    return {"loss": 1.0 + cell.seed}


class Notes:
    """Remembers the cells, and interrupts like Ctrl-C after some of them."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.cells: list[Cell] = []
        self._interrupt_after = interrupt_after

    def cell_done(self, cell: Cell, row: Row) -> None:
        self.cells.append(cell)
        if len(self.cells) == self._interrupt_after:
            raise KeyboardInterrupt


def start(folder: Path, odd: str = "", *, notes: Notes | None = None, noted: Path | None = None) -> Outcome:
    with CellStore(folder, {"scale": 1}) as store:
        work = partial(made_up, odd=odd, noted=noted)
        return run_study(TRACKS, PLANS, store, work, notes or Notes(), processes=1)


def keys(cells: Sequence[Cell]) -> list[str]:
    return [cell.key for cell in cells]


def test_every_cell_is_run_once_first_track_first(tmp_path: Path) -> None:
    notes = Notes()
    outcome = start(tmp_path, notes=notes)
    assert keys(notes.cells) == [
        f"eps2/{method}/seed{seed}/rate+0/clip+0" for method in ("good", "odd") for seed in (100, 0, 1)
    ]
    assert list(outcome.results) == notes.cells
    assert list(read_rows(tmp_path)) == keys(notes.cells)
    row = outcome.results[notes.cells[0]]
    assert (row["loss"], row["seed"], row["rate_step"]) == (101.0, 100, 0.0)


def test_an_interrupted_study_goes_on_with_the_cells_that_have_no_row(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    noted.mkdir()
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "study", notes=Notes(interrupt_after=2))
    stored = read_rows(tmp_path / "study")
    assert len(stored) == 2
    outcome = start(tmp_path / "study", noted=noted)
    assert len(outcome.results) == 6
    assert len(list(noted.iterdir())) == 4
    assert not {key.replace("/", "-") for key in stored} & {path.name for path in noted.iterdir()}


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    outcome = start(tmp_path, "diverges")
    odd = [row for cell, row in outcome.results.items() if cell.track.method == "odd"]
    assert len(odd) == 3
    assert {row["error"] for row in odd} == {"the run diverged"}
    assert loss_of(odd[0]) == float("inf")


def test_what_may_be_otherwise_tomorrow_stops_the_study_and_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="away today"):
        start(tmp_path, "data")
    assert len(read_rows(tmp_path)) == 3
    assert len(start(tmp_path).results) == 6


def test_a_bug_ends_its_track_alone(tmp_path: Path) -> None:
    outcome = start(tmp_path, "bug")
    assert list(outcome.given_up) == [TRACKS[1]]
    assert isinstance(outcome.given_up[TRACKS[1]], ZeroDivisionError)
    assert {cell.track for cell in outcome.results} == {TRACKS[0]}
    assert len(outcome.results) == 3


def test_a_worker_that_dies_is_one_sentence_that_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"fewer --processes.*start the same command again"):
        start(tmp_path, "dies")
    assert len(read_rows(tmp_path)) == 3


def test_no_cell_starts_when_the_time_is_over(tmp_path: Path) -> None:
    with CellStore(tmp_path, {}) as store:
        assert run_study(TRACKS, PLANS, store, made_up, Notes(), processes=1, minutes=0).results == {}


def test_a_folder_may_hold_more_rows_than_a_plan_asks_for(tmp_path: Path) -> None:
    start(tmp_path)
    rows = read_rows(tmp_path)
    assert len(rows) == 6
    fewer = TuningPlan(seeds=(1,), tuning_seeds=(100,), least_rates=1, most_rates=1, rate_factor=2.0)
    known = stored_results(TRACKS[:1], {TRACKS[0]: fewer}, rows)
    assert [cell.seed for cell in known] == [100, 1]


# --- the store -------------------------------------------------------------------------------------------


def test_a_line_that_a_kill_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    with CellStore(tmp_path, {}) as store:
        store.add({"key": "a"}, {"key": "b"})
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "c')
    assert list(read_rows(tmp_path)) == ["a", "b"]
    with CellStore(tmp_path, {}) as store:
        store.add({"key": "d"})
        assert list(store.rows) == ["a", "b", "d"]
    assert [json.loads(line)["key"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == ["a", "b", "d"]


@pytest.mark.parametrize("line", ["no json", "[]", "{}", "3"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "cells.jsonl").write_text(f'{{"key": "a"}}\n{line}\n')
    with pytest.raises(ArtifactError, match=r"line 2 of .*cells\.jsonl is not a cell"):
        read_rows(tmp_path)


def test_a_folder_is_one_process_at_a_time_and_one_study(tmp_path: Path) -> None:
    with CellStore(tmp_path / "one", {"scale": {"rounds": 16}}), pytest.raises(ArtifactError, match="another process"):
        CellStore(tmp_path / "one", {"scale": {"rounds": 16}})
    with pytest.raises(ArtifactError, match=r"\(scale\.rounds is 16 there and 2 here\)"):
        CellStore(tmp_path / "one", {"scale": {"rounds": 2}})
    with pytest.raises(ArtifactError, match=r"\(scale\.seeds is None there and 3 here\)"):
        CellStore(tmp_path / "one", {"scale": {"rounds": 16, "seeds": 3}})
    with CellStore(tmp_path / "one", {"scale": {"rounds": 16}}) as store:  # the refused ones hold no lock
        assert store.rows == {}
    (tmp_path / "one" / "study.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as a study"):
        CellStore(tmp_path / "one", {})
