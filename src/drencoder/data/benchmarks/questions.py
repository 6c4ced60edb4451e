"""MMLU and C-Eval, from one loader: the embedded world, a folder of the original CSV files, or the hub."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from drencoder.data.benchmarks.files import read_questions, same_split
from drencoder.data.benchmarks.taxonomy import TAXONOMIES, Taxonomy
from drencoder.data.embedded_world.world import Question, World
from drencoder.data.places import Place
from drencoder.errors import DataError
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe
from drencoder.rng import derive_seed

DEFAULT_SPLIT = {"mmlu": "test", "ceval": "val"}
"""The split whose answers are public and that is reported."""

EXAMPLE_SPLIT = "dev"
"""The split that worked examples come from, five a subject."""


@final
@dataclass(frozen=True)
class Benchmark:
    """Questions to ask, subjects taking turns so that any beginning of them covers all subjects evenly."""

    name: str
    questions: tuple[Question, ...]

    @property
    def answers(self) -> list[int]:
        """Index, 0 to 3, of each question's right option."""
        return [question.answer for question in self.questions]

    @property
    def subjects(self) -> list[str]:
        """Each question's subject."""
        return [question.subject for question in self.questions]


def load_benchmark(name: str, where: str, *, count: int, seed: int) -> Benchmark:
    """Loads `count` questions of one benchmark's `DEFAULT_SPLIT`.

    Args:
      name: "mmlu" (English) or "ceval" (Chinese).
      where: "embedded", a folder of the original CSV files, or "hub:" and a data set's name or folder.
      count: at most so many questions, drawn by `seed` and spread evenly over the subjects; 0 = all there are.
      seed: the run's.

    Raises:
      DataError: anything is missing, unreadable or impossible; the message names file and line.
    """
    if name not in TAXONOMIES:
        raise DataError(f"benchmark {name!r} is not known: choose one of {', '.join(TAXONOMIES)}.")
    taxonomy = TAXONOMIES[name]
    draw = derive_seed(seed, "benchmark")
    if where == "embedded":
        return _embedded(taxonomy, count=count, draw=draw)
    by_subject = read_questions(taxonomy, where, DEFAULT_SPLIT[name], ())
    return Benchmark(name, tuple(_in_turn(by_subject, count, draw)))


def load_benchmarks(recipe: Recipe) -> dict[str, Benchmark]:
    """Every benchmark that a recipe's quick evaluation asks.

    Raises:
      DataError: as `load_benchmark`, or clients own the very questions that would be asked.
    """
    drawn = {}
    for name, where in recipe.benchmarks.items():
        check_apart(name, where, [DEFAULT_SPLIT[name]], recipe.data)
        drawn[name] = load_benchmark(name, where, count=recipe.evaluation.examples, seed=recipe.seed)
    return drawn


def check_apart(name: str, where: str, splits: Sequence[str], data: config.Data) -> None:
    """Raises DataError if the clients' text is one of the `splits` of `where` that the model is to be asked."""
    owned = Place.parse(data.source)
    if where == "embedded" or not owned.is_same(Place(name, where, "")):
        return
    if any(same_split(owned.clients_split, split) for split in splits):
        raise DataError(
            f"clients are trained on split {owned.clients_split!r} of {where}, which {name} is also evaluated with: name another one "
            "in data.source (questions come from the test split of mmlu and from val of ceval, worked examples from dev)."
        )


def _embedded(taxonomy: Taxonomy, *, count: int, draw: int) -> Benchmark:
    """Made on demand from the generated world, where questions never end: `count` must say how many."""
    if count == 0:
        raise DataError(f"the embedded {taxonomy.name} is made on demand and has no end: say how many questions.")
    return Benchmark(taxonomy.name, tuple(World().benchmark(taxonomy.name, count=count, seed=draw)))


def _in_turn(by_subject: Mapping[str, Sequence[Question]], count: int, draw: int) -> list[Question]:
    """One question of each subject after the other, in an order drawn by the seed, until `count` are taken."""
    chance = random.Random(draw)
    piles = []
    for subject in sorted(by_subject):
        pile = list(by_subject[subject])
        chance.shuffle(pile)
        piles.append(pile)
    chance.shuffle(piles)
    turns = max(len(pile) for pile in piles)
    taken = [pile[turn] for turn in range(turns) for pile in piles if turn < len(pile)]
    return taken[:count] if count else taken
