"""Sample answers: whose prompts are asked, that no text of a client or of the server is among them, and when none are."""

import json
from pathlib import Path

import pytest

from conftest import tiny_overrides
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.generate import generate
from drencoder.runs.report import remake_report
from drencoder.runs.samples import answer_prompts
from drencoder.runs.verify import verify_run
from tampering import reaccount

CANARY = "Mustermann"


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [*tiny_overrides(folder), "federation.rounds=2", *overrides])


def own_text(folder: Path, tmp_path: Path, **changes: object) -> Recipe:
    rows = [{"instruction": f"{CANARY} {i}", "response": f"{CANARY} {i}", "who": f"p{i % 8}"} for i in range(64)]
    for name in ("clients", "server", "public"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({**row, "instruction": f"{name} {row['instruction']}"}) for row in rows)
        )
    knobs = {
        "data.source": str(tmp_path / "clients.jsonl"), "data.client_field": "who", "federation.population": 0,
        "federation.sampling_rate": 1.0, "privacy.trust": "central", "evaluation.benchmarks": [],
    }  # fmt: skip
    return recipe_of(folder).changed(knobs | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_run_leaves_three_answers_before_and_after(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, "server.learning_rate=300")
    result = experiment.run(recipe, tmp_path / "run", samples=True)
    samples = json.loads((result.folder / "samples.json").read_text())
    assert samples["prompts_are"] == "of the public evaluation data"
    assert len(samples["rows"]) == 3
    page = (result.folder / "report.html").read_text()
    assert "<h2>Answers</h2>" in page
    for row in samples["rows"]:
        assert row["prompt"].split("\n")[0][:20] in page
        assert row["base"] != row["adapted"]  # with such a rate
    held_out = build(recipe).texts.evaluation
    assert held_out is not None
    assert [row["prompt"] for row in samples["rows"]] == [
        "\n\n".join(filter(None, (record["instruction"], record["context"]))) for record in held_out(3)
    ]
    assert not verify_run(result.folder).trouble
    remake_report(result.folder)
    assert (result.folder / "report.html").read_text() == page
    assert reaccount(result.folder) == 0
    (result.folder / "samples.json").write_text("{}")
    assert "samples.json" in verify_run(result.folder).trouble
    assert reaccount(result.folder) == 1


def test_an_adapted_answer_is_that_of_generate(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, "server.learning_rate=300")
    result = experiment.run(recipe, tmp_path / "run", samples=True)
    samples = json.loads((result.folder / "samples.json").read_text())
    for row in samples["rows"]:
        assert row["adapted"] == generate(result.folder, row["prompt"], max_tokens=40).text


@pytest.mark.parametrize("kind", ["held-out owners", "the server's file", "none"])
def test_text_of_clients_owners_or_the_server_is_never_asked(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes = {
        "held-out owners": {"data__held_out_share": 0.3},
        "the server's file": {"evaluation__data": str(tmp_path / "server.jsonl")},
        "none": {},
    }[kind]
    live = experiment.build(experiment.with_population(own_text(tiny_folder, tmp_path, **changes)))
    samples = answer_prompts(live, live.lora.initial_D)
    assert samples.prompts_are == "general ones"
    assert len(samples.rows) == 3
    assert CANARY not in json.dumps([row["prompt"] for row in samples.rows])


def test_public_text_is_asked_and_named(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"prior__public": str(tmp_path / "public.jsonl"), "prior__provenance": "made for a test"}
    live = experiment.build(experiment.with_population(own_text(tiny_folder, tmp_path, **changes)))
    samples = answer_prompts(live, live.lora.initial_D)
    assert samples.prompts_are == "of public text: made for a test (public.jsonl)"
    assert all(row["prompt"].startswith("public ") for row in samples.rows)


def test_no_answers_without_privacy_or_unasked(tiny_folder: Path, tmp_path: Path) -> None:
    """A model that was trained without noise may repeat a client's text."""
    silent = experiment.run(recipe_of(tiny_folder, "privacy.trust=non-private"), tmp_path / "silent", samples=True)
    unasked = experiment.run(recipe_of(tiny_folder), tmp_path / "unasked")
    for result in (silent, unasked):
        assert not (result.folder / "samples.json").exists()
        assert "<h2>Answers</h2>" not in (result.folder / "report.html").read_text()
