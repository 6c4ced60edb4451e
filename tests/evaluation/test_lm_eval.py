"""Tasks over local folders against lm-eval called by hand, and a run's quick score against a task of lm-eval."""

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors

from drencoder.data.benchmarks.questions import load_benchmark
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.prompts_template import LETTERS
from drencoder.errors import DataError
from drencoder.evaluation.held_out import choice_scores, question_examples
from drencoder.evaluation.lm_eval_runner import ItemLog, ask_tasks
from drencoder.evaluation.lm_eval_tasks import load_tasks
from drencoder.models.base_model import BaseModel, load_base, open_tokenizer
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from lm_eval_by_hand import LAYOUTS, ask_by_hand, write_original_folder

NAMES = ["mmlu", "ceval"]


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of a machine that has none, and an error for whoever asks the network."""
    import datasets

    def refuse(*_: object) -> None:
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(config.Model(source="embedded"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_original_folder(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def places(folders: dict[str, Path]) -> dict[str, str]:
    return {name: str(folder) for name, folder in folders.items()}


def by_subject(log: ItemLog) -> dict[str, list[int]]:
    piles: dict[str, list[int]] = {}
    for subject, right in zip(log.subjects, log.right, strict=True):
        piles.setdefault(subject, []).append(int(right))
    return piles


@pytest.mark.parametrize(("shots", "limit"), [(0, None), (2, 4)])
def test_every_answer_is_that_of_lm_eval_by_hand(
    base: BaseModel, folders: dict[str, Path], tmp_path: Path, shots: int, limit: int | None
) -> None:
    by_hand = ask_by_hand(base.model, base.tokenizer, folders, tmp_path / "hand", shots=shots, limit=limit)
    seen: list[tuple[int, int]] = []
    ours: dict[str, list[int]] = {}
    for benchmark in load_tasks(NAMES, places(folders), shots=shots):
        assert benchmark.shots == str(shots)
        log = ask_tasks(
            benchmark, base, limit=limit, batch=8, on_progress=lambda done, total: seen.append((done, total))
        )
        total = 4 * len(log.right)
        assert seen == [(done, total) for done in range(total + 1)]
        seen.clear()
        assert log.metric == "acc"
        ours |= by_subject(log)
        # Groups: lm-eval weighs both by the number of questions.
        assert log.aggregates[benchmark.task]["acc"] == pytest.approx(sum(log.right) / len(log.right))
    assert ours == by_hand
    assert any(0 < sum(right) < len(right) for right in ours.values())
    sizes = {subject: len(right) for subject, right in ours.items()}
    if limit is None:
        assert sizes == {"anatomy": 6, "virology": 7, "philosophy": 8, "law": 6, "college_physics": 7}
    else:
        assert set(sizes.values()) == {limit}


def test_other_data_gives_other_answers(base: BaseModel, folders: dict[str, Path], tmp_path: Path) -> None:
    """The comparison above can fail: the answers of a file decide."""
    (benchmark,) = load_tasks(["mmlu"], places({"mmlu": folders["mmlu"]}), subjects=["anatomy"])
    before = ask_tasks(benchmark, base).right
    turned = write_original_folder("mmlu", tmp_path / "turned")
    path = turned / "test" / "anatomy_test.csv"
    lines = path.read_text("utf-8").splitlines()
    after = {"A": "B", "B": "C", "C": "D", "D": "A"}
    path.write_text("\n".join(line[:-1] + after[line[-1]] for line in lines), encoding="utf-8")
    (benchmark,) = load_tasks(["mmlu"], {"mmlu": str(turned)}, subjects=["anatomy"])
    assert ask_tasks(benchmark, base).right != before
    assert sum(ask_tasks(benchmark, base).right) + sum(before) <= len(before)


def test_prompts_are_lm_evals_own(folders: dict[str, Path]) -> None:
    mmlu, ceval = load_tasks(["mmlu", "ceval"], places(folders), shots=1)
    assert list(mmlu.tasks["groups"]) == ["mmlu", "mmlu_stem", "mmlu_other", "mmlu_humanities"]
    assert ceval.task == "ceval-valid"
    task = mmlu.tasks["tasks"]["mmlu_philosophy"]
    text = task.fewshot_context(task.eval_docs[0], 1)
    assert text.startswith("The following are multiple choice questions (with answers) about philosophy.\n\n")
    assert text.count("\nAnswer:") == 2
    task = ceval.tasks["tasks"]["ceval-valid_law"]
    assert task.fewshot_context(task.eval_docs[0], 0).startswith(
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
    )


def test_lm_eval_has_the_subjects_that_we_have() -> None:
    import lm_eval.tasks

    own = Path(str(lm_eval.tasks.__file__)).parent
    for name, (_, _, file) in LAYOUTS.items():
        files = {path.name for path in (own / file).parent.glob(Path(file).name.format("*"))}
        assert files == {Path(file).name.format(subject) for subject in TAXONOMIES[name].subjects}


def test_subjects_are_dealt_to_the_benchmarks_that_have_them(folders: dict[str, Path]) -> None:
    mmlu, ceval = load_tasks(NAMES, places(folders), subjects=["virology", "law"])
    assert (list(mmlu.subjects.values()), list(ceval.subjects.values())) == (["virology"], ["law"])
    assert list(mmlu.tasks["groups"]) == ["mmlu", "mmlu_other"]


def test_long_prompts_are_counted(base: BaseModel, tmp_path: Path) -> None:
    folder = write_original_folder("mmlu", tmp_path / "long", count=2)
    path = folder / "test" / "anatomy_test.csv"
    long = " ".join(["river"] * base.model.config.max_position_embeddings)
    path.write_text(path.read_text("utf-8") + f"{long}?,a,b,c,d,A\n", encoding="utf-8")
    (benchmark,) = load_tasks(["mmlu"], {"mmlu": str(folder)})
    log = ask_tasks(benchmark, base)
    assert (log.shortened, len(log.right)) == (1, 10)


def test_another_task_from_a_folder_of_its_data_set(base: BaseModel, tmp_path: Path) -> None:
    """HellaSwag's columns, as the hub has them; lm-eval cleans them in Python (`process_docs`)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "hellaswag"
    folder.mkdir()
    rows = [
        {
            "ctx_a": f"The river is {word}.",
            "ctx_b": "it",
            "activity_label": "Rivers",
            "endings": [f"{word} {end}." for end in ("flows", "stands", "sings", "burns")],
            "label": str(index % 4),
        }
        for index, word in enumerate(["green", "quick", "seven", "north"])
    ]
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (benchmark,) = load_tasks(["hellaswag"], {"hellaswag": str(folder)}, shots=1)
    log = ask_tasks(benchmark, base)
    assert log.subjects == ["hellaswag"] * 4
    assert set(log.aggregates["hellaswag"]) == {"acc", "acc_norm"}
    assert list((tmp_path / "cache").rglob("*.arrow")) == []  # no copy of the texts is left
    own = {"include": "hellaswag/hellaswag.yaml", "task": "by_hand", "dataset_path": str(folder)}
    own["include"] = str(Path(str(lm_eval.__file__)).parent / "tasks" / own["include"])
    (tmp_path / "by_hand.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    results: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal"),
        tasks=[str(tmp_path / "by_hand.yaml")],
        num_fewshot=1,
        bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    assert log.aggregates["hellaswag"] == pytest.approx(
        {metric: results["results"]["by_hand"][f"{metric},none"] for metric in ("acc", "acc_norm")}
    )
    with pytest.raises(DataError, match=r"cannot read this folder as hellaswag \(\w+\): it must hold the splits"):
        load_tasks(["hellaswag"], {"hellaswag": str(tmp_path)})
    with pytest.raises(DataError, match="arithmetic is not a single task"):
        load_tasks(["arithmetic"], {"arithmetic": str(folder)})
    with pytest.raises(DataError, match="'hellaswagg' is not a task of lm-eval: did you mean hellaswag"):
        load_tasks(["hellaswagg"], {})
    with pytest.raises(DataError, match=r"data of task hellaswag is not on this machine .* --from hellaswag=FOLDER"):
        load_tasks(["hellaswag"], {})
    with pytest.raises(DataError, match="--subjects belongs to mmlu and ceval: ask for hellaswag without it"):
        load_tasks(["hellaswag"], {}, subjects=["anatomy"])


def test_what_cannot_be_loaded_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    where = places(folders)
    mmlu = {"mmlu": where["mmlu"]}
    bare = write_original_folder("mmlu", tmp_path / "bare")
    (bare / "dev" / "virology_dev.csv").unlink()
    cases: list[tuple[list[str], dict[str, str], dict[str, Any], str]] = [
        (["mmlu"], {}, {}, "data of task mmlu is not on this machine .* --from mmlu=FOLDER"),
        (["mmlu"], where, {}, "--from ceval=.* belongs to no task that is asked"),
        (["mmlu"], {"mmlu": str(tmp_path / "none")}, {}, "--from mmlu=.*none: the folder does not exist"),
        (["mmlu"], {"mmlu": where["ceval"]}, {}, "has no split 'test'"),
        (["mmlu"], mmlu, {"subjects": ["anatomi"]}, "'anatomi' is not a subject of mmlu: did you mean 'anatomy'"),
        (["mmlu"], mmlu, {"subjects": ["sociology"]}, "has no question of 'sociology'"),
        (NAMES, where, {"subjects": ["anatomy"]}, "--subjects anatomy has none of ceval"),
        (["mmlu"], mmlu, {"shots": 6}, "mmlu_anatomy has 5 worked examples, fewer than --shots 6"),
        (["mmlu"], {"mmlu": str(bare)}, {"shots": 1}, "split 'dev' has no question of 'virology'"),
    ]
    for names, some, options, message in cases:
        with pytest.raises(DataError, match=message):
            load_tasks(names, some, **options)


def test_without_lm_eval_the_extra_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"needs lm-eval: pip install 'drencoder\[eval\]'"):
        load_tasks(NAMES, places(folders))


def test_nothing_is_printed_and_every_switch_is_put_back(
    base: BaseModel, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import datasets
    import huggingface_hub

    switches = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    with caplog.at_level(logging.DEBUG):
        (benchmark,) = load_tasks(["ceval"], places({"ceval": folders["ceval"]}))
        ask_tasks(benchmark, base)
        with pytest.raises(DataError):
            load_tasks(["mmlu"], {})
    shown = capfd.readouterr()
    assert (shown.out, shown.err, caplog.text) == ("", "", "")
    assert [switch.HF_HUB_OFFLINE for switch in switches] == before
    assert logging.root.manager.disable == 0


@pytest.mark.skipif(
    "DRENCODER_TEST_DATA" not in os.environ, reason="DRENCODER_TEST_DATA names no folder with mmlu/, ceval/"
)
def test_the_original_files_give_lm_evals_numbers(base: BaseModel, tmp_path: Path) -> None:
    folders = {name: Path(os.environ["DRENCODER_TEST_DATA"]) / name for name in NAMES}
    subjects = {"mmlu": ["anatomy", "world_religions"], "ceval": ["law", "physician"]}
    by_hand = ask_by_hand(base.model, base.tokenizer, folders, tmp_path / "hand", limit=20, subjects=subjects)
    ours: dict[str, list[int]] = {}
    for benchmark in load_tasks(NAMES, places(folders), subjects=[name for some in subjects.values() for name in some]):
        ours |= by_subject(ask_tasks(benchmark, base, limit=20))
    assert ours == by_hand
    assert {len(right) for right in ours.values()} == {20}


# --- the quick score of a run ------------------------------------------------------------------------

PLAIN = "{{question}} A. {{A}} B. {{B}} C. {{C}} D. {{D}}\nAnswer:"


@pytest.mark.parametrize("kind", ["embedded", "tiny", "tiny with a start token"])
def test_the_quick_score_agrees_with_a_task_of_lm_eval(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    base = load_base(config.Model(source="embedded" if kind == "embedded" else str(tiny_folder)))
    if kind == "tiny with a start token":  # as LLaMA's tokenizer has one
        start = base.tokenizer.eos_token
        base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, base.end_id)]
        )
    drawn = {name: load_benchmark(name, "embedded", count=8, seed=0) for name in NAMES}
    for name, benchmark in drawn.items():
        rows = [
            {"question": q.question, **dict(zip(LETTERS, q.choices, strict=True)), "answer": q.answer}
            for q in benchmark.questions
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": PLAIN,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=16, max_length=2048)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs: Any = evaluate(model, manager.load([f"local_{name}" for name in NAMES]), bootstrap_iters=0)
    lora = LoraModel(base, config.Adapter(rank=2), seed=0)
    tokenizer = open_tokenizer(base, config.Data(max_tokens=2048, template="plain"))
    for name, benchmark in drawn.items():
        ours = choice_scores(lora, lora.initial_D, question_examples(tokenizer, benchmark.questions))
        samples = sorted(theirs["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        expected = torch.tensor([[response[0] for response in sample["filtered_resps"]] for sample in samples])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        right = [pick == answer for pick, answer in zip(ours.argmax(1).tolist(), benchmark.answers, strict=True)]
        assert theirs["results"][f"local_{name}"]["acc,none"] == pytest.approx(sum(right) / 8)
        assert expected.unique().numel() > 8  # not one number everywhere
