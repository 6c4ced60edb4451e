"""Small MMLU and C-Eval files in the original layouts."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drencoder.data.benchmarks.files import read_questions
from drencoder.data.benchmarks.questions import Benchmark, load_benchmark
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import Question

HEADER = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]


def mmlu_rows(subject: str, count: int) -> list[list[str]]:
    return [[f"{subject} {i}?", f"a{i}", f"b{i}", f"c{i}", f"d{i}", "ABCD"[i % 4]] for i in range(count)]


def write_csv(path: Path, rows: Sequence[Sequence[str]], ending: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ending).writerows(rows)
    path.write_bytes(text.getvalue().encode("utf-8"))
    return path


def mmlu_folder(folder: Path, subjects: Sequence[str] = ("anatomy", "virology", "philosophy"), count: int = 7) -> Path:
    for subject in subjects:
        write_csv(folder / "test" / f"{subject}_test.csv", mmlu_rows(subject, count))
        write_csv(folder / "val" / f"{subject}_val.csv", mmlu_rows(subject + " val", 2))
        write_csv(folder / "dev" / f"{subject}_dev.csv", mmlu_rows(subject + " dev", 5))
    return folder


def ceval_folder(folder: Path, subjects: Sequence[str] = ("law", "logic"), count: int = 4) -> Path:
    for subject in subjects:
        rows = [[str(i), f"{subject}问题{i}", "甲", "乙", "丙", f"丁{i}", "ABCD"[i % 4]] for i in range(max(count, 5))]
        write_csv(folder / "val" / f"{subject}_val.csv", [HEADER[:7], *rows[:count]])
        write_csv(folder / "dev" / f"{subject}_dev.csv", [HEADER, *([*row, "因为，\n所以"] for row in rows[:5])])
        write_csv(folder / "test" / f"{subject}_test.csv", [HEADER[:6], *(row[:6] for row in rows)])
    return folder


def load(where: Path | str, name: str = "mmlu", **options: Any) -> Benchmark:
    return load_benchmark(name, str(where), **{"count": 0, "seed": 0, **options})


def read(where: Path | str, split: str, name: str = "mmlu", subjects: Sequence[str] = ()) -> dict[str, list[Question]]:
    return read_questions(TAXONOMIES[name], str(where), split, subjects)
