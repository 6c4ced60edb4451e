"""Every script of `benchmarks/` works: its smallest size ends well. And what it has to do with the documents."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_is_a_command_that_a_document_names(script: Path) -> None:
    text = script.read_text("utf-8")
    assert 'if __name__ == "__main__":' in text, "modules that are no commands belong in a folder of benchmarks/"
    assert '"--smoke"' in text
    assert any(f"benchmarks/{script.name}" in page.read_text("utf-8") for page in DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_its_smallest_size_ends_well(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--smoke"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir())  # nothing is left behind, and no results page is changed


def test_the_page_on_speed_is_what_its_script_makes_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed_parts.page import write_page

    results = ROOT / "docs" / "results"
    report = json.loads((results / "speed.json").read_text("utf-8"))
    assert (results / "speed.md").read_text("utf-8") == write_page(report)
    # What was not measured says so.
    assert write_page({}).count("Not run") + write_page({}).count("**Not run**") >= 4


def test_ways_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed_parts.compare import installed_ways

    ways, missing = installed_ways({"pfl": "/bin/false"})
    assert ways[:2] == ["plain PEFT", "drencoder"]
    assert missing == ["pfl is left out, since pfl is not installed in /bin/false."]


def test_arms_of_the_silo_study_are_compared_text_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import silos

    def arm(name: str, after: list[float]) -> dict[str, Any]:
        outcomes = {
            "base model": {"losses": [8.0, 90.0], "targets": [2, 8]},
            "this run": {"losses": after, "targets": [2, 8]},
        }
        return {"arm": name, "seed": 0, "outcomes": outcomes}

    rows = [arm("a patient", [6.0, 82.0]), arm("a site as a whole", [7.0, 86.0])]
    patient, site = (silos.compare(row, rows) for row in rows)
    # Each text loses one nat a token for the patient, and half of that for the site: no chance is left, however the texts vary.
    assert patient["base model"]["value"] == patient["base model"]["low"] == patient["base model"]["high"] == -1.0
    assert patient["a site as a whole"]["value"] == -0.5
    assert list(site) == ["base model"]
    assert silos._gain(patient["base model"]) == "+1.000 (+1.000 to +1.000)"
