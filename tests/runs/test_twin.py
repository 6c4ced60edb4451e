"""A twin without noise: where it may be, what it computes, and that nothing of it is in what a run gives away."""

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.errors import RecipeError
from drencoder.federated.in_process import InProcessEngine
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.certificate import TWIN_SENTENCE
from drencoder.runs.twin import check_twin, twin_components
from drencoder.runs.verify import verify_run


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [*tiny_overrides(folder), "federation.rounds=2", *overrides])


@pytest.fixture(scope="module")
def result(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> experiment.RunResult:
    return experiment.run(recipe_of(tiny_folder), tmp_path_factory.mktemp("twin") / "run", twin=True, samples=True)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_twin_is_apart_marked_and_without_weights(result: experiment.RunResult) -> None:
    assert result.twin is not None
    folder = result.twin.folder
    assert folder == result.folder / "twin"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {
        "NOT-PRIVATE.txt", "certificate.json", "ledger.jsonl", "metrics.jsonl", "outcomes.json", "recipe.resolved.toml", "report.html",
    }  # fmt: skip
    assert (folder / "NOT-PRIVATE.txt").read_text().strip() == TWIN_SENTENCE
    assert not result.twin.certificate["private"]
    assert {row["epsilon_pld"] for row in result.twin.certificate["observers"].values()} == {"inf"}


def test_the_run_says_so_and_holds_nothing_of_it(result: experiment.RunResult) -> None:
    assert result.twin is not None
    assert result.certificate["private"]
    assert result.certificate["twin"] == TWIN_SENTENCE
    assert "NOT private" in TWIN_SENTENCE
    assert TWIN_SENTENCE.split(",")[0] in (result.folder / "report.html").read_text()
    loss = f"{result.twin.certificate['results']['this run']['loss']['value']:.6f}"[:-1]
    for name in (
        "certificate.json",
        "report.html",
        "metrics.jsonl",
        "outcomes.json",
        "ledger.jsonl",
        "adapter/README.md",
    ):
        assert loss not in (result.folder / name).read_text(), name
    assert not verify_run(result.folder).trouble


def test_the_twin_is_charged_to_nobody(result: experiment.RunResult, tiny_folder: Path, tmp_path: Path) -> None:
    alone = experiment.run(recipe_of(tiny_folder), tmp_path / "alone")
    assert alone.twin is None
    assert "twin" not in alone.certificate
    for observer, row in alone.certificate["observers"].items():
        assert row["epsilon_pld"] == result.certificate["observers"][observer]["epsilon_pld"]
    kinds = [json.loads(line)["kind"] for line in (result.folder / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("charge") == 3


@pytest.mark.parametrize("trust", ["local", "central"])
def test_the_twin_is_the_same_rounds_without_noise(trust: str, tiny_folder: Path, tmp_path: Path) -> None:
    """With all clients in every round nothing is left to chance: the twin is the run that the recipe makes without noise."""
    settings = [
        "federation.population=12", "federation.sampling_rate=1", "privacy.participation_cap=4", "encoder.name=identity", "encoder.ratio=0",
        "prior.source=none", "server.learning_rate=3", "evaluation.benchmarks=[]", "privacy.clip_l2=0",
    ]  # fmt: skip
    result = experiment.run(recipe_of(tiny_folder, *settings, f"privacy.trust={trust}"), tmp_path / "run", twin=True)
    silent = experiment.run(recipe_of(tiny_folder, *settings, "privacy.trust=non-private"), tmp_path / "silent")
    assert result.twin is not None
    private, twin, plain = ([row["loss"] for row in one.metrics] for one in (result, result.twin, silent))
    assert twin == pytest.approx(plain, abs=1e-6)
    assert twin[0] == private[0]
    assert abs(twin[-1] - private[-1]) > 1e-4  # and the run had noise


def test_a_twin_that_was_killed_goes_on_and_a_finished_one_stays(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, slots = InProcessEngine.gather, []

    def killed(self: InProcessEngine, query: Any, *rest: Any) -> Any:
        slots.append(query.spec.slot)
        if len(slots) == 6:  # the twin's second round: three questions of the run and two of the twin came before
            raise KeyboardInterrupt
        return original(self, query, *rest)

    monkeypatch.setattr(InProcessEngine, "gather", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(recipe_of(tiny_folder), tmp_path / "run", twin=True)
    assert not (tmp_path / "run" / "twin" / "NOT-PRIVATE.txt").exists()
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["twin"] == TWIN_SENTENCE
    result = experiment.resume(tmp_path / "run", twin=True)
    assert slots[6:] == [2]
    assert result.twin is not None
    assert [row["round"] for row in result.twin.metrics] == [0, 1, 2]
    before = digests(result.twin.folder)
    plain = experiment.resume(tmp_path / "run")
    assert plain.certificate["twin"] == TWIN_SENTENCE  # it is still there
    assert experiment.resume(tmp_path / "run", twin=True).twin is not None
    assert (digests(result.twin.folder), slots[6:]) == (before, [2])


def test_no_twin_where_others_hold_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    def elsewhere(components: Any) -> Any:
        raise AssertionError("refused before anything is made")

    maker: Callable[[Any], Any] = elsewhere
    with pytest.raises(RecipeError, match=r"on other machines: .* Leave --twin out"):
        experiment.run(recipe_of(tiny_folder), tmp_path / "run", engine=maker, twin=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="non-private"):
        experiment.run(recipe_of(tiny_folder, "privacy.trust=non-private"), tmp_path / "run", twin=True)
    check_twin(recipe_of(tiny_folder, "privacy.trust=non-private"), wanted=False, here=False)
    with pytest.raises(RecipeError, match=r"privacy.unit = 'record' protects what is inside"):
        check_twin(recipe_of(tiny_folder, "privacy.unit=record", "federation.units_per_site=9"), wanted=True, here=True)


def test_the_twin_has_what_the_run_chose(tiny_folder: Path) -> None:
    """Rate, code size, bits and start follow from the noise where a recipe leaves them open."""
    knobs = [
        "federation.sampling_rate=0",
        "encoder.name=hybrid",
        "encoder.ratio=0",
        "federation.population=40",
        "privacy.clip_l2=0",
    ]
    live = build(recipe_of(tiny_folder, *knobs))
    own = twin_components(live, {"clip": {"clip_l2": 0.25}})
    assert own.recipe.privacy.clip_l2 == 0.25
    assert (own.plan.sampling_rate, own.overview.code_size) == (live.plan.sampling_rate, live.overview.code_size)
    assert own.plan.non_private == ("stage1", "round")
