"""Our scores against EleutherAI's lm-evaluation-harness on the same local tasks: an implementation we did not write."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors

from drencoder.data.benchmarks.questions import Benchmark, load_benchmark
from drencoder.data.embedded_world.world import Question
from drencoder.data.prompts_template import LETTERS
from drencoder.evaluation.held_out import ask_questions, choice_scores
from drencoder.models.base_model import BaseModel, load_base
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config

QUESTIONS = 8
MAX_TOKENS = 2048
SHOTS = 2
OPENINGS = {
    "mmlu": "The following are multiple choice questions (with answers) about {{title}}.\n\n",
    "ceval": "以下是中国关于{{title}}的单项选择题，请选出其中的正确答案。\n\n",
}
TITLES = {"nutrition": "nutrition", "art_studies": "艺术学"}
SUBJECTS = {"mmlu": "nutrition", "ceval": "art_studies"}
# The text of the public tasks mmlu and ceval-valid of the harness, and of clients' records as a task.
STANDARD = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n"
CLOSINGS = {"mmlu": "Answer:", "ceval": "答案："}
PLAIN = "{{question}} A. {{A}} B. {{B}} C. {{C}} D. {{D}}\nAnswer:"


def document(question: Question) -> dict[str, str]:
    letters = dict(zip(LETTERS, question.choices, strict=True))
    return {
        "question": question.question,
        **letters,
        "answer": LETTERS[question.answer],
        "title": TITLES[question.subject],
    }


def write_task(folder: Path, benchmark: Benchmark, template: str) -> str:
    """A task of the harness over local files: the questions are `test`, the worked examples `dev`."""
    subject = SUBJECTS[benchmark.name]
    parts = {"test": benchmark.questions, "dev": benchmark.examples.get(subject, benchmark.questions[:1])}
    files = {}
    for part, questions in parts.items():
        path = folder / f"{benchmark.name}_{benchmark.shots}_{part}.jsonl"
        path.write_text("\n".join(json.dumps(document(q), ensure_ascii=False) for q in questions), encoding="utf-8")
        files[part] = str(path)
    name = f"local_{benchmark.name}_{template}_{benchmark.shots}"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": benchmark.shots,
        "output_type": "multiple_choice",
        "doc_to_text": PLAIN if template == "plain" else STANDARD + CLOSINGS[benchmark.name],
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "metric_list": [{"metric": "acc"}],
    }
    if template == "standard":
        task["description"] = OPENINGS[benchmark.name]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")
    return name


def run_harness(base: BaseModel, folder: Path, tasks: list[str]) -> dict[str, Any]:
    """The harness's results and samples, by its own model class, prompts, batching and truncation."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=16, max_length=MAX_TOKENS
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluate(model, manager.load(tasks), bootstrap_iters=0, log_samples=True)


@pytest.fixture
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    def refuse(*_: object) -> None:
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # for what the harness imports first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(kind: str, tiny_folder: Path) -> BaseModel:
    base = load_base(config.Model(source="embedded" if kind == "embedded" else str(tiny_folder)))
    if kind == "tiny with a start token":  # as LLaMA's tokenizer has one
        start = base.tokenizer.eos_token
        base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, base.end_id)]
        )
    return base


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("kind", "templates"),
    [
        ("embedded", ("plain", "standard")),
        ("tiny", ("plain", "standard")),
        ("tiny with a start token", ("plain", "standard")),
    ],
)
def test_scores_agree_with_the_harness(
    kind: str, templates: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    base = load(kind, tiny_folder)
    tasks: dict[str, tuple[Benchmark, str]] = {}
    for name in SUBJECTS:
        for shots in (0, SHOTS):
            benchmark = load_benchmark(
                name, "embedded", subjects=[SUBJECTS[name]], shots=shots, count=QUESTIONS, seed=0
            )
            tasks |= {write_task(tmp_path, benchmark, template): (benchmark, template) for template in templates}
    harness = run_harness(base, tmp_path, list(tasks))
    lora = LoraModel(base, config.Adapter(rank=2), seed=0)
    for task, (benchmark, template) in tasks.items():
        asked = ask_questions(lora, benchmark.questions, MAX_TOKENS, examples=benchmark.examples, template=template)
        assert asked.shots == [benchmark.shots] * QUESTIONS
        ours = choice_scores(lora, lora.initial_D, asked.options)
        samples = sorted(harness["samples"][task], key=lambda sample: sample["doc_id"])
        theirs = torch.tensor([[response[0] for response in sample["filtered_resps"]] for sample in samples])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert ours.argmax(1).tolist() == theirs.argmax(1).tolist()
        share = sum(
            pick == answer for pick, answer in zip(ours.argmax(1).tolist(), benchmark.answers, strict=True)
        ) / len(benchmark.answers)
        assert harness["results"][task]["acc,none"] == pytest.approx(share)
        assert theirs.unique().numel() > QUESTIONS  # not one number everywhere


@pytest.mark.usefixtures("_no_network")
def test_a_wrong_prompt_would_be_seen(tmp_path: Path) -> None:
    base = load("embedded", tmp_path)
    benchmark = load_benchmark("mmlu", "embedded", subjects=["nutrition"], shots=SHOTS, count=QUESTIONS, seed=0)
    task = write_task(tmp_path, benchmark, "standard")
    harness = run_harness(base, tmp_path, [task])
    lora = LoraModel(base, config.Adapter(rank=2), seed=0)
    fewer = {name: examples[:1] for name, examples in benchmark.examples.items()}
    ours = choice_scores(
        lora,
        lora.initial_D,
        ask_questions(lora, benchmark.questions, MAX_TOKENS, examples=fewer, template="standard").options,
    )
    samples = sorted(harness["samples"][task], key=lambda sample: sample["doc_id"])
    theirs = torch.tensor([[response[0] for response in sample["filtered_resps"]] for sample in samples])
    assert (ours - theirs).abs().max() > 1e-2
