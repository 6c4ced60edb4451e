"""Assessing a run and a model: against lm-eval on plain PEFT's model, and one sentence for what cannot be assessed."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_overrides
from drencoder.cli.assess_view import assessment_tables
from drencoder.errors import ArtifactError, DataError, DeviceError, DrencoderError, ModelError
from drencoder.evaluation.statistics import Assessment, Row, loss_difference, mcnemar, ratio_of_sums
from drencoder.models.base_model import load_base
from drencoder.models.lora import LoraModel
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.assess import assess
from drencoder.runs.build import build
from drencoder.runs.display import make_console
from lm_eval_by_hand import ask_by_hand, write_original_folder

NAMES = ["mmlu", "ceval"]


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves for an assessment: its recipe and an adapter (here a random one)."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), "data.max_tokens=120"])
    lora = LoraModel(load_base(recipe.model), recipe.adapter, seed=recipe.seed)
    generator = torch.Generator().manual_seed(3)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    lora.save(lora.initial_D + torch.randn(lora.layout.size, generator=generator), adapter)
    (folder / "recipe.resolved.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_original_folder(name, tmp_path_factory.mktemp(name), count=12) for name in NAMES}


@pytest.fixture(scope="module")
def where(folders: dict[str, Path]) -> dict[str, str]:
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def assessed(run_folder: Path, where: dict[str, str]) -> Assessment:
    return assess(run_folder, tasks=NAMES, places=where, shots=1)


def rows_of(assessment: Assessment, part: str) -> dict[str, Row]:
    return {row.name: row for one in assessment.benchmarks.values() for row in one.rows if row.part == part}


def test_a_runs_scores_are_lm_evals_on_plain_peft(
    run_folder: Path, tiny_folder: Path, folders: dict[str, Path], assessed: Assessment, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    before = ask_by_hand(plain, tokenizer, folders, tmp_path / "base", shots=1)
    tuned = peft.PeftModel.from_pretrained(plain, run_folder / "adapter").eval()
    after = ask_by_hand(tuned, tokenizer, folders, tmp_path / "adapter", shots=1)
    assert before != after  # the adapter does something
    subjects = rows_of(assessed, "subject")
    assert set(subjects) == set(before)
    for name, row in subjects.items():
        assert row.base.value == pytest.approx(sum(before[name]) / len(before[name]))
        assert row.adapter is not None
        assert row.adapter.value == pytest.approx(sum(after[name]) / len(after[name]))
        assert row.mcnemar == mcnemar([bool(hit) for hit in before[name]], [bool(hit) for hit in after[name]])
        assert row.difference is not None
        assert row.difference.value == pytest.approx(row.adapter.value - row.base.value)
    mmlu, ceval = (assessed.benchmarks[name] for name in NAMES)
    for model, hits in (("base", before), ("adapter", after)):
        everything = [hit for name in ("anatomy", "virology", "philosophy") for hit in hits[name]]
        share = sum(everything) / len(everything)
        assert mmlu.lm_eval[model]["mmlu"]["acc"] == pytest.approx(share)
        assert getattr(mmlu.rows[0], model).value == pytest.approx(share)
        over_subjects = [sum(hits[name]) / len(hits[name]) for name in ("law", "college_physics")]
        assert getattr(ceval.rows[0], model).value == pytest.approx(sum(over_subjects) / 2)
        whole = hits["law"] + hits["college_physics"]
        assert ceval.lm_eval[model]["ceval-valid"]["acc"] == pytest.approx(sum(whole) / len(whole))
    assert set(rows_of(assessed, "category")) == {"other", "humanities", "STEM", "Humanities"}
    assert set(rows_of(assessed, "hard")) == {"Hard subset"}


def screen_of(assessment: Assessment) -> str:
    screen = make_console(file=io.StringIO(), width=200)
    for table in assessment_tables(assessment):
        screen.print(table)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_an_assessment_is_json_and_a_table(assessed: Assessment, folders: dict[str, Path]) -> None:
    table = json.loads(json.dumps(assessed.to_dict(), allow_nan=False))
    overall = table["benchmarks"]["mmlu"]["rows"][0]
    assert (overall["part"], overall["base"]["count"]) == ("overall", 39)
    assert set(overall["mcnemar"]) == {"gained", "lost", "p"}
    text = screen_of(assessed)
    mmlu = assessed.benchmarks["mmlu"]
    first = mmlu.rows[0]
    assert f"{first.base.value:.3f} [{first.base.low:.3f}, {first.base.high:.3f}]" in text
    assert first.mcnemar is not None
    assert f"{first.mcnemar.gained}/{first.mcnemar.lost}" in text
    assert (
        f"lm-eval's own ceval-valid: base acc {assessed.benchmarks['ceval'].lm_eval['base']['ceval-valid']['acc']:.4f}"
        in text
    )
    assert f"mmlu ({folders['mmlu']}), asked by lm-eval, 1 worked examples" in text
    assert "college_physics" in text
    for word in ("stone", "river", "山"):  # of a question
        assert word not in text.replace(str(folders["mmlu"]), "").replace(str(folders["ceval"]), "")


def test_an_assessment_can_be_repeated(run_folder: Path, where: dict[str, str], assessed: Assessment) -> None:
    told: list[str] = []
    again = assess(
        str(run_folder), tasks=NAMES, places=where, shots=1, batch=3, on_progress=lambda what, *_: told.append(what)
    )
    assert again == assessed
    assert set(told) == {f"{name}, {model}" for name in NAMES for model in ("base model", "adapter")}


def test_a_model_without_a_run_has_a_base_only(tiny_folder: Path, where: dict[str, str], assessed: Assessment) -> None:
    found = assess(str(tiny_folder), tasks=["ceval-valid", "mmlu"], places=where, shots=1, device="cpu")
    assert (found.model, found.adapter, found.loss) == (str(tiny_folder), None, None)
    for name in NAMES:
        ours, theirs = (one.benchmarks[name].rows for one in (found, assessed))
        assert [row.base for row in ours] == [row.base for row in theirs]
        assert all(row.adapter is row.difference is row.mcnemar is None for row in ours)
    assert "gained/lost" not in screen_of(found)
    few = assess(str(tiny_folder), tasks=["mmlu"], places={"mmlu": where["mmlu"]}, subjects=["virology"], limit=3)
    assert [(row.name, row.base.count) for row in few.benchmarks["mmlu"].rows] == [
        ("overall", 3), ("other", 3), ("virology", 3),
    ]  # fmt: skip


def copy_run(run_folder: Path, folder: Path, *changes: Any) -> Path:
    """The run with other values in its recipe: (section, key, value) each."""
    recipe = load_recipe(run_folder / "recipe.resolved.toml")
    for section, key, value in changes:
        recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **{key: value})})
    (folder / "adapter").mkdir(parents=True)
    weights = Path("adapter") / "adapter_model.safetensors"
    (folder / weights).write_bytes((run_folder / weights).read_bytes())
    (folder / "recipe.resolved.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return folder


def test_the_folders_of_the_runs_recipe_are_asked(run_folder: Path, where: dict[str, str], tmp_path: Path) -> None:
    run = copy_run(run_folder, tmp_path / "run", ("evaluation", "benchmarks", (f"mmlu={where['mmlu']}",)))
    found = assess(run, tasks=["mmlu"], subjects=["anatomy"])
    assert found.benchmarks["mmlu"].provenance == where["mmlu"]


def test_a_run_is_not_asked_what_its_clients_own(run_folder: Path, where: dict[str, str], tmp_path: Path) -> None:
    for split, shots in (("test", 0), ("dev", 1)):
        run = copy_run(run_folder, tmp_path / split, ("data", "source", f"mmlu:{where['mmlu']}:{split}"))
        with pytest.raises(DataError, match=f"clients are trained on split '{split}'"):
            assess(run, tasks=["mmlu"], places={"mmlu": where["mmlu"]}, shots=shots)


def test_without_tasks_a_runs_own_outcomes_are_compared(run_folder: Path, tmp_path: Path) -> None:
    run = copy_run(run_folder, tmp_path / "run")
    with pytest.raises(ArtifactError, match="has no outcomes yet: finish the run"):
        assess(run)
    targets = [3, 1, 2, 5]
    base = {"losses": [3.0, 2.0, 1.0, 9.0], "targets": targets, "right": {"mmlu": [1, 0, 0, 0], "ceval": [0, 1]}}
    this = {"losses": [2.0, 1.0, 1.5, 4.0], "targets": targets, "right": {"mmlu": [1, 1, 1, 0], "ceval": [0, 0]}}
    (run / "outcomes.json").write_text(json.dumps({"base model": base, "zero update": base, "this run": this}))
    found = assess(run)
    rows = {name: one.rows[0] for name, one in found.benchmarks.items()}
    assert (rows["mmlu"].base.value, rows["mmlu"].adapter.value) == (0.25, 0.75)  # type: ignore[union-attr]
    assert rows["mmlu"].mcnemar == mcnemar([True, False, False, False], [True, True, True, False])
    assert all(len(one.rows) == 1 for one in found.benchmarks.values())
    assert found.loss is not None
    assert found.loss.adapter == ratio_of_sums(this["losses"], targets)  # type: ignore[arg-type]
    assert found.loss.difference.value == pytest.approx((8.5 - 15) / 11)
    assert found.loss.difference.low < loss_difference([1.0], [1.0], [1], seed=0).value
    assert "Held-out loss" in screen_of(found)
    with pytest.raises(DataError, match="belong to --tasks"):
        assess(run, limit=3)
    (run / "outcomes.json").write_text(json.dumps({"base model": base}))
    with pytest.raises(ArtifactError, match=r"cannot be read \(KeyError\)"):
        assess(run)


def test_what_cannot_be_assessed_is_one_sentence(run_folder: Path, where: dict[str, str], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[DrencoderError], str]] = [
        ({"shots": -1}, DataError, "--shots -1"),
        ({"limit": 0}, DataError, "--limit 0"),
        ({"batch": 0}, DataError, "--batch 0"),
        ({"places": {**where, "gsm8k": "x"}}, DataError, "--from gsm8k=x belongs to no task"),
        ({"places": {**where, "mmlu": str(tmp_path / "none")}}, DataError, "does not exist"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, DeviceError, "no GPU"))
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            assess(run_folder, **{"tasks": NAMES, "places": where, **options})
    with pytest.raises(ModelError, match="is not there"):
        assess(str(tmp_path / "nothing"), tasks=NAMES, places=where)
    with pytest.raises(DataError, match="is not a run folder, so there is nothing to read: name --tasks"):
        assess("embedded")
    run = copy_run(run_folder, tmp_path / "run", ("adapter", "rank", 3))
    with pytest.raises(ModelError, match="shape"):
        assess(run, tasks=NAMES, places=where)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="cannot be read"):
        assess(run, tasks=NAMES, places=where)
    weights.unlink()
    with pytest.raises(ArtifactError, match="has no adapter yet: finish the run"):
        assess(run, tasks=NAMES, places=where)


def test_a_run_asks_what_its_recipe_names(tiny_folder: Path, folders: dict[str, Path]) -> None:
    overrides = [
        f"evaluation.benchmarks=['ceval={folders['ceval']}']",
    ]
    live = build(load_recipe("quickstart", [*tiny_overrides(tiny_folder), "data.max_tokens=200", *overrides]))
    options, answers = live.questions["ceval"]
    texts = [
        live.lora.base.tokenizer.decode(four[answer].tokens) for four, answer in zip(options, answers, strict=True)
    ]
    assert len(texts) == live.recipe.evaluation.examples == 8
    assert all(text.endswith(f"\nAnswer: {'ABCD'[answer]}") for text, answer in zip(texts, answers, strict=True))
