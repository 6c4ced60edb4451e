"""Whole runs on a file of one's own, with evaluation data and without: what is measured, on whose text, and what is said about it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.data.evaluation_text import NO_EVALUATION
from drencoder.errors import DataError, RecipeError
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.assess import assess
from drencoder.runs.build import build
from drencoder.runs.display import RunDisplay, make_console, plan_tables
from drencoder.runs.plan_overview import survey
from tampering import reaccount, verdict

OWNERS = 24
ASIDE = {"p00", "p07", "p11", "p12", "p13", "p15", "p18"}  # whom data.held_out_share = 0.25 sets aside under seed 0
TRUSTS = {
    "local": ["privacy.trust=local"],
    "central": ["privacy.trust=central"],
    "secure aggregation": ["privacy.trust=secure-aggregation", "federation.nodes=3", "privacy.honest_share=1.0"],
}  # fmt: skip


def records(letter: str = "p", owners: int = OWNERS) -> list[dict[str, str]]:
    return [
        {"instruction": f"note {kind} of {letter}{owner:02d}", "response": f"{kind} {owner * 7 % 10}", "owner": f"{letter}{owner:02d}"}
        for owner in range(owners)
        for kind in ("first", "second")
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def recipe_of(tiny: Path, data: Path, *settings: str) -> Recipe:
    return load_recipe(
        "quickstart",
        [
            *tiny_overrides(tiny), f"data.source={data}", f"federation.population={OWNERS}", "federation.sampling_rate=0.5",
            "federation.rounds=2", "privacy.participation_cap=3", "evaluation.benchmarks=['auto']", "encoder.gate=warn", *settings,
        ],
    )  # fmt: skip


def server_file(folder: Path) -> Path:
    """The server's own text: other words, and no owner in it."""
    return write(
        folder / "server.jsonl", [{key: row[key] for key in ("instruction", "response")} for row in records("s", 8)]
    )


def finish(recipe: Recipe, folder: Path) -> tuple[experiment.RunResult, str]:
    """The finished run, and all that a person saw."""
    screen = io.StringIO()
    display = RunDisplay(make_console(file=screen, width=300), rounds=2, encoder="hybrid", name="run")
    result = experiment.run(recipe, folder, display)
    assert verdict(result.folder) == ""
    assert reaccount(result.folder) == 0
    return result, screen.getvalue()


@pytest.mark.parametrize("trust", TRUSTS)
def test_a_run_without_evaluation_data_works_and_says_that_it_cannot_know(
    trust: str, tiny_folder: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "notes.jsonl", records())
    recipe = recipe_of(tiny_folder, data, "data.client_field=owner", *TRUSTS[trust])
    result, screen = finish(recipe, tmp_path / "run")
    certificate = result.certificate
    assert certificate["verdict"] == certificate["evaluation_rests_on"] == NO_EVALUATION
    assert certificate["owners"] == "owners whom the field 'owner' names"
    assert all(row == {"loss": None, "accuracy": {}} for row in certificate["results"].values())
    assert all("loss" not in row and "accuracy" not in row for row in result.metrics)
    outcomes = json.loads((result.folder / "outcomes.json").read_text())
    assert all(row == {"losses": [], "targets": [], "right": {}} for row in outcomes.values())
    assert NO_EVALUATION in screen
    assert "round 1: epsilon" in screen
    assert NO_EVALUATION in (result.folder / "report.html").read_text()
    with pytest.raises(DataError, match="cannot know whether it learned"):
        assess(result.folder)


@pytest.mark.parametrize("encoder", ["random", "kronecker", "autoencoder", "fedcg"])
def test_the_gate_has_something_to_go_by_without_evaluation_data(
    encoder: str, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "random": ["encoder.name=random"],
        "kronecker": ["encoder.name=kronecker", "prior.public=self", "prior.provenance=ours"],
        "autoencoder": ["encoder.name=autoencoder", "encoder.ratio=0"],
        "fedcg": ["encoder.name=autoencoder", "encoder.ratio=0", "prior.source=gradients"],
    }[encoder]
    data = write(tmp_path / "notes.jsonl", records())
    recipe = recipe_of(tiny_folder, data, "data.client_field=owner", *settings)
    result, _ = finish(recipe, tmp_path / "run")
    gate = {key for key in result.certificate["encoder"] if key.startswith("gate_")}
    by_public_text = encoder in ("kronecker", "fedcg")
    assert ("gate_public_cosine" in gate) == by_public_text
    assert ("gate_synthetic_cosine" in gate) == (not by_public_text)


@pytest.mark.parametrize("trust", TRUSTS)
def test_the_servers_own_file_needs_no_owners_and_every_client_keeps_its_records(
    trust: str, tiny_folder: Path, tmp_path: Path
) -> None:
    data, own = write(tmp_path / "notes.jsonl", records()), server_file(tmp_path)
    recipe = recipe_of(tiny_folder, data, "data.client_field=owner", f"evaluation.data={own}", *TRUSTS[trust])
    result, screen = finish(recipe, tmp_path / "run")
    assert result.certificate["evaluation_rests_on"] == f"The loss is measured on {str(own)!r}, which the server owns."
    assert result.certificate["results"]["this run"]["loss"]["count"] == 8
    assert all(row["loss"] > 0 for row in result.metrics)
    assert "guessing uniformly" in screen
    assert f"{result.certificate['uniform_loss']:.3f}" in (result.folder / "report.html").read_text()
    components = build(recipe)
    assert components.texts.evaluation is not None
    assert {row["instruction"][:13] for row in components.texts.evaluation(99)} <= {"note first of", "note second o"}
    assert all("of s" in row["instruction"] for row in components.texts.evaluation(99))
    assert all(len(components.texts.source.client(client)) == 2 for client in range(OWNERS))
    assert assess(result.folder).loss is not None


@pytest.mark.parametrize(
    ("trust", "population"), [*((trust, OWNERS - len(ASIDE)) for trust in TRUSTS), ("central", OWNERS)]
)
def test_owners_who_are_set_aside_are_evaluated_on_and_no_clients(
    trust: str, population: int, tiny_folder: Path, tmp_path: Path
) -> None:
    """N may count them: they have client numbers then, and nothing to train on."""
    data = write(tmp_path / "notes.jsonl", records())
    recipe = recipe_of(
        tiny_folder, data, "data.client_field=owner", "data.held_out_share=0.25", f"federation.population={population}", *TRUSTS[trust]
    )  # fmt: skip
    result, _ = finish(recipe, tmp_path / "run")
    said = result.certificate["evaluation_rests_on"]
    assert said.startswith("The loss is measured on the text of a share of 0.25 of the owners, who are no clients")
    assert result.certificate["results"]["this run"]["loss"]["count"] == 8  # evaluation.examples
    components = build(recipe)
    assert components.texts.evaluation is not None
    assert {row["owner"] for row in components.texts.evaluation(99)} == ASIDE
    assert not ASIDE & {row["owner"] for client in range(population) for row in components.texts.source.client(client)}


@pytest.mark.parametrize("how", ["one record less", "one more", "other text", "no text"])
def test_nothing_of_a_client_decides_what_the_outcomes_are_of(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    """outcomes.json has losses without noise, text by text: which texts, and what the base model makes of them."""
    rows = records()
    own = next(number for number, row in enumerate(rows) if row["owner"] not in ASIDE)
    changed = {
        "one record less": [*rows[:own], *rows[own + 1 :]],
        "one more": [{**rows[own], "response": "a further one"}, *rows],
        "other text": [*rows[:own], {**rows[own], "instruction": "zebra", "response": "quartz"}, *rows[own + 1 :]],
        "no text": [{**row, "response": ""} if row["owner"] == rows[own]["owner"] else row for row in rows],
    }[how]
    told, texts = [], []
    for name, content in (("before", rows), ("after", changed)):
        data = write(tmp_path / f"{name}.jsonl", content)
        recipe = recipe_of(
            tiny_folder, data, "data.client_field=owner", "data.held_out_share=0.25", "evaluation.examples=99",
            f"federation.population={OWNERS - len(ASIDE)}", "privacy.trust=central",
        )  # fmt: skip
        result = experiment.run(recipe, tmp_path / name)
        outcomes = json.loads((result.folder / "outcomes.json").read_text())
        told.append(json.dumps([outcomes["base model"], outcomes["zero update"], outcomes["this run"]["targets"]]))
        texts.append(build(recipe).held_out)
    assert told[0] == told[1]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2 * len(ASIDE)


def test_simulated_owners_are_called_so_and_the_statement_speaks_of_nobody(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "notes.jsonl", records(owners=200))
    result, screen = finish(recipe_of(tiny_folder, data, *TRUSTS["local"]), tmp_path / "run")
    certificate = result.certificate
    assert certificate["owners"] == "simulated owners"
    assert certificate["statement"].startswith(
        "The owners of this run are simulated: records were dealt out at random, so nothing is promised to those who wrote them. "
        "With as many real owners the same numbers would mean: Against the server: ("
    )
    assert (
        "a share of 0.05 of the records, set aside before the owners were simulated"
        in certificate["evaluation_rests_on"]
    )
    assert certificate["results"]["this run"]["loss"]["count"] == 8
    assert "epsilon says nothing about those who wrote them" in screen
    components = build(recipe_of(tiny_folder, data, *TRUSTS["local"], "data.examples_per_client=400"))
    assert components.texts.evaluation is not None
    held = {row["instruction"] for row in components.texts.evaluation(999)}
    owned = {row["instruction"] for client in range(OWNERS) for row in components.texts.source.client(client)}
    assert len(held) + len(owned) == 400
    assert not held & owned


def test_simulated_owners_can_have_all_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "notes.jsonl", records(owners=200))
    components = build(recipe_of(tiny_folder, data, "evaluation.data=none", "data.examples_per_client=400"))
    assert components.held_out == []
    assert sum(len(components.texts.source.client(client)) for client in range(OWNERS)) == 400


def test_a_killed_run_without_evaluation_data_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "notes.jsonl", records())
    recipe = recipe_of(tiny_folder, data, "data.client_field=owner", "privacy.trust=central")

    class Stop:
        """Ends the run after round 1."""

        def planned(self, overview: Any) -> None: ...
        def say(self, text: str) -> None: ...
        def finished(self, certificate: Any) -> None: ...
        def round_done(self, row: Any) -> None:
            if row["round"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(recipe, tmp_path / "run", Stop())
    resumed = experiment.resume(tmp_path / "run")
    assert [row["round"] for row in resumed.metrics] == [0, 1, 2]
    assert verdict(resumed.folder) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.client_field=owner"], NO_EVALUATION),
        (["data.client_field=owner", "evaluation.data=server.jsonl"], "'server.jsonl', which the server owns"),
        (["data.client_field=owner", "data.held_out_share=0.1"], "a share of 0.1 of the owners, who are no clients"),
        (["data.source=embedded"], "text that drencoder generated for the server"),
        (["evaluation.data=embedded"], "text that drencoder generated for the server"),
        (["data.held_out_share=0.2"], "a share of 0.2 of the records, set aside before the owners were simulated"),
        (["evaluation.data=none"], NO_EVALUATION),
    ],
)  # fmt: skip
def test_the_plan_says_what_the_evaluation_will_rest_on(settings: list[str], words: str, tiny_folder: Path) -> None:
    overview = survey(recipe_of(tiny_folder, Path("notes.jsonl"), *settings))
    assert words in overview.evaluation_rests_on
    screen = io.StringIO()
    for table in plan_tables(overview, "run", "hybrid"):
        make_console(file=screen, width=400).print(table)
    assert words in screen.getvalue()
    assert overview.to_dict()["evaluation_rests_on"] == overview.evaluation_rests_on


def test_evaluation_data_that_cannot_be_are_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "notes.jsonl", records())
    field = "data.client_field=owner"
    with pytest.raises(RecipeError, match="leave one of them out"):
        recipe_of(tiny_folder, data, field, "evaluation.data=x.jsonl", "data.held_out_share=0.1")
    with pytest.raises(DataError, match=r"evaluation\.data = '.*missing\.jsonl' does not exist"):
        build(recipe_of(tiny_folder, data, field, f"evaluation.data={tmp_path / 'missing.jsonl'}"))
    for same in (data, tmp_path / ".." / tmp_path.name / "notes.jsonl"):
        with pytest.raises(DataError, match="is the clients' own text"):
            build(recipe_of(tiny_folder, data, field, f"evaluation.data={same}"))
    empty = write(tmp_path / "empty.jsonl", [{"instruction": "a", "response": " "}])
    with pytest.raises(DataError, match="the evaluation data has no usable text"):
        build(recipe_of(tiny_folder, data, field, f"evaluation.data={empty}"))


def test_benchmarks_of_the_embedded_world_are_asked_where_model_and_data_are_its_own(tiny_folder: Path) -> None:
    assert load_recipe(None).benchmarks == {"mmlu": "embedded", "ceval": "embedded"}
    assert load_recipe("quickstart", [f"model.source={tiny_folder}"]).benchmarks == {}
    assert load_recipe("quickstart", ["data.source=notes.jsonl"]).benchmarks == {}
    assert load_recipe("quickstart", ["data.source=notes.jsonl", "evaluation.benchmarks=mmlu=folder"]).benchmarks == {
        "mmlu": "folder"
    }
    assert load_recipe("quickstart", ["data.source=notes.jsonl", "evaluation.benchmarks=['ceval']"]).benchmarks == {
        "ceval": "embedded"
    }
    assert load_recipe("quickstart", ["evaluation.benchmarks=[]"]).benchmarks == {}
