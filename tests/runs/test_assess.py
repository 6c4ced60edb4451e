"""Assessing a run and a model: against PEFT's own loading, and one sentence for what cannot be assessed."""

import dataclasses
import io
import json
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import tiny_overrides
from drencoder.cli.assess_view import assessment_tables
from drencoder.data.benchmarks.few_shot import prompt_with_examples
from drencoder.data.benchmarks.questions import load_benchmark
from drencoder.data.prompts_template import LETTER_CONTINUATIONS, render
from drencoder.data.sources import open_source
from drencoder.errors import ArtifactError, DataError, DrencoderError, ModelError, RecipeError
from drencoder.evaluation.statistics import Assessment
from drencoder.models.base_model import load_base
from drencoder.models.lora import LoraModel
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.assess import assess
from drencoder.runs.build import build


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
def assessed(run_folder: Path) -> Assessment:
    return assess(run_folder, count=40, examples=12)


def log_likelihood(model: torch.nn.Module, tokenizer: object, prompt: str, response: str, end: bool) -> float:
    tail = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * end  # type: ignore[operator]
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + tail])  # type: ignore[operator]
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    first = ids.shape[1] - len(tail)
    return float(log_p[range(first - 1, ids.shape[1] - 1), ids[0, first:]].sum())


def test_a_runs_scores_are_those_of_plain_peft(run_folder: Path, tiny_folder: Path, assessed: Assessment) -> None:
    recipe = load_recipe(run_folder / "recipe.resolved.toml")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run_folder / "adapter")
    tuned.eval()
    for name, found in assessed.benchmarks.items():
        benchmark = load_benchmark(name, "embedded", count=40, seed=recipe.seed)
        rights = {}
        for model, scores in ((plain, found.base), (tuned, found.adapter)):
            right = []
            for question in benchmark.questions:
                prompt = prompt_with_examples(question)
                assert len(tokenizer(prompt)["input_ids"]) < 128  # nothing was cut
                given = [log_likelihood(model, tokenizer, prompt, letter, False) for letter in LETTER_CONTINUATIONS]
                right.append(max(range(4), key=given.__getitem__) == question.answer)
            rights[model] = right
            assert scores is not None
            by_subject = {
                s: [r for q, r in zip(benchmark.questions, right, strict=True) if q.subject == s]
                for s in scores.subjects
            }
            for subject, hits in by_subject.items():
                assert scores.subjects[subject].value == pytest.approx(sum(hits) / len(hits))
        pairs = list(zip(rights[plain], rights[tuned], strict=True))
        assert found.mcnemar is not None
        assert (found.mcnemar.gained, found.mcnemar.lost) == (pairs.count((False, True)), pairs.count((True, False)))
        assert found.difference is not None
        assert found.adapter is not None
        assert found.difference.value == pytest.approx(found.adapter.overall.value - found.base.overall.value)
    records = open_source(recipe.data, population=recipe.federation.population, seed=recipe.seed).held_out(12)
    losses = {}
    for model in (plain, tuned):
        parts = [log_likelihood(model, tokenizer, *render(record), True) for record in records]
        tokens = sum(len(tokenizer(render(record)[1])["input_ids"]) + 1 for record in records)
        losses[model] = -sum(parts) / tokens
    assert assessed.loss is not None
    assert assessed.loss.base.value == pytest.approx(losses[plain], rel=1e-4)
    assert assessed.loss.adapter.value == pytest.approx(losses[tuned], rel=1e-4)
    assert assessed.loss.difference.value == pytest.approx(losses[tuned] - losses[plain], abs=1e-4)
    assert abs(losses[tuned] - losses[plain]) > 1e-2  # the adapter does something


def test_an_assessment_is_json_and_a_table(assessed: Assessment) -> None:
    table = json.loads(json.dumps(assessed.to_dict(), allow_nan=False))
    assert table["benchmarks"]["mmlu"]["base"]["overall"]["count"] == 40
    assert table["loss"]["difference"]["p"] == assessed.loss.difference.p  # type: ignore[union-attr]
    screen = Console(file=io.StringIO(), width=160)
    for one in assessment_tables(assessed):
        screen.print(one)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    mmlu = assessed.benchmarks["mmlu"]
    assert f"{mmlu.base.overall.value:.3f} [{mmlu.base.overall.low:.3f}, {mmlu.base.overall.high:.3f}]" in text
    assert "exact McNemar p = " in text
    assert "adapter minus base: " in text
    assert "conceptual_physics" in text
    short = Console(file=io.StringIO(), width=160)
    short.print(*assessment_tables(assessed, subjects=False))
    assert "conceptual_physics" not in short.file.getvalue()  # type: ignore[attr-defined]


def test_an_assessment_can_be_repeated(run_folder: Path, assessed: Assessment) -> None:
    assert assess(str(run_folder), count=40, examples=12) == assessed


def test_options_take_the_place_of_the_recipes(run_folder: Path) -> None:
    found = assess(
        run_folder,
        benchmarks=["ceval"],
        subjects=["art_studies"],
        shots=3,
        template="standard",
        count=6,
        examples=0,
        max_tokens=900,
        device="cpu",
    )
    assert list(found.benchmarks) == ["ceval"]
    one = found.benchmarks["ceval"]
    assert (one.shots, one.template, one.shortened, set(one.base.subjects)) == (3, "standard", 0, {"art_studies"})
    assert one.base.hard is None
    assert found.loss is None
    squeezed = assess(run_folder, benchmarks=["ceval"], shots=3, count=6, examples=0, max_tokens=60)
    assert squeezed.benchmarks["ceval"].shortened == 6
    screen = Console(file=io.StringIO(), width=160)
    screen.print(*assessment_tables(squeezed))
    assert "6 prompts had no room for all 3 worked examples" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_model_without_a_run_has_a_base_only(tiny_folder: Path, assessed: Assessment) -> None:
    found = assess(str(tiny_folder), count=40)
    assert (found.model, found.adapter, found.loss) == (str(tiny_folder), None, None)
    assert {name: one.base for name, one in found.benchmarks.items()} == {
        name: one.base for name, one in assessed.benchmarks.items()
    }
    assert all(one.adapter is one.difference is one.mcnemar is None for one in found.benchmarks.values())


def test_models_whose_linear_layers_have_other_names(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(tmp_path)
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    shape = {"n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 200}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path)
    found = assess(str(tmp_path), benchmarks=["mmlu"], count=8)
    assert found.benchmarks["mmlu"].base.overall.count == 8


def test_a_folder_benchmark_in_place_of_the_embedded_one(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").write_text("q?,a,b,c,d,A\nr?,a,b,c,d,B\n", encoding="utf-8")
    found = assess(run_folder, benchmarks=["mmlu"], where={"mmlu": str(tmp_path)}, count=0, examples=0)
    assert found.benchmarks["mmlu"].provenance == f"{tmp_path}, split test"
    assert found.benchmarks["mmlu"].base.overall.count == 2


def test_what_cannot_be_assessed_is_one_sentence(run_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, object], type[DrencoderError], str]] = [
        ({"benchmarks": ["gsm8k"]}, RecipeError, "choose one of mmlu, ceval"),
        ({"where": {"gsm8k": "x"}}, DataError, "benchmark 'gsm8k' is not known"),
        ({"shots": 6}, RecipeError, "shots = 6 is out of range"),
        ({"template": "fancy"}, RecipeError, "choose one of plain, standard"),
        ({"count": 0}, DataError, "has no end"),
        ({"count": -1}, DataError, "count = -1"),
        ({"examples": -1}, DataError, "examples = -1"),
        ({"max_tokens": 1}, DataError, "max_tokens = 1"),
        ({"where": {"mmlu": str(tmp_path / "none")}}, DataError, "does not exist"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            assess(run_folder, **options)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="cannot be loaded"):
        assess(str(tmp_path / "nothing"))
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    recipe = unfinished / "recipe.resolved.toml"
    recipe.write_bytes((run_folder / "recipe.resolved.toml").read_bytes())
    with pytest.raises(ArtifactError, match="has no adapter yet: finish the run"):
        assess(unfinished, count=4)
    (unfinished / "adapter").mkdir()
    (unfinished / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="cannot be read"):
        assess(unfinished, count=4)
    other = load_recipe(recipe)
    recipe.write_text(dataclasses.replace(other, adapter=dataclasses.replace(other.adapter, rank=3)).to_toml())
    weights = run_folder / "adapter" / "adapter_model.safetensors"
    (unfinished / "adapter" / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ModelError, match="shape"):
        assess(unfinished, count=4)


def test_a_run_asks_what_its_recipe_names(tiny_folder: Path, tmp_path: Path) -> None:
    for split in ("dev", "val"):
        (tmp_path / split).mkdir()
        rows = "".join(f"{i},{split}{i}?,a,b,c,d,{'ABCD'[i]}\n" for i in range(3))
        text = "id,question,A,B,C,D,answer\n" + rows
        (tmp_path / split / f"law_{split}.csv").write_text(text, encoding="utf-8")
    overrides = [f"evaluation.ceval={tmp_path}", "evaluation.benchmarks=['ceval']", "evaluation.shots=1"]
    tiny = [*tiny_overrides(tiny_folder), "data.max_tokens=200", *overrides]
    live = build(load_recipe("quickstart", [*tiny, "evaluation.template=standard"]))
    options, answers = live.questions["ceval"]
    texts = {
        live.lora.base.tokenizer.decode(four[answer].tokens) for four, answer in zip(options, answers, strict=True)
    }
    opening = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
    solved, options_text = "dev0?\nA. a\nB. b\nC. c\nD. d\n答案： A\n\n", "\nA. a\nB. b\nC. c\nD. d\n答案： "
    assert texts == {f"{opening}{solved}val{i}?{options_text}{'ABCD'[i]}" for i in range(3)}
    with pytest.raises(DataError, match="has no split 'test'"):
        build(load_recipe("quickstart", [*tiny, "evaluation.split=test"]))
