"""Methods x epsilons x seeds under one accountant: tuned alike, run in parallel, resumable cell by cell. No torch here.

A *track* is one method at one epsilon. It first spends `compare.tuning_runs` runs on the tuning seed to choose its
learning rate by held-out loss, then runs every seed with that rate. A *cell* is one such run; its folder is a run folder
plus `cell.json`, which is written last, so that a comparison that was killed goes on with the cells that lack it.

The clients' budgets of all cells add up: compare on text that is public or made for it, and let the one chosen method
run on private text.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from drencoder.encoders.planning import check_encoder
from drencoder.errors import ArtifactError, DataError, DeviceError, DrencoderError, LostError, RecipeError
from drencoder.recipe.recipe import Compare, Recipe, load_recipe
from drencoder.runs.run_folder import RunFolder, storing
from drencoder.study.methods import CENTRALISED, METHODS, method_named, start_rates

__all__ = ["Cell", "Track", "Watcher", "compare", "tracks_of"]

_STUDY = "study.toml"


@dataclass(frozen=True)
class Track:
    """One method at one epsilon; None for a method without a budget."""

    method: str
    epsilon: float | None

    def __str__(self) -> str:
        return self.method if self.epsilon is None else f"{self.method} at epsilon {self.epsilon:g}"


@dataclass(frozen=True)
class Cell:
    """One run: a track, a seed, and a learning rate as `factor ** step` times the method's first guess."""

    track: Track
    seed: int
    step: float

    @property
    def folder(self) -> Path:
        """Where it lies inside the comparison's folder."""
        epsilon = "no-budget" if self.track.epsilon is None else f"epsilon-{self.track.epsilon:g}"
        return Path("cells") / self.track.method / epsilon / f"seed-{self.seed}" / f"rate-{self.step:+g}"


Results = Mapping[Cell, Mapping[str, Any]]


class Watcher(Protocol):
    """Is told how far a comparison is."""

    def started(self, tracks: Sequence[Track], seeds: int, tuning_runs: int) -> None: ...
    def cell_done(self, cell: Cell, result: Mapping[str, Any]) -> None: ...


def tracks_of(wanted: Compare) -> list[Track]:
    """Every method once, or once per epsilon if it is private.

    Raises:
      RecipeError: a method is unknown or named twice, a seed is judged on that was tuned on, or nothing is left to run.
    """
    tracks = []
    for name in wanted.methods:
        budgets: Sequence[float | None] = wanted.epsilons if method_named(name).private else (None,)
        tracks += [Track(name, epsilon) for epsilon in budgets]
    if not tracks or not wanted.seeds:
        raise RecipeError(
            "compare.methods, compare.epsilons and compare.seeds leave nothing to run: name at least one."
        )
    if wanted.tuning_seed in wanted.seeds:
        raise RecipeError(
            f"compare.tuning_seed = {wanted.tuning_seed} is one of compare.seeds too: what was tuned on a seed cannot be "
            "judged on it, so give another."
        )
    for knob in ("methods", "epsilons", "seeds"):
        values = getattr(wanted, knob)
        if repeated := [value for value in values if values.count(value) > 1]:
            raise RecipeError(f"compare.{knob} names {repeated[0]!r} twice: name each once.")
    return tracks


def next_cells(track: Track, wanted: Compare, results: Results) -> list[Cell]:
    """The cells that a track needs next, given what is known; empty when it is done.

    Tuning climbs: the first guess and its two neighbours, then beyond whichever end is the best so far, and once the
    best lies inside, half steps around it. Every method may try `tuning_runs` rates and no more.
    """
    tried = {cell.step: _tuning_loss(result) for cell, result in results.items() if _is_tuning(cell, track, wanted)}
    if len(tried) < wanted.tuning_runs:
        opening = [step for step in (0.0, -1.0, 1.0)[: wanted.tuning_runs] if step not in tried]
        steps = opening or [_next_step(tried)]
        return [Cell(track, wanted.tuning_seed, step) for step in steps]
    best = best_step(track, wanted, results)
    cells = [Cell(track, seed, best) for seed in wanted.seeds]
    return [cell for cell in cells if cell not in results]


def best_step(track: Track, wanted: Compare, results: Results) -> float:
    """The tuned learning rate's step: the lowest held-out loss on the tuning seed (ties: the smaller rate)."""
    tried = {cell.step: _tuning_loss(result) for cell, result in results.items() if _is_tuning(cell, track, wanted)}
    return min(sorted(tried), key=lambda step: tried[step])


def _is_tuning(cell: Cell, track: Track, wanted: Compare) -> bool:
    return cell.track == track and cell.seed == wanted.tuning_seed


def _tuning_loss(result: Mapping[str, Any]) -> float:
    """A failed or diverged run is the worst of all."""
    loss = result.get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _next_step(tried: Mapping[float, float]) -> float:
    ordered = sorted(tried)
    best = min(ordered, key=lambda step: tried[step])
    if best == ordered[0]:
        return best - 1
    if best == ordered[-1]:
        return best + 1
    place = ordered.index(best)
    below, above = ordered[place - 1], ordered[place + 1]
    better = below if tried[below] < tried[above] else above
    return (best + better) / 2


# --- running ---------------------------------------------------------------------------------------


def compare(
    recipe: Recipe, folder: Path, watcher: Watcher, *, processes: int = 0
) -> tuple[dict[Cell, dict[str, Any]], list[Track]]:
    """Runs (or goes on with) the comparison of `recipe.compare` in `folder`; results by cell, and the tracks.

    Args:
      processes: cells that run at a time, one thread each; 0 = one per core.

    Raises:
      RecipeError: the comparison cannot be meant.
      ArtifactError: the folder holds a comparison of another recipe, or something else.
    """
    wanted = recipe.compare
    tracks = tracks_of(wanted)
    start_rates(recipe)
    for track in tracks:  # refuse a combination that cannot be before the first run, not after hours
        check_encoder(_recipe_of(Cell(track, wanted.tuning_seed, 0.0), recipe))
    lock = _claim(recipe, folder)
    results: dict[Cell, dict[str, Any]] = {}
    watcher.started(tracks, len(wanted.seeds), wanted.tuning_runs)
    pool = ProcessPoolExecutor(
        processes or os.cpu_count() or 1, mp_context=get_context("spawn"), initializer=_start_worker
    )
    pending: dict[Future[dict[str, Any]], Cell] = {}
    try:
        while True:
            for cell in _wanted(tracks, wanted, results, set(pending.values())):
                known = _stored(folder / cell.folder)
                if known is None:
                    pending[pool.submit(run_cell, cell, recipe, folder / cell.folder)] = cell
                else:
                    results[cell] = known
                    watcher.cell_done(cell, known)
            if any(_wanted(tracks, wanted, results, set(pending.values()))):
                continue  # stored results opened the way to more cells
            if not pending:
                return results, tracks
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                cell = pending.pop(future)
                results[cell] = future.result()
                watcher.cell_done(cell, results[cell])
    except BrokenProcessPool:
        raise ArtifactError(
            f"a worker process died (out of memory?): free some, or give fewer --processes. Finished cells are in {folder}; "
            "start the same command again to go on."
        ) from None
    except BaseException:
        _stop(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(lock)


def _wanted(tracks: Sequence[Track], wanted: Compare, results: Results, running: set[Cell]) -> Iterator[Cell]:
    for track in tracks:
        for cell in next_cells(track, wanted, results):
            if cell not in running and cell not in results:
                yield cell


def _stop(pool: ProcessPoolExecutor) -> None:
    """Workers die at once: what they did not finish is done again or resumed next time."""
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: cells in parallel, one thread each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers


def _claim(recipe: Recipe, folder: Path) -> int:
    """Writes the whole recipe into a new folder, or checks that the cells of an old one are this comparison's.

    More methods, epsilons, seeds or tuning runs may be asked of an old folder: its cells stay what they are. Returns the
    descriptor whose lock keeps a second process out until it is closed.
    """
    store, path = RunFolder(folder), folder / _STUDY
    if not path.is_file():
        RunFolder.check_free(folder)
    elif _what_cells_depend_on(load_recipe(path)) != _what_cells_depend_on(recipe):
        raise ArtifactError(
            f"{folder} holds a comparison of another recipe ({path.name} differs): give another --out, or remove it."
        )
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ArtifactError(f"{folder} is being filled by another process: wait for it, or stop it.") from None
    store.write(path, recipe.to_toml().encode())
    return lock


def _what_cells_depend_on(recipe: Recipe) -> Recipe:
    free = ("methods", "epsilons", "seeds", "tuning_seed", "tuning_runs")
    return replace(recipe, compare=replace(recipe.compare, **{name: getattr(Compare(), name) for name in free}))


def _stored(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "cell.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _recipe_of(cell: Cell, recipe: Recipe) -> Recipe:
    multiplier = recipe.compare.tuning_factor**cell.step
    method = METHODS[cell.track.method]
    return method.recipe(recipe, epsilon=cell.track.epsilon, seed=cell.seed, multiplier=multiplier)


def run_cell(cell: Cell, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """One cell, in a worker process.

    A run that cannot be, or that diverges, is a result too: `error` holds its sentence. What may be otherwise tomorrow
    (data, disk, device) is raised and stored nowhere.
    """
    wanted = _recipe_of(cell, recipe)
    started = time.monotonic()
    try:
        train = _centralised if cell.track.method == CENTRALISED else _federated
        result = train(wanted, folder)
    except (DataError, ArtifactError, DeviceError):
        raise
    except DrencoderError as error:
        result = {"error": str(error)}
    result["seconds"] = time.monotonic() - started
    target = RunFolder(folder)
    target.write(folder / "cell.json", json.dumps(result).encode())
    return result


def _federated(recipe: Recipe, folder: Path) -> dict[str, Any]:
    from drencoder.runs import run as experiment  # torch is loaded in the worker, after its thread count is set

    if not RunFolder(folder).ledger.exists():  # nothing was charged: what a killed start left is worth nothing
        shutil.rmtree(folder, ignore_errors=True)
        certificate = experiment.run(recipe, folder).certificate
    else:
        try:
            certificate = experiment.resume(folder).certificate
        except LostError:  # killed with FedCG's gradients in memory: its ledger is kept, and the cell done anew
            folder.rename(_beside(folder))
            certificate = experiment.run(recipe, folder).certificate
    encoder, sent = certificate["encoder"], certificate["bytes"]
    return {
        **_scores(certificate["results"]),
        "cosine": encoder.get("gate_public_cosine"),
        "captured_energy": encoder.get("gate_public_captured_energy"),
        "bytes_stage1": sent["stage1"],
        "bytes_stage2": sent["uploaded"] - sent["stage1"],
        "epsilon": {name: row["epsilon_pld"] for name, row in certificate["observers"].items()},
        "private": certificate["private"],
    }


def _beside(folder: Path) -> Path:
    """A free name for a run that was lost."""
    return next(path for number in count(1) if not (path := folder.with_name(f"{folder.name}.lost-{number}")).exists())


def _centralised(recipe: Recipe, folder: Path) -> dict[str, Any]:
    from drencoder.evaluation.outcomes import measure_all
    from drencoder.runs.build import build
    from drencoder.study.baselines import train_centralised

    live = build(recipe)
    outcomes = measure_all(live.lora, train_centralised(live), live.held_out, live.questions)
    stored = {name: outcome.to_dict() for name, outcome in outcomes.items()}
    RunFolder(folder).write_json(folder / "outcomes.json", stored)
    nobody = dict.fromkeys(("server", "clients", "public"), "inf")
    return {
        **_scores({name: outcome.estimates() for name, outcome in outcomes.items()}),
        "cosine": None, "captured_energy": None, "bytes_stage1": 0, "bytes_stage2": 0, "epsilon": nobody,
        "private": False,
    }  # fmt: skip


def _scores(results: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and accuracies of this run, and of the base model and the zero update beside it."""

    def of(name: str) -> dict[str, Any]:
        row = results[name]
        return {
            "loss": row["loss"]["value"],
            "accuracy": {key: estimate["value"] for key, estimate in row["accuracy"].items()},
        }

    return {**of("this run"), "base": of("base model"), "zero": of("zero update")}
