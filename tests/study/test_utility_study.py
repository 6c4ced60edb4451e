"""The utility study's own logic: how rates are tuned, which cells come next, what is judged, and what a page keeps."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What `utility_cells` has, and `grid`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import utility_cells
    import utility_grid

    yield SimpleNamespace(**vars(utility_cells), grid=utility_grid)
    for name in [name for name in sys.modules if name.startswith("utility")]:
        del sys.modules[name]


Loss = Callable[[float, int], float]


def finished(study: Any, track: Any, loss: Loss) -> tuple[dict[Any, float], list[list[Any]]]:
    """Runs a track to its end with a made-up loss of (rate step, clip step); the cells in the order of the waves."""
    losses: dict[Any, float] = {}
    waves = []
    while cells := study.grid.next_cells(track, losses):
        waves.append(cells)
        losses |= {cell: loss(cell.rate_step, cell.clip_step) for cell in cells}
        assert len(waves) < 20
    return losses, waves


def track_of(study: Any, arm: str = "dp-lora", place: tuple[str, int] = ("small", 64), trust: str = "central") -> Any:
    return study.grid.Track(arm, study.grid.Setting(trust, "facts", *place, 4.0))


def rates_of(waves: list[list[Any]]) -> list[float]:
    return list(dict.fromkeys(cell.rate_step for wave in waves for cell in wave if cell.clip_step == 0))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.2, [0.0, -1.0, 1.0, 0.5]),  # inside: half a step towards the better neighbour
        (-0.2, [0.0, -1.0, 1.0, -0.5]),
        (2.1, [0.0, -1.0, 1.0, 2.0, 3.0]),  # on while the best is at the edge, until it is inside
        (-1.9, [0.0, -1.0, 1.0, -2.0, -3.0]),
        (9.0, [0.0, -1.0, 1.0, 2.0, 3.0, 4.0]),  # and no further than six rates
    ],
)
def test_a_rate_is_looked_for_until_it_lies_inside(study: Any, best: float, tried: list[float]) -> None:
    track = track_of(study)
    losses, waves = finished(study, track, lambda rate, clip: 1.0 + (rate - best) ** 2 + clip)
    assert rates_of(waves) == tried
    nearest = min(tried, key=lambda rate: abs(rate - best))
    assert study.grid.tuned(track, losses) == (nearest, 0)
    assert study.grid.at_edge(track, losses) == (best == 9.0)
    assert len(losses) <= study.grid.most_cells([track])


def test_of_two_that_are_alike_the_smaller_rate_and_the_first_clip_are_taken(study: Any) -> None:
    track = track_of(study)
    flat = {-1.0: 1.3, 0.0: 1.009, 0.5: 1.0, 1.0: 1.0, 2.0: 1.5}
    losses, _ = finished(study, track, lambda rate, clip: flat[rate] - 0.009 * clip)
    assert study.grid.tuned(track, losses) == (0.0, 0)
    clearer, _ = finished(study, track, lambda rate, clip: flat[rate] - 0.02 * clip)
    assert study.grid.tuned(track, clearer) == (0.0, 1)
    clearly = {**flat, 0.0: 1.011}
    losses, _ = finished(study, track, lambda rate, clip: clearly[rate])
    assert study.grid.tuned(track, losses)[0] == 1.0


def test_a_rate_that_diverged_is_never_taken(study: Any) -> None:
    track = track_of(study)
    losses, waves = finished(study, track, lambda rate, clip: math.inf if rate > -1 else 5.0 - rate)
    assert study.grid.tuned(track, losses)[0] == -1.0
    assert rates_of(waves) == [0.0, -1.0, 1.0, -2.0]


def test_no_judged_seed_is_tuned_on_and_all_of_them_are_run(study: Any) -> None:
    for trust, *place in study.grid.SEEDS:
        track = track_of(study, place=place, trust=trust)
        setting = track.setting
        assert not set(setting.seeds) & set(setting.tuning_seeds)
        assert not set(setting.seeds) & set(range(400, 450))  # those that the encoder's sizes were chosen on
        losses, waves = finished(study, track, lambda rate, clip: 1.0 + rate**2 + clip)
        assert [cell.seed for cell in waves[-1]] == list(setting.seeds)
        assert {cell.seed for wave in waves[:-1] for cell in wave} == set(setting.tuning_seeds)
        assert {(cell.rate_step, cell.clip_step) for cell in waves[-1]} == {(0.0, 0)}
        assert len(losses) == sum(map(len, waves))


def test_noise_shortens_every_first_rate_alike(study: Any) -> None:
    hybrid, plain = study.grid.ARMS["hybrid"], study.grid.ARMS["dp-lora"]
    assert hybrid.first_rate_at(math.inf) == 3.0
    for k_star in (73.0, 148.0, 1698.0):
        assert (
            hybrid.first_rate_at(k_star) / 3.0 == plain.first_rate_at(k_star) / 0.75 == study.grid.noise_scale(k_star)
        )
    assert study.grid.noise_scale(73.0) == 0.5
    cell = study.grid.Cell(track_of(study), 100, 1.0, 1)
    assert study.grid.rate_and_clip(cell, math.inf) == (0.75 * 2 / 4, 4.0)


def row_of(study: Any, cell: Any, loss: float, code_size: int) -> dict[str, Any]:
    rate, clip = study.grid.rate_and_clip(cell, 4809.0)
    setting = cell.track.setting
    return {
        "key": cell.key, "setting": asdict(setting), "arm": cell.track.arm, "seed": cell.seed, "rate_step": cell.rate_step,
        "clip_step": cell.clip_step, "rate": rate, "clip": clip, "version": "0", "k_star": 4809.0, "noise_multiplier": 1.0,
        "loss": {"value": loss}, "accuracy": {}, "base": {"loss": 9.0, "accuracy": {}}, "zero": {"loss": 9.0, "accuracy": {}},
        "bytes_up": 1000 + cell.seed, "rounds": 16, "epsilon": {"public": 4.0}, "seconds": 1.0,
        "encoder": {"name": "hybrid", "code_size": code_size, "update_size": 32_768},
    }  # fmt: skip


def filled(study: Any, folder: Path, losses: dict[str, float]) -> None:
    """A study in which every run of an arm ended at that arm's loss, and a rate away from its first is worse."""
    folder.mkdir()
    scale = asdict(study.grid.Scale())
    (folder / study.STUDY).write_text(json.dumps({"scale": scale, "machine": study.machine()}))
    sizes = {"dp-lora": 32_768, "hybrid": 16_384, "ffa": 16_384, "hybrid-10": 3_277, "hybrid-64": 3_278}
    with (folder / study.CELLS).open("w") as lines:
        for arm, loss in losses.items():
            track = track_of(study, arm)
            cells, _ = finished(study, track, lambda rate, clip, loss=loss: loss + rate**2 + clip)
            lines.writelines(json.dumps(row_of(study, cell, value, sizes[arm])) + "\n" for cell, value in cells.items())


@pytest.mark.parametrize(("ours", "good"), [(2.9, 1), (3.02, 1), (3.04, 0)])
def test_verdicts_count_what_the_lines_say(study: Any, tmp_path: Path, ours: float, good: int) -> None:
    import utility_verdicts as judge
    from utility_results import AUTOMATIC, duels, load_results

    filled(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": ours})
    results, failures = load_results(tmp_path / "study")
    found = {one.number: one for one in judge.verdicts(results, [])}
    assert (found["1a"].good, found["1a"].of) == (good, 1)
    assert found["1a"].word == ("met so far" if good else "NOT met so far")  # one of many settings
    assert (found["5"].of, found["5"].word) == (0, "not measured")
    (duel,) = duels(results, [AUTOMATIC])
    assert duel.better == (ours < 3.0)
    assert duel.fewer_bytes == (20 + 4 * 32_768) / (
        24 + 16_384 // 2
    )  # of a message: a run's total is chance without trust
    assert failures == []


def test_a_page_keeps_every_line_and_a_folder_can_be_made_of_it(study: Any, tmp_path: Path) -> None:
    from utility_table import write_page

    filled(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": 2.9})
    write_page(tmp_path / "study", tmp_path / "results")
    first = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir() if path.suffix != ".png"}
    study.restore(tmp_path / "results", tmp_path / "again")
    assert study.read_cells(tmp_path / "again") == study.read_cells(tmp_path / "study")
    write_page(tmp_path / "again", tmp_path / "results")
    assert {name: (tmp_path / "results" / name).read_bytes() for name in first} == first
    with pytest.raises(SystemExit, match="has cells already"):
        study.restore(tmp_path / "results", tmp_path / "again")
    with pytest.raises(SystemExit, match="give the folder that --page wrote"):
        study.restore(tmp_path / "study", tmp_path / "new")
    (tmp_path / "results" / study.ARCHIVE).write_bytes(b"cut")
    with pytest.raises(SystemExit, match=r"cannot be read .*restore the files that --page wrote"):
        study.restore(tmp_path / "results", tmp_path / "new")


def test_a_comparator_meets_the_largest_of_our_codes_that_fits(study: Any, tmp_path: Path) -> None:
    from utility_results import against_comparators, load_results

    filled(study, tmp_path / "study", {"ffa": 3.0, "hybrid-10": 2.8, "hybrid-64": 3.1})
    results, _ = load_results(tmp_path / "study")
    (all_of_ours,), (four_bits,) = against_comparators(results), against_comparators(results, study.grid.FOUR_BITS)
    assert (all_of_ours.ours.track.arm, all_of_ours.better) == ("hybrid-64", False)
    assert (four_bits.ours.track.arm, four_bits.better) == ("hybrid-10", True)


def test_the_readmes_table_is_written_between_its_marks(study: Any, tmp_path: Path) -> None:
    from utility_readme import BEGIN, END, refresh

    filled(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": 2.7})
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    refresh(readme, tmp_path / "study")
    once = readme.read_text()
    assert once.startswith(f"before\n{BEGIN}\n| setting")
    assert once.endswith(f"{END}\nafter\n")
    assert "| central, facts, small, n 64, ε 4 | 4,809 | 1/2, 1/16 | 2.70 | 3.00 | -10% | - / - |" in once
    assert "1 of 1 settings lose nothing beyond 1 % and 1 win" in once
    refresh(readme, tmp_path / "study")
    assert readme.read_text() == once
    readme.write_text("no marks")
    for bad in (readme, tmp_path / "missing.md"):
        with pytest.raises(SystemExit, match="put them where the table belongs"):
            refresh(bad, tmp_path / "study")


def test_the_forecasts_are_what_their_words_say(study: Any, tmp_path: Path) -> None:
    import utility_verdicts as judge
    from utility_forecast import forecasts
    from utility_results import load_results

    filled(study, tmp_path / "study", {"dp-lora": 3.0, "hybrid": 2.7})
    results, _ = load_results(tmp_path / "study")
    curvature = dict.fromkeys(("hessian", "gauss-newton", "finite"), 10.0)
    code = {"ratio": 2.0, "rho": 0.25, "rho_client": 0.5, "D_P": curvature, "negative": 0}
    setting = next(str(track.setting) for track in results)
    whole = {"setting": setting, "ratio": None, "energy": 8.0, "sharpest": [10.0, -1.0, 20.0]}
    steps = [
        whole,
        whole | {"ratio": 2.0, "energy": 4.0, "sharpest": [4.0, 5.0, 4.0]},
        whole | {"setting": "another", "energy": 1.0},
    ]
    place = {
        "task": "facts", "adapter": "small", "start": "peft", "alignment": 0.5, "mean_norm": 2.0, "lambda": curvature,
        "D": curvature, "codes": [code], "distortion": [], "steps": steps,
    }  # fmt: skip
    geometry = [place | {"stage": stage, "seed": 0} for stage in ("start", "trained")]
    geometry += [row | {"start": "public", "mean_norm": 9.0} for row in geometry]  # of no setting with so large a k*
    (forecast,) = forecasts(results, geometry)
    assert forecast.progress == pytest.approx(0.25 * 3.0 / 0.75)  # hybrid's first rate over DP-LoRA's, at clips alike
    d, k_star = 10.0, 4809.0
    assert forecast.gain == pytest.approx(0.25**2 * (1 + d / k_star) / (0.25 + 0.5 * d / k_star))
    assert forecast.stable == pytest.approx((4.0 / 4.0) / (8.0 / 10.0))  # between (4/5) / (8/0) and (4/4) / (8/20)
    found = {one.number: one for one in judge.verdicts(results, geometry)}
    assert [found[number].good for number in ("5", "5b", "5c", "5d")] == [0, 0, 0, 1]  # 0.06 and 1.0 name DP-LoRA
    assert forecast.reached == pytest.approx(forecast.mended / 0.55)
    assert (found["5f"].good, found["5g"].of) == (0, 0)
    assert forecast.rehearsed == pytest.approx(3.0 / 2.7)
    assert (found["5h"].good, found["5h"].of) == (1, 1)
    assert (found["5i"].good, found["5i"].of) == (1, 1)  # seeds that are alike leave zero out
    code["rho"] = 0.26
    assert {one.number: one for one in judge.verdicts(results, geometry)}["5c"].good == 1


def test_geometry_is_measured_again_where_a_code_or_a_step_is_missing(study: Any) -> None:
    import utility_geometry as shapes

    setting = study.grid.Setting("central", "facts", "small", 64, 4.0)
    wanted = [(setting, 4809.0)]
    sent = shapes.sent_in(setting, 4809.0, "peft")
    assert sent == [None, 2.0, 10.0, 64.0]  # whole updates, hybrid, and the two codes of equal bytes
    assert shapes.sent_in(setting, 4809.0, "public") == []  # of no setting with so large a k*
    steps = [{"setting": str(setting), "ratio": ratio} for ratio in sent]
    codes = [{"ratio": ratio} for ratio in shapes.STARTS["peft"]]
    whole = {"start": "peft", "stage": "start", "codes": codes, "steps": steps}
    assert not shapes.lacking(whole, wanted)
    assert shapes.lacking(whole | {"steps": steps[:-1]}, wanted)
    assert shapes.lacking(whole | {"codes": codes[1:]}, wanted)
    assert not shapes.lacking(whole | {"stage": "trained", "steps": []}, wanted)  # no steps there
