"""lm-eval as its users call it: YAML files over JSON copies of small CSV folders, and `simple_evaluate`.

Nothing of drencoder's reading, task configuration or scoring is used here.
"""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

LAYOUTS = {
    "mmlu": ("test", ("anatomy", "virology", "philosophy"), "mmlu/default/mmlu_{}.yaml"),
    "ceval": ("val", ("law", "college_physics"), "ceval/ceval-valid_{}.yaml"),
}
WORDS = {
    "mmlu": ["stone", "river", "green", "quick", "seven", "lamp", "north", "bread"],
    "ceval": list("山水火木金土日月红七北"),
}


def write_original_folder(name: str, folder: Path, count: int = 6) -> Path:
    """A benchmark in the layout of its authors: `count` + position questions a subject, five worked examples."""
    split, subjects, _ = LAYOUTS[name]
    rng = random.Random(name)
    for place, subject in enumerate(subjects):
        for part, number in ((split, count + place), ("dev", 5)):
            rows = []
            for index in range(number):
                texts = [" ".join(rng.choices(WORDS[name], k=size)) for size in (6, 2, 2, 2, 2)]
                row = [f' {texts[0]}, "{part}" {index}?', *texts[1:], rng.choice("ABCD")]
                rows.append(row if name == "mmlu" else [str(index), *row])
            if name == "ceval":
                rows.insert(0, ["id", "question", "A", "B", "C", "D", "answer"])
            path = folder / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


def _documents(name: str, path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    if name == "mmlu":
        return [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows]
    kept = ("question", "A", "B", "C", "D", "answer")
    return [{key: cell for key, cell in zip(rows[0], row, strict=True) if key in kept} for row in rows[1:]]


def ask_by_hand(
    model: Any,
    tokenizer: Any,
    folders: dict[str, Path],
    work: Path,
    *,
    shots: int = 0,
    limit: int | None = None,
    subjects: dict[str, Sequence[str]] | None = None,
) -> dict[str, list[int]]:
    """(subject -> whether each question was answered rightly), each task included from lm-eval's own YAML file."""
    import lm_eval
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    work.mkdir(parents=True)
    own = Path(str(lm_eval.tasks.__file__)).parent
    names = {}
    for name, folder in folders.items():
        split, all_subjects, file = LAYOUTS[name]
        for subject in (subjects or {}).get(name, all_subjects):
            data = {}
            for part in (split, "dev"):
                documents = _documents(name, folder / part / f"{subject}_{part}.csv")
                path = work / f"{subject}_{part}.jsonl"
                path.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
                data[part] = str(path)
            names[f"by_hand_{subject}"] = subject
            task = {
                "include": str(own / file.format(subject)),
                "task": f"by_hand_{subject}",
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": data, "cache_dir": str(work / "cache")},
            }
            (work / f"by_hand_{subject}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    results: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4),
        tasks=list(names),
        num_fewshot=shots,
        limit=limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(work), include_defaults=False),
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    samples = {task: sorted(some, key=lambda sample: sample["doc_id"]) for task, some in results["samples"].items()}
    return {names[task]: [int(sample["acc"]) for sample in some] for task, some in samples.items()}
