"""The study of real text: its recipes are what its page says they are, and the page says what was run, what was not, and how sure it is."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drencoder.errors import ArtifactError
from drencoder.study.cells import CELLS, STUDY

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_text
    from real_text_study import energy, page

    yield SimpleNamespace(main=real_text, page=page, energy=energy)
    for name in [name for name in sys.modules if name.startswith("real_text")]:
        del sys.modules[name]


def write_cells(folder: Path, losses: dict[Any, list[float]]) -> None:
    """A study of these cells: the loss of each held-out text of ten tokens."""
    size = {"rounds": 10, "cohort": 32, "records": 2, "tokens": 128, "measured": 8, "model": "model"}
    machine = {"system": "Linux", "processor": "x86_64", "cores": 2, "torch": "2.13.0"}
    folder.mkdir(exist_ok=True)
    (folder / STUDY).write_text(json.dumps({"cells_depend_on": size, "machine": machine}))
    lines = []
    for cell, each in losses.items():
        mean = sum(each) / len(each)
        loss = {"value": mean, "low": mean - 0.1, "high": mean + 0.1, "count": len(each)}
        base = {"value": 5.0, "low": 4.9, "high": 5.1, "count": len(each)}
        row = {
            "key": cell.key, "seed": cell.seed, "rate_step": cell.rate_step, "clip_step": 0, "seconds": 60.0, "loss": mean, "rate": 0.02,
            "results": {"base model": base, "zero update": base, "this run": loss}, "uniform": 10.8, "bytes_up": 1000,
            "metrics": [{"round": 0, "loss": 5.0, "bytes_up": 0}, {"round": 2, "loss": 4.0, "bytes_up": 200}],
            "energy": [{"round": 1, "mean": 0.9, "client": 0.8, "norm": 1.0, "code_norm": 1.0, "agreement": 0.7}],
        }  # fmt: skip
        lines.append(json.dumps(row))
        run = folder / "runs" / cell.key
        run.mkdir(parents=True)
        (run / "outcomes.json").write_text(
            json.dumps({"this run": {"losses": [10 * x for x in each], "targets": [10] * len(each)}})
        )
    (folder / CELLS).write_text("\n".join(lines) + "\n")


def test_every_cell_has_a_key_and_an_arm_of_its_own(study: SimpleNamespace) -> None:
    keys = [cell.key for cell in study.main.CELLS]
    assert len(set(keys)) == len(keys)
    assert {cell.track.method for cell in study.main.CELLS} == set(study.main.ARMS)
    assert {cell.track.setting.split("/")[0] for cell in study.main.CELLS} == set(study.main.TASKS)


def test_the_default_arm_sets_nothing_that_an_encoder_depends_on(study: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "banking77").mkdir()
    for part in ("train", "test"):
        (tmp_path / "banking77" / f"{part}.csv").write_text(
            "text,category\n" + "\n".join(f"q {n},c{n % 3}" for n in range(90))
        )
    recipe = study.main.recipe_of(study.main.CELLS[0], "embedded", tmp_path, tmp_path, study.main.Size())
    default = type(recipe)()
    for section in ("adapter", "local", "server", "encoder", "prior"):
        assert getattr(recipe, section) == getattr(default, section), section
    assert (recipe.privacy.trust, recipe.privacy.epsilon, recipe.privacy.clip_l2) == ("central", 8.0, 0.0)
    assert recipe.sampling_rate * recipe.federation.population == pytest.approx(32)


def test_the_page_says_what_is_better_what_is_small_and_what_is_missing(study: SimpleNamespace, tmp_path: Path) -> None:
    cells = {
        cell.key.split("/seed")[0]: cell for cell in reversed(study.main.CELLS) if cell.seed == 0 and not cell.rate_step
    }
    ours, dp = cells["bank/central/eps8/hybrid"], cells["bank/central/eps8/dp-lora"]
    sketch, ffa = cells["bank/central/eps8/random"], cells["bank/central/eps8/ffa"]
    start = [2.0 + 0.01 * n for n in range(8)]
    worse = [x + 0.5 + 0.01 * (n % 2) for n, x in enumerate(start)]
    little = [x + 0.01 + 0.001 * (n % 2) for n, x in enumerate(start)]
    unsure = [x + (-1) ** n for n, x in enumerate(start)]
    write_cells(tmp_path / "out", {ours: start, dp: worse, sketch: little, ffa: unsure})
    study.page.write_page(tmp_path / "out", tmp_path / "results")
    page = (tmp_path / "results" / "real-text.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| bank") and "to +" in line]
    verdicts = {line.split(" | ")[1].split(":")[0]: line.rstrip(" |").rsplit(" | ", 1)[1] for line in lines}
    assert verdicts == {
        "DP-LoRA": "the default is better",
        "random sketch of 1/64": "the default is better, by little",
        "FFA-LoRA": "cannot be told apart",
    }
    missing = page.split("## Not run")[1]
    assert [cell.key for cell in study.main.CELLS if f"`{cell.key}`" in missing] == [
        cell.key for cell in study.main.CELLS if cell not in (ours, dp, sketch, ffa)
    ]
    assert f"**4 of {len(study.main.CELLS)} planned runs were made**" in page
    assert (tmp_path / "results" / "real-text.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    study.page.write_page(tmp_path / "out", again)
    assert (again / "real-text.md").read_text() == page


def test_a_study_without_cells_has_no_page(study: SimpleNamespace, tmp_path: Path) -> None:
    write_cells(tmp_path / "out", {})
    (tmp_path / "out" / CELLS).write_text("")
    with pytest.raises(ArtifactError, match="no finished cell"):
        study.page.write_page(tmp_path / "out", tmp_path / "results")


def test_the_energy_is_that_of_mean_and_client(study: SimpleNamespace) -> None:
    """An encoder that keeps the first of two values: of (3, 4) 9/25 of the energy, of the mean of (3, 4) and (3, -4) all."""
    import torch

    class Query:
        spec = SimpleNamespace(kind="update", slot=1)

        def encode(self, update_ND: torch.Tensor) -> torch.Tensor:
            return update_ND[:, :1]

        def decode(self, code_NK: torch.Tensor) -> torch.Tensor:
            return torch.cat([code_NK, torch.zeros_like(code_NK)], dim=1)

    sent = []
    energy = study.energy.CohortEnergy(lambda *arguments: sent.append(arguments))
    for row in ([3.0, 4.0], [3.0, -4.0]):
        energy.client_message(Query(), torch.tensor([row]), [0], None, None)
    (found,) = energy.rounds()
    assert len(sent) == 2
    assert (found["mean"], found["client"]) == (pytest.approx(1.0), pytest.approx(0.36))
    assert (found["norm"], found["agreement"]) == (pytest.approx(5.0), pytest.approx(0.6))
