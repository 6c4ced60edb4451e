"""`drencoder compare`: methods x epsilons x seeds under one accountant, tuned alike, resumable cell by cell. No torch.

Every method first spends `compare.tuning_runs` runs per epsilon on the tuning seed to choose its learning rate by held-out loss, then
runs every seed with that rate. The run folder of every cell is kept.

The clients' budgets of all cells add up: compare on text that is public or made for it, and let the one chosen method run on private
text.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from drencoder.data.evaluation_text import NO_EVALUATION, evaluation_basis
from drencoder.encoders.planning import check_encoder
from drencoder.encoders.unused_knobs import unused_knobs
from drencoder.errors import RecipeError
from drencoder.recipe.recipe import Recipe
from drencoder.runs.named_text import check_text
from drencoder.study.cell_run import centralised, federated
from drencoder.study.cells import Cell, CellStore, Row, Track
from drencoder.study.methods import CENTRALISED, METHODS, method_named, start_rates
from drencoder.study.pool import CellWatcher, run_study
from drencoder.study.settings import Compare
from drencoder.study.tuning import TuningPlan


class Watcher(CellWatcher, Protocol):
    """Is told how far a comparison is."""

    def started(self, tracks: Sequence[Track], seeds: int, tuning_runs: int) -> None: ...


def tracks_of(settings: Compare) -> list[Track]:
    """Every method once, or once per epsilon if it is private.

    Raises:
      RecipeError: a method is unknown or named twice, a seed is judged on that was tuned on, or nothing is left to run.
    """
    tracks = []
    for name in settings.methods:
        budgets: Sequence[float | None] = settings.epsilons if method_named(name).private else (None,)
        tracks += [Track(name, epsilon) for epsilon in budgets]
    if not tracks or not settings.seeds:
        raise RecipeError(
            "compare.methods, compare.epsilons and compare.seeds leave nothing to run: name at least one."
        )
    if settings.tuning_seed in settings.seeds:
        raise RecipeError(
            f"compare.tuning_seed = {settings.tuning_seed} is one of compare.seeds too: what was tuned on a seed cannot be "
            "judged on it, so give another."
        )
    for knob in ("methods", "epsilons", "seeds"):
        values = getattr(settings, knob)
        if repeated := [value for value in values if values.count(value) > 1]:
            raise RecipeError(f"compare.{knob} names {repeated[0]!r} twice: name each once.")
    return tracks


def tuning_plan(settings: Compare) -> TuningPlan:
    """Every method may try `tuning_runs` learning rates and no more; of rates with the same loss the smaller one is taken."""
    runs = settings.tuning_runs
    return TuningPlan(settings.seeds, (settings.tuning_seed,), runs, runs, settings.tuning_factor)


def cell_folder(folder: Path, cell: Cell) -> Path:
    """The run folder of a cell inside the comparison's folder."""
    return folder / "cells" / cell.key


def compare(
    recipe: Recipe, settings: Compare, folder: Path, watcher: Watcher, *, processes: int = 0
) -> tuple[dict[Cell, Row], list[Track]]:
    """Runs a comparison in `folder`, or goes on with it; rows by cell, and the tracks.

    More methods, epsilons, seeds or tuning runs may be asked of an old folder: its cells stay what they are.

    Args:
      processes: cells that run at a time, one thread each; 0 = one per core.

    Raises:
      RecipeError: the comparison cannot be meant.
      ArtifactError: the folder holds a comparison of another recipe, or something else.
    """
    if evaluation_basis(recipe) == "nothing":
        raise RecipeError(f"a comparison chooses learning rates and judges methods by held-out loss. {NO_EVALUATION}")
    tracks, plan, rates = tracks_of(settings), tuning_plan(settings), start_rates(settings.rates)
    for track in tracks:  # refuse a combination that cannot be before the first run, not after hours
        check_encoder(recipe_of(Cell(track, settings.tuning_seed, 0.0), recipe, plan, rates))
    depends_on = {"recipe": recipe.to_dict(), "rates": rates, "tuning_factor": settings.tuning_factor}
    check_text(recipe)
    with CellStore(folder, depends_on) as store:
        watcher.started(tracks, len(settings.seeds), settings.tuning_runs)
        work = partial(run_method, recipe=recipe, plan=plan, rates=rates, folder=folder)
        outcome = run_study(tracks, dict.fromkeys(tracks, plan), store, work, watcher, processes=processes)
    for error in outcome.given_up.values():
        raise error  # a bug of ours; the other methods are finished and stored by now
    return outcome.results, tracks


def knobs_of_no_method(recipe: Recipe, settings: Compare) -> list[str]:
    """Sentences on the knobs that the recipe sets and no method of the comparison uses. Raises RecipeError as `compare` does."""
    plan, rates, found = tuning_plan(settings), start_rates(settings.rates), unused_knobs(recipe)
    for track in tracks_of(settings):
        cell = Cell(track, settings.tuning_seed, 0.0)
        unused = unused_knobs(recipe_of(cell, recipe, plan, rates))
        used = {"local.learning_rate"} if track.method == CENTRALISED else set()
        found = {key: sentence for key, sentence in found.items() if key in unused and key not in used}
    return list(found.values())


def recipe_of(cell: Cell, recipe: Recipe, plan: TuningPlan, rates: dict[str, float]) -> Recipe:
    """The recipe of one cell.

    Raises:
      RecipeError: the method and the recipe do not fit together.
    """
    method = METHODS[cell.track.method]
    rate = plan.rate(method.first_rate(recipe, rates), cell)
    return method.recipe(recipe, epsilon=cell.track.epsilon, seed=cell.seed, rate=rate)


def run_method(
    cell: Cell, *, recipe: Recipe, plan: TuningPlan, rates: dict[str, float], folder: Path
) -> dict[str, Any]:
    """Runs one cell in its run folder, in a worker process; its row."""
    run = centralised if cell.track.method == CENTRALISED else federated
    return run(recipe_of(cell, recipe, plan, rates), cell_folder(folder, cell))
