"""MMLU and C-Eval, from one loader: the embedded world, a folder of the original CSV files, or the hub."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from drencoder.data.benchmarks.files import AUXILIARY, read_questions, same_split
from drencoder.data.benchmarks.taxonomy import TAXONOMIES, Taxonomy
from drencoder.data.embedded_world.subjects import all_subjects
from drencoder.data.embedded_world.world import Question, World
from drencoder.errors import DataError
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

__all__ = ["DEFAULT_SPLIT", "MAX_SHOTS", "Benchmark", "load_benchmark", "load_benchmarks"]

MAX_SHOTS = 5
"""Worked examples of a subject: the public dev splits have five."""

DEFAULT_SPLIT = {"mmlu": "test", "ceval": "val"}
"""The split whose answers are public and that is reported."""

_EXAMPLE_SPLIT = "dev"


@final
@dataclass(frozen=True)
class Benchmark:
    """Questions to ask, subjects taking turns so that any beginning of them covers all subjects evenly.

    `examples` holds `shots` worked examples of every subject, none of them among the questions.
    """

    name: str
    questions: tuple[Question, ...]
    examples: Mapping[str, tuple[Question, ...]]
    shots: int
    provenance: str

    @property
    def answers(self) -> list[int]:
        """Index, 0 to 3, of each question's right option."""
        return [question.answer for question in self.questions]

    @property
    def subjects(self) -> list[str]:
        """Each question's subject."""
        return [question.subject for question in self.questions]


def load_benchmark(
    name: str, where: str, *, split: str = "", subjects: Sequence[str] = (), shots: int = 0, count: int, seed: int
) -> Benchmark:
    """Loads `count` questions of one benchmark and the worked examples of their subjects.

    Args:
      name: "mmlu" (English) or "ceval" (Chinese).
      where: "embedded", a folder of the original CSV files, or "hub:" and a data set's name or folder.
      split: empty = `DEFAULT_SPLIT`; the embedded world has one split only.
      subjects: only these; empty = all.
      shots: worked examples per subject, 0 to 5: the first of the split `dev`, in order.
      count: at most so many questions, drawn by `seed` and spread evenly over the subjects; 0 = all there are.
      seed: the run's.

    Raises:
      DataError: anything is missing, unreadable or impossible; the message names file and line.
    """
    if name not in TAXONOMIES:
        raise DataError(f"benchmark {name!r} is not known: choose one of {', '.join(TAXONOMIES)}.")
    if not 0 <= shots <= MAX_SHOTS or count < 0:
        raise DataError(f"shots = {shots} and count = {count}: shots are 0 to {MAX_SHOTS}, count is at least 0.")
    taxonomy = TAXONOMIES[name]
    draw = derive_seed(seed, "benchmark")
    if where == "embedded":
        return _embedded(taxonomy, subjects=subjects, shots=shots, count=count, draw=draw)
    split = split or DEFAULT_SPLIT[name]
    if shots and split == _EXAMPLE_SPLIT:
        raise DataError(
            f"{where}: worked examples come from dev, and so would the questions: set shots = 0 or a split."
        )
    if split == AUXILIARY:
        raise DataError(
            f"{where}: split {split!r} is text to train on, of no subject: set evaluation.split to another."
        )
    found = read_questions(taxonomy, where, split, subjects)
    examples = {}
    if shots:
        examples = _examples(read_questions(taxonomy, where, _EXAMPLE_SPLIT, list(found)), shots, where)
    questions = tuple(_in_turn(found, count, draw))
    return Benchmark(name, questions, examples, shots, f"{where}, split {split}")


def load_benchmarks(
    wanted: config.Evaluation, data: config.Data, *, seed: int, count: int | None = None
) -> dict[str, Benchmark]:
    """Every benchmark that a recipe evaluates on; `evaluation.subjects` may name subjects of several of them.

    `count` questions of each, 0 = all, None = as many as the recipe says.

    Raises:
      DataError: as `load_benchmark`, or clients own the very questions or worked examples that would be asked.
    """
    count = wanted.questions if count is None else count
    drawn = {}
    for name in wanted.benchmarks:
        where = getattr(wanted, name)
        _check_apart(name, where, wanted, data)
        mine = _subjects_of(name, wanted)
        drawn[name] = load_benchmark(
            name, where, split=wanted.split, subjects=mine, shots=wanted.shots, count=count, seed=seed
        )
    return drawn


def _known(name: str, where: str) -> tuple[str, ...]:
    if where != "embedded":
        return TAXONOMIES[name].subjects
    return tuple(s.name for s in all_subjects() if s.kept and s.language == TAXONOMIES[name].language)


def _subjects_of(name: str, wanted: config.Evaluation) -> tuple[str, ...]:
    """The asked-for subjects without those that only another of the benchmarks knows."""
    others = {
        subject for other in wanted.benchmarks if other != name for subject in _known(other, getattr(wanted, other))
    } - set(_known(name, getattr(wanted, name)))
    mine = tuple(subject for subject in wanted.subjects if subject not in others)
    if wanted.subjects and not mine:
        raise DataError(
            f"evaluation.subjects = {', '.join(wanted.subjects)} has none of {name}: add one, or take {name} out of "
            "evaluation.benchmarks."
        )
    return mine


def _check_apart(name: str, where: str, wanted: config.Evaluation, data: config.Data) -> None:
    kind, _, owned = data.source.partition(":")
    if where == "embedded" or kind != name or _place(owned) != _place(where):
        return
    asked = [wanted.split or DEFAULT_SPLIT[name], *([_EXAMPLE_SPLIT] if wanted.shots else [])]
    if any(same_split(data.split, split) for split in asked):
        raise DataError(
            f"clients would be trained on split {data.split!r} of {where}, which {name} is also evaluated with: set "
            "another data.split or evaluation.split (worked examples come from dev)."
        )


def _place(where: str) -> str:
    """One spelling for one place: a folder's full path, or the hub's name in small letters."""
    prefix, name = ("hub:", where.removeprefix("hub:")) if where.startswith("hub:") else ("", where)
    path = Path(name)
    return str(path.resolve()) if path.exists() else prefix + name.strip("/").lower()


def _embedded(taxonomy: Taxonomy, *, subjects: Sequence[str], shots: int, count: int, draw: int) -> Benchmark:
    """Made on demand from the generated world, where questions never end: `count` must say how many."""
    if count == 0:
        raise DataError(f"the embedded {taxonomy.name} is made on demand and has no end: say how many questions.")
    for subject in subjects:
        taxonomy.check_subject(subject, "evaluation.subjects", _known(taxonomy.name, "embedded"))
    world = World()
    questions = tuple(world.benchmark(taxonomy.name, count=count, seed=draw, subjects=subjects))
    examples = {}
    if shots:
        examples = {name: _embedded_examples(world, name, shots) for name in {q.subject for q in questions}}
    return Benchmark(taxonomy.name, questions, examples, shots, "embedded world, generated by drencoder")


def _embedded_examples(world: World, name: str, shots: int) -> tuple[Question, ...]:
    """The first of a fixed series, as a dev split is: held-out instances, which no benchmark and no client has."""
    (subject,) = (subject for subject in all_subjects() if subject.name == name)
    rng = random.Random(f"examples/{name}")
    series: dict[tuple[str, frozenset[str]], Question] = {}  # reordered options make no new example
    while len(series) < shots:
        question = world.question(subject, rng, part="held-out")
        series.setdefault((question.question, frozenset(question.choices)), question)
    return tuple(series.values())


def _examples(found: Mapping[str, Sequence[Question]], shots: int, where: str) -> dict[str, tuple[Question, ...]]:
    for subject, questions in found.items():
        if len(questions) < shots:
            raise DataError(
                f"{where}: split dev has {len(questions)} questions of {subject!r}, fewer than shots = {shots}: lower it."
            )
    return {subject: tuple(questions[:shots]) for subject, questions in found.items()}


def _in_turn(found: Mapping[str, Sequence[Question]], count: int, draw: int) -> list[Question]:
    """One question of each subject after the other, in an order drawn by the seed, until `count` are taken."""
    chance = random.Random(draw)
    piles = []
    for subject in sorted(found):
        pile = list(found[subject])
        chance.shuffle(pile)
        piles.append(pile)
    chance.shuffle(piles)
    turns = max(len(pile) for pile in piles)
    taken = [pile[turn] for turn in range(turns) for pile in piles if turn < len(pile)]
    return taken[:count] if count else taken
