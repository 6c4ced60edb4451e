"""The utility study: what is run where, what is judged, and what a page keeps. The ladder and the pool have tests of their own."""

import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drencoder.errors import ArtifactError
from drencoder.study.cells import Cell, CellStore, Row, read_rows
from drencoder.study.tuning import next_cells

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the study: `archive`, `grid`, `results` and `page`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from utility_study import archive, grid, page, results

    yield SimpleNamespace(archive=archive, grid=grid, page=page, results=results)
    for name in [name for name in sys.modules if name.startswith("utility")]:
        del sys.modules[name]


def setting_of(study: Any, place: tuple[str, int] = ("small", 64), trust: str = "central") -> Any:
    return study.grid.Setting(trust, "facts", *place)


def test_every_setting_has_seeds_of_its_own_to_tune_on(study: Any) -> None:
    for trust, *place in study.grid.SEEDS:
        plan = setting_of(study, place, trust).plan
        assert not set(plan.seeds) & set(plan.tuning_seeds)
        assert not set(plan.seeds) & set(range(400, 450))  # those that the encoder's sizes were chosen on
        assert len(plan.seeds) >= 3


def test_tracks_differ_and_can_be_read_back(study: Any) -> None:
    tracks = study.grid.tracks({})
    assert len(tracks) == len(set(tracks)) == 174
    assert {track.method for track in tracks} == set(study.grid.ARMS)
    for track in tracks:
        assert study.grid.setting_of(track).track(track.method, track.epsilon) == track
    few = study.grid.tracks({"arms": ["hybrid"], "cohorts": ["8"], "epsilons": ["4"], "trusts": ["central"]})
    assert {(track.method, track.epsilon) for track in few} == {("hybrid", 4.0)}
    assert len(few) == 5  # two tasks with two adapters, and the held-back task


def test_every_arm_that_is_not_retired_has_a_recipe(study: Any) -> None:
    first = {track.method: track for track in reversed(study.grid.tracks({}))}
    for name, arm in study.grid.ARMS.items():
        cell = Cell(first[name], 1000, 0.0)
        if not arm.retired:
            recipe = study.grid.recipe_of(cell, study.grid.Scale(), 4809.0)
            assert recipe.server.learning_rate == arm.first_rate_at(4809.0)


def test_noise_shortens_every_first_rate_alike(study: Any) -> None:
    hybrid, plain = study.grid.ARMS["hybrid"], study.grid.ARMS["dp-lora"]
    assert hybrid.first_rate_at(math.inf) == 3.0
    for k_star in (73.0, 148.0, 1698.0):
        scale = study.grid.noise_scale(k_star)
        assert hybrid.first_rate_at(k_star) / 3.0 == plain.first_rate_at(k_star) / 0.75 == scale
    assert study.grid.noise_scale(73.0) == 0.5
    cell = Cell(setting_of(study).track("dp-lora", 4.0), 100, 1.0, 1)
    assert study.grid.rate_and_clip(cell, math.inf) == (0.75 * 2 / 4, 4.0)


Loss = Callable[[float, int], float]


def row_of(study: Any, cell: Cell, loss: float, code_size: int) -> Row:
    rate, clip = study.grid.rate_and_clip(cell, 4809.0)
    return {
        "key": cell.key, "arm": cell.track.method, "seed": cell.seed, "rate": rate, "clip": clip, "version": "0",
        "k_star": 4809.0, "noise_multiplier": 1.0, "loss": loss, "accuracy": {}, "base": {"loss": 9.0, "accuracy": {}},
        "zero": {"loss": 9.0, "accuracy": {}}, "bytes_up": 1000 + cell.seed, "rounds": 16, "epsilon": {"public": 4.0},
        "seconds": 1.0, "encoder": {"name": "hybrid", "code_size": code_size, "update_size": 32_768},
    }  # fmt: skip


def fill(study: Any, folder: Path, losses: dict[str, float]) -> dict[str, Row]:
    """A study in which every run of an arm ended at that arm's loss, and a rate away from its first is worse."""
    sizes = {"dp-lora": 32_768, "hybrid": 16_384, "ffa": 16_384, "hybrid-10": 3_277, "hybrid-64": 3_278}
    setting = setting_of(study)
    with CellStore(folder, {"scale": asdict(study.grid.Scale())}) as store:
        for arm, least in losses.items():
            track, known = setting.track(arm, 4.0), dict[Cell, float]()
            while cells := next_cells(track, setting.plan, known):
                known |= {cell: least + cell.rate_step**2 + cell.clip_step for cell in cells}
            store.add(*(row_of(study, cell, loss, sizes[arm]) for cell, loss in known.items()))
        return store.rows


@pytest.mark.parametrize(("ours", "good"), [(2.9, 1), (3.02, 1), (3.04, 0)])
def test_verdicts_count_what_the_rows_say(study: Any, tmp_path: Path, ours: float, good: int) -> None:
    rows = fill(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": ours})
    results, failures = study.results.load_results(rows)
    claims = {one.number: one for one in study.results.verdicts(results)}
    assert (claims["1a"].good, claims["1a"].of) == (good, 1)
    assert claims["1a"].word == ("met so far" if good else "NOT met so far")  # one of many settings
    assert (claims["2"].of, claims["2"].word) == (0, "not measured")
    (pair,) = study.results.compare_arms(results, [study.results.AUTOMATIC])
    assert pair.better == (ours < 3.0)
    whole, code = 20 + 4 * 32_768, 24 + 16_384 // 2  # of a message: a run's total is chance without trust
    assert pair.fewer_bytes == whole / code
    assert failures == []


def test_a_page_keeps_every_row_and_a_folder_can_be_made_of_it(study: Any, tmp_path: Path) -> None:
    fill(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": 2.9})
    results = tmp_path / "results"
    study.page.write_page(tmp_path / "study", results)
    first = {path.name: path.read_bytes() for path in results.iterdir() if path.suffix != ".png"}
    study.archive.restore(results, tmp_path / "again")
    assert read_rows(tmp_path / "again") == read_rows(tmp_path / "study")
    study.page.write_page(tmp_path / "again", results)
    assert {name: (results / name).read_bytes() for name in first} == first
    with pytest.raises(ArtifactError, match="has cells already"):
        study.archive.restore(results, tmp_path / "again")
    with pytest.raises(ArtifactError, match="give the folder that --page wrote"):
        study.archive.restore(tmp_path / "study", tmp_path / "new")
    (results / study.archive.ARCHIVE).write_bytes(b"cut")
    with pytest.raises(ArtifactError, match=r"cannot be read .*restore the files that --page wrote"):
        study.archive.restore(results, tmp_path / "new")
    with pytest.raises(ArtifactError, match="holds no utility study"):
        study.page.write_page(tmp_path, results)


def test_a_comparator_meets_the_largest_of_our_codes_that_fits(study: Any, tmp_path: Path) -> None:
    rows = fill(study, tmp_path / "study", {"ffa": 3.0, "hybrid-10": 2.8, "hybrid-64": 3.1})
    results, _ = study.results.load_results(rows)
    (all_of_ours,) = study.results.against_comparators(results)
    (four_bits,) = study.results.against_comparators(results, study.grid.FOUR_BITS)
    assert (all_of_ours.ours.track.method, all_of_ours.better) == ("hybrid-64", False)
    assert (four_bits.ours.track.method, four_bits.better) == ("hybrid-10", True)


def test_the_stored_cells_make_the_published_page(study: Any, tmp_path: Path) -> None:
    study.archive.restore(RESULTS, tmp_path / "study")
    study.page.write_page(tmp_path / "study", tmp_path / "results")
    for name in ("utility.md", "utility.json"):
        assert (tmp_path / "results" / name).read_bytes() == (RESULTS / name).read_bytes(), name
    stored = [
        lzma.decompress((folder / study.archive.ARCHIVE).read_bytes()) for folder in (tmp_path / "results", RESULTS)
    ]
    assert stored[0] == stored[1]
    rows = list(map(json.loads, stored[0].splitlines()))
    assert len(rows) == len({row["key"] for row in rows})
