"""A comparison: who runs when, what is tuned, what the table says, and that a second start runs nothing again."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.errors import ArtifactError, DataError, RecipeError
from drencoder.privacy.ledger import Ledger
from drencoder.published import autoencoder
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs.plan_overview import privacy_plan
from drencoder.study import pool
from drencoder.study.cells import Cell, Row, Track, loss_of, read_rows
from drencoder.study.compare import cell_folder, compare, run_method, tracks_of, tuning_plan
from drencoder.study.compare_table import Row as TableRow
from drencoder.study.compare_table import cells_of_table, rows_of, short_cells, write_comparison
from drencoder.study.methods import METHODS, method_named, start_rates
from drencoder.study.pool import run_cell
from drencoder.study.settings import Compare, load_comparison
from drencoder.study.tuning import next_cells, tuned_steps

DP = Track("dp-lora", 2.0)


class Notes:
    """Remembers which cells were reported."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []

    def started(self, tracks: Sequence[Track], seeds: int, tuning_runs: int) -> None: ...

    def cell_done(self, cell: Cell, result: Mapping[str, Any]) -> None:
        self.cells.append(cell)


def climb(losses: Mapping[float, float], runs: int) -> tuple[list[float], float]:
    """The steps that tuning tries on a known landscape (inf where it is not given), and the one it settles on."""
    settings = Compare(tuning_runs=runs, seeds=(0,))
    plan, known = tuning_plan(settings), {}
    tried: list[float] = []
    cells = next_cells(DP, plan, known)
    while cells[0].seed == settings.tuning_seed:
        for cell in cells:
            tried.append(cell.rate_step)
            known[cell] = loss_of({"loss": losses.get(cell.rate_step, math.inf)})
        cells = next_cells(DP, plan, known)
    assert [cell.seed for cell in cells] == [0]
    assert (cells[0].rate_step, cells[0].clip_step) == tuned_steps(plan, known)
    return tried, cells[0].rate_step


def test_tuning_goes_where_the_loss_falls() -> None:
    assert climb({0: 1.0, -1: 2.0, 1: 0.5, 2: 0.1, 3: 0.3}, 5) == ([0, -1, 1, 2, 3], 2)
    assert climb({0: 1.0, -1: 0.5, 1: 2.0, -2: 0.7, -1.5: 0.4}, 5) == ([0, -1, 1, -2, -1.5], -1.5)
    assert climb({0: 0.5, -1: 1.0, 1: 0.8, 0.5: 0.3}, 4) == ([0, -1, 1, 0.5], 0.5)
    assert climb({0: 1.0}, 1) == ([0], 0)
    assert climb({0: 1.0, -1: 0.5}, 2) == ([0, -1], -1)


def test_diverged_and_failed_runs_lose_and_ties_take_the_smaller_rate() -> None:
    assert climb({0: math.nan, -1: 3.0, 1: math.inf}, 3)[1] == -1
    assert climb({0: 1.0, -1: 1.0, 1: 1.0}, 3)[1] == -1
    settings = Compare(tuning_runs=1)
    failed = {Cell(DP, settings.tuning_seed, 0.0): loss_of({"error": "no"})}
    assert [cell.seed for cell in next_cells(DP, tuning_plan(settings), failed)] == list(settings.seeds)


def test_every_method_gets_the_same_number_of_tuning_runs() -> None:
    for runs in range(1, 8):
        for landscape in ({0: 1.0}, {0: 3.0, 1: 2.0, 2: 1.0, 3: 0.5}, {0: 2.0, -1: 1.0, -2: 0.5}):
            tried, _ = climb(landscape, runs)
            assert len(tried) == len(set(tried)) == runs


def test_private_methods_have_a_track_per_epsilon_and_others_one() -> None:
    settings = Compare(methods=("lora", "dp-lora"), epsilons=(1.0, 4.0))
    assert tracks_of(settings) == [Track("lora", None), Track("dp-lora", 1.0), Track("dp-lora", 4.0)]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"methods": ("dp-laura",)}, "names 'dp-laura': choose from"),
        ({"methods": ()}, "nothing to run"),
        ({"seeds": ()}, "nothing to run"),
        ({"seeds": (3, 100)}, "tuning_seed = 100"),
        ({"methods": ("lora", "lora")}, "twice"),
        ({"epsilons": (2.0, 2.0)}, "twice"),
        ({"seeds": (0, 0, 1)}, "twice"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tracks_of(Compare(**knobs))


def test_a_recipe_without_evaluation_data_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe, settings = load_comparison(
        None, ["data.source=notes.jsonl", "data.client_field=who", "federation.population=40"]
    )
    with pytest.raises(RecipeError, match=r"by held-out loss\. The run has no evaluation data.* in evaluation\.data"):
        compare(recipe, settings, tmp_path / "study", Notes())
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("rate", ["dp-lora", "dp-lora=fast", "=3", "laura=1", "dp-lora=0", "dp-lora=nan"])
def test_ill_formed_rates_are_one_sentence(rate: str) -> None:
    with pytest.raises(RecipeError, match=r"compare\.rates|compare\.methods"):
        start_rates(load_comparison(None, [f'compare.rates=["{rate}"]'])[1].rates)


def test_methods_differ_in_what_they_say_and_in_nothing_else() -> None:
    base, rates = load_recipe("paper/embedded-dolly"), start_rates(("random=8",))
    recipes = {
        name: method.recipe(base, epsilon=2.0, seed=7, rate=3.0 * method.first_rate(base, rates))
        for name, method in METHODS.items()
    }
    for name, recipe in recipes.items():
        assert recipe.seed == 7
        assert recipe.data == base.data
        assert recipe.federation == base.federation
        assert replace(recipe.adapter, start=base.adapter.start) == base.adapter
        assert (recipe.adapter.start == "orthonormal") == (name == "ffa-orthonormal")
        assert recipe.privacy.clip_l2 == base.privacy.clip_l2
        plan = privacy_plan(recipe)
        private = METHODS[name].private
        assert (recipe.privacy.trust == "non-private") != private
        assert ("round" in plan.non_private) != private
        if private:
            assert 1.99 < plan.epsilons()["server"].epsilon_pld <= 2.0 or name == "fedcg-dp"
    assert recipes["random"].server.learning_rate == 24.0
    assert recipes["dp-lora"].server.learning_rate == 3.0 * base.server.learning_rate
    assert recipes["centralised"].local.learning_rate == 3.0 * base.local.learning_rate
    assert recipes["dr-encoder"].privacy.noise_in == "update"
    assert recipes["dr-encoder-code"].privacy.noise_in == "code"
    for name in ("fedcg", "fedcg-dp"):
        plan = privacy_plan(recipes[name])
        assert "stage1" in plan.non_private
        assert math.isinf(plan.epsilons()["server"].epsilon_pld)


def test_fedcg_spends_its_budget_on_the_rounds() -> None:
    base = load_recipe("paper/embedded-dolly")
    plan = privacy_plan(METHODS["fedcg-dp"].recipe(base, epsilon=2.0, seed=0, rate=1.0))
    assert plan.noise_multiplier > 1
    assert plan.stage1_noise_multiplier == 0
    assert method_named("fedcg-dp").private


def test_a_method_with_an_autoencoder_has_the_one_that_the_recipe_names() -> None:
    for name, encoder in (("paper/embedded-dolly", "autoencoder-published"), ("paper/embedded-crowd", "autoencoder")):
        for method in ("dr-encoder", "fedcg", "noise"):
            made = METHODS[method].recipe(load_recipe(name), epsilon=2.0, seed=0, rate=1.0)
            assert made.encoder.name == encoder


# --- a whole comparison, small --------------------------------------------------------------------------------


def small(folder: Path, *more: str) -> tuple[Recipe, Compare]:
    methods = '["lora", "centralised", "dp-lora", "dr-encoder", "fedcg", "random"]'
    return load_comparison(
        None,
        [
            *tiny_overrides(folder), "data.examples_per_client=3", "federation.rounds=2",
            "prior.sampling_rate=0.5", "name=small", f"compare.methods={methods}",
            "compare.epsilons=[8]", "compare.seeds=[0, 1, 2]", "compare.tuning_runs=1",
            "privacy.noise=replay", *more,  # replay: cohorts depend on nothing but the seed
        ],
    )  # fmt: skip


def run_small(cell: Cell, recipe: Recipe, folder: Path) -> Row:
    """The row of one cell, run in this process."""
    plan = tuning_plan(Compare(tuning_runs=1))
    return run_cell(partial(run_method, recipe=recipe, plan=plan, rates={}, folder=folder), cell)


@dataclass(frozen=True)
class Compared:
    """A finished comparison."""

    recipe: Recipe
    settings: Compare
    folder: Path
    results: dict[Cell, Row]
    tracks: list[Track]

    def rows(self, results: Mapping[Cell, Row] | None = None) -> list[TableRow]:
        return rows_of(self.recipe, self.settings, self.tracks, results or self.results, self.folder)

    def again(self, notes: Notes | None = None) -> tuple[dict[Cell, Row], list[Track]]:
        return compare(self.recipe, self.settings, self.folder, notes or Notes(), processes=1)


class ThisProcess:
    """Stands for the pool of workers: a cell is run where it is asked for, with the short training that tests have."""

    _processes = None

    def __init__(self, *_: Any) -> None: ...

    def submit(self, work: Callable[..., Row], *arguments: Any) -> "Future[Row]":
        future: Future[Row] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "ProcessPoolExecutor", ThisProcess)
        patch.setattr(autoencoder, "TRAINING", autoencoder.AutoencoderOptions(steps=2, samples=16))
        yield


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    recipe, settings = small(tiny_folder)
    folder, notes = tmp_path_factory.mktemp("comparison") / "one", Notes()
    results, tracks = compare(recipe, settings, folder, notes, processes=1)
    assert len(notes.cells) == len(set(notes.cells)) == len(tracks) * 4
    return Compared(recipe, settings, folder, results, tracks)


def test_a_second_start_runs_nothing_and_gives_the_same(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("drencoder.study.pool.ProcessPoolExecutor.submit", never)
    notes = Notes()
    again, same = compared.again(notes)
    assert same == compared.tracks
    assert again == compared.results
    assert set(notes.cells) == set(again)


def test_only_the_cells_that_have_no_row_are_run_again(compared: Compared, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(compared.folder, folder)
    cells = folder / "cells.jsonl"
    lines = cells.read_bytes().splitlines(keepends=True)
    lost = Cell(Track("random", 8.0), 2, 0.0)
    kept = [line for line in lines if json.loads(line)["key"] != lost.key]
    assert len(kept) == len(lines) - 1
    cells.write_bytes(b"".join(kept) + b'{"key": "unfinish')  # a kill in the middle of a line
    results, _ = compare(compared.recipe, compared.settings, folder, Notes(), processes=1)
    same = {cell: row for cell, row in results.items() if cell != lost}
    assert same == {cell: row for cell, row in compared.results.items() if cell != lost}
    assert results[lost]["loss"] == compared.results[lost]["loss"]  # its run folder was whole, and is resumed
    assert read_rows(folder).keys() == read_rows(compared.folder).keys()


def test_a_finished_comparison_can_be_extended(compared: Compared) -> None:
    settings, notes = replace(compared.settings, methods=(*compared.settings.methods, "noise")), Notes()
    extended, longer = compare(compared.recipe, settings, compared.folder, notes, processes=1)
    assert longer == [*compared.tracks, Track("noise", 8.0)]
    assert {cell: extended[cell] for cell in compared.results} == compared.results
    new = [cell for cell in extended if cell not in compared.results]
    assert [cell.track.method for cell in new] == ["noise"] * 4
    assert all("error" not in extended[cell] for cell in new)
    assert compared.again()[0] == compared.results  # and asked for less again


def test_the_table_has_all_methods_bytes_and_tests(compared: Compared) -> None:
    results, recipe = compared.results, compared.recipe
    rows = {row.method: row for row in compared.rows()}
    assert list(rows) == ["base model", "zero update", *compared.settings.methods]
    assert all(row.failures == [] for row in rows.values())
    assert rows["base model"].loss == rows["zero update"].loss
    dp, ours, published, fedcg = (rows[name] for name in ("dp-lora", "random", "dr-encoder", "fedcg"))
    assert dp.loss_difference is None
    assert ours.loss_difference is not None
    assert ours.loss_difference.count == 3
    assert ours.accuracy_difference is not None
    assert ours.answers is not None
    assert len(ours.answers) == 3
    gained = sum(test.gained - test.lost for test in ours.answers)
    assert ours.accuracy_difference.value == pytest.approx(gained / 3 / 16)  # 8 questions of each of two benchmarks
    expected = sum(
        results[Cell(Track(m, 8.0), s, 0.0)]["loss"] * w for m, w in (("random", 1), ("dp-lora", -1)) for s in (0, 1, 2)
    )
    assert ours.loss_difference.value == pytest.approx(expected / 3)
    # Bytes: the sketch is a quarter of the adapter here; FedCG's stage 1 sends whole gradients, DR-Encoder's statistics.
    assert dp.bytes_stage1 == 0
    assert ours.bytes_stage2 is not None
    assert dp.bytes_stage2 is not None
    assert ours.bytes_stage2 < 0.4 * dp.bytes_stage2
    assert fedcg.bytes_stage1 is not None
    assert published.bytes_stage1 is not None
    assert fedcg.bytes_stage1 > 5 * published.bytes_stage1 > 0
    assert 7.9 < (dp.epsilon_server or 0) <= 8
    assert math.isinf(fedcg.epsilon_server or 0)
    assert rows["centralised"].bytes_stage2 == 0
    assert rows["centralised"].learning_rate == recipe.local.learning_rate


def test_files_say_the_same_as_the_table(compared: Compared) -> None:
    rows = compared.rows()
    paths = write_comparison(compared.recipe, compared.settings, rows, compared.folder)
    written = {path.name: path for path in paths}
    headings, lines = cells_of_table(rows)
    assert all(len(line) == len(headings) for line in lines)
    short_headings, short = short_cells(rows)
    assert all(len(line) == len(short_headings) for line in short)
    markdown = written["table.md"].read_text("utf-8")
    for line in lines:
        assert "| " + " | ".join(line) + " |" in markdown
    assert len(written["table.csv"].read_text("utf-8-sig").splitlines()) == len(lines) + 1
    record = json.loads(written["table.json"].read_text("utf-8"))
    assert [row["method"] for row in record["rows"]] == [row.method for row in rows]
    assert record["rows"][-2]["epsilon_server"] == "inf"
    for name in ("loss-against-epsilon.png", "accuracy-against-bytes.png"):
        assert written[name].read_bytes().startswith(b"\x89PNG")


def test_another_recipe_or_a_foreign_folder_is_refused(compared: Compared, tiny_folder: Path, tmp_path: Path) -> None:
    words = r"study of another recipe \(recipe\.privacy\.clip_l2 is .* there and 2\.0 here\)"
    with pytest.raises(ArtifactError, match=words):
        compare(*small(tiny_folder, "privacy.clip_l2=2"), compared.folder, Notes(), processes=1)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="already there"):
        compare(*small(tiny_folder), tmp_path, Notes(), processes=1)


def test_a_failing_cell_is_a_row_and_not_a_crash(compared: Compared) -> None:
    broken = dict(compared.results)
    for seed in (1, 2):
        broken[Cell(Track("random", 8.0), seed, 0.0)] = {"error": "it broke", "seconds": 1.0}
    rows = {row.method: row for row in compared.rows(broken)}
    assert rows["random"].seeds == [0]
    assert len(rows["random"].failures) == 2
    assert rows["random"].loss_difference is None  # one seed is no test
    assert len(rows["random"].answers or []) == 1
    broken[Cell(Track("random", 8.0), 0, 0.0)] = {"error": "it broke", "seconds": 1.0}
    rows = {row.method: row for row in compared.rows(broken)}
    assert rows["random"].loss is None
    headings, lines = cells_of_table(list(rows.values()))
    assert all(len(line) == len(headings) for line in lines)
    assert "it broke" in " ".join(lines[-1])


def test_base_rows_have_one_value_per_seed(compared: Compared) -> None:
    shifted = dict(compared.results)
    for cell, result in compared.results.items():
        base = result["base"] | {"loss": 20.0 if cell.seed == compared.settings.tuning_seed else 10.0 + cell.seed}
        shifted[cell] = result | {"base": base}
    base = compared.rows(shifted)[0]
    assert base.loss is not None
    assert (base.loss.mean, base.loss.low, base.loss.high) == (11.0, 10.0, 12.0)


def test_a_second_process_and_a_lost_run_destroy_nothing(compared: Compared, tmp_path: Path) -> None:
    lock = os.open(compared.folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ArtifactError, match="filled by another process"):
        compared.again()
    os.close(lock)
    # A cell whose run is under way elsewhere is refused; one that lost FedCG's gradients is kept under another name.
    cell = Cell(Track("fedcg", None), 0, 0.0)
    run = cell_folder(tmp_path, cell)
    shutil.copytree(cell_folder(compared.folder, cell), run)
    for name in ("certificate.json", "checkpoints/latest.safetensors"):
        (run / name).unlink()
    with Ledger.open(run / "ledger.jsonl"), pytest.raises(ArtifactError, match="in use"):
        run_small(cell, compared.recipe, tmp_path)
    before = (run / "ledger.jsonl").read_bytes()
    assert "error" not in run_small(cell, compared.recipe, tmp_path)
    if (kept := run.with_name(f"{run.name}.lost-1")).exists():
        assert (kept / "ledger.jsonl").read_bytes() == before


def test_what_may_be_otherwise_tomorrow_is_not_stored(compared: Compared, tmp_path: Path) -> None:
    away = compared.recipe.changed({"data.source": str(tmp_path / "moved.jsonl")})
    with pytest.raises(DataError):
        compare(away, compared.settings, tmp_path / "away", Notes(), processes=1)
    assert read_rows(tmp_path / "away") == {}
    diverged = run_small(Cell(Track("random", 8.0), 0, 40.0), compared.recipe, tmp_path)  # a rate of 3^40
    assert "diverged" in diverged["error"]
