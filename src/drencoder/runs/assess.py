"""How good is a finished run, or any model: benchmark scores by lm-eval, the adapter in pairs with its base.

Without tasks, a run's own quick evaluation is read from its folder: the same pairs, and no model is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from drencoder.data.benchmarks.questions import DEFAULT_SPLIT, EXAMPLE_SPLIT, check_apart
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.evaluation_text import NO_EVALUATION
from drencoder.errors import ArtifactError, DataError
from drencoder.evaluation.lm_eval_runner import ItemLog, ask_tasks
from drencoder.evaluation.lm_eval_tasks import LoadedBenchmark, load_tasks, unify_names
from drencoder.evaluation.statistics import (
    Assessment,
    BenchmarkAssessment,
    LossAssessment,
    assess_rows,
    loss_difference,
    ratio_of_sums,
)
from drencoder.models.base_model import load_base, resolve_device
from drencoder.models.sharded import open_lora
from drencoder.reading import parse_json, read_bytes
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.rng import derive_seed
from drencoder.runs.run_folder import RunFolder

Progress = Callable[[str, int, int], None]
"""(what is asked, requests answered, requests in all)."""


def assess(
    target: Path | str,
    *,
    tasks: Sequence[str] = (),
    places: Mapping[str, str] | None = None,
    subjects: Sequence[str] = (),
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    device: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Assessment:
    """Scores a base model and, for a run, its adapter on the same questions.

    Args:
      target: a run folder (`recipe.resolved.toml` and `adapter/`), else a model: "embedded", a folder or a hub id.
      tasks: of lm-eval; none = what the run's own quick evaluation left in `outcomes.json`.
      places: task -> folder of its data; for mmlu and ceval, a folder that the run's recipe names is taken if none is given.
      subjects: of mmlu and ceval; empty = all.
      shots: worked examples; None = as the task says.
      limit: questions of each subject, the first ones; None = all.
      batch: requests of one forward pass.
      device: "auto", "cpu" or "cuda"; None = as the run's recipe says, auto for a model.

    Raises:
      DrencoderError: the target, lm-eval or the data of a task cannot be had, or an option cannot be meant.
    """
    for name, value, least in (("--shots", shots, 0), ("--limit", limit, 1), ("--batch", batch, 1)):
        if value is not None and value < least:
            raise DataError(f"{name} {value} is too few: give at least {least}.")
    folder = RunFolder(Path(target))
    is_run = folder.recipe.is_file()
    if not tasks:
        if not is_run:
            raise DataError(
                f"{str(target)!r} is not a run folder, so there is nothing to read: name --tasks, say mmlu."
            )
        if places or subjects or shots is not None or limit is not None:
            raise DataError("--from, --subjects, --shots and --limit belong to --tasks: give it too.")
        return _assess_outcomes(folder)
    recipe = load_recipe(folder.recipe) if is_run else Recipe(model=config.Model(source=str(target)))
    if device is not None:
        recipe = replace(recipe, model=replace(recipe.model, device=device))
    resolve_device(recipe.model.device)
    adapter = read_adapter(folder) if is_run else None
    names = unify_names(tasks)
    where = {
        **_places_of(recipe, names),
        **dict(zip(unify_names(list(places or {})), (places or {}).values(), strict=True)),
    }
    for name in set(where) & set(TAXONOMIES):
        check_apart(name, where[name], [DEFAULT_SPLIT[name], *([EXAMPLE_SPLIT] if shots else [])], recipe.data)
    benchmarks = load_tasks(names, where, subjects=subjects, shots=shots)
    logs = _ask_models(benchmarks, recipe, adapter, limit=limit, batch=batch, on_progress=on_progress)
    scored = {benchmark.name: _compare(benchmark, *logs[benchmark.name], seed=recipe.seed) for benchmark in benchmarks}
    return Assessment(recipe.model.source, str(target) if is_run else None, scored)


def _places_of(recipe: Recipe, names: Sequence[str]) -> dict[str, str]:
    """The folders that a recipe's quick evaluation asks from, of the benchmarks that are asked now."""
    return {
        name: place
        for name, place in recipe.benchmarks.items()
        if name in names and place != "embedded" and not place.startswith("hub:")
    }


def read_adapter(folder: RunFolder) -> Mapping[str, Tensor]:
    """The tensors of a run's adapter. Raises ArtifactError if it has none yet, or if the file cannot be read."""
    path = folder.adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtifactError(
            f"{folder.path} has no adapter yet: finish the run with drencoder run --resume {folder.path}."
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an error type of its own, not an OSError
        raise ArtifactError(f"{path} cannot be read ({error}): it was cut or changed; restore it.") from None


def _ask_models(
    benchmarks: Sequence[LoadedBenchmark],
    recipe: Recipe,
    adapter: Mapping[str, Tensor] | None,
    *,
    limit: int | None,
    batch: int,
    on_progress: Progress,
) -> dict[str, list[ItemLog]]:
    """Benchmark -> what the base model answered and, if there is an adapter, what it answered with it."""
    base = load_base(recipe.model)

    def ask(benchmark: LoadedBenchmark, model: str) -> ItemLog:
        def report(done: int, total: int) -> None:
            on_progress(f"{benchmark.name}, {model}", done, total)

        return ask_tasks(benchmark, base, limit=limit, batch=batch, on_progress=report)

    if adapter is None:
        return {benchmark.name: [ask(benchmark, "base model")] for benchmark in benchmarks}
    lora = open_lora(base, recipe)
    adapter_D = lora.layout.flatten(adapter).to(lora.device)  # a wrong shape is told before anything is asked
    logs = {}
    for benchmark in benchmarks:
        logs[benchmark.name] = [ask(benchmark, "base model")]
        with lora.peft(adapter_D):
            logs[benchmark.name].append(ask(benchmark, "adapter"))
    return logs


def _compare(
    benchmark: LoadedBenchmark, base: ItemLog, adapter: ItemLog | None = None, *, seed: int
) -> BenchmarkAssessment:
    return BenchmarkAssessment(
        benchmark.name,
        benchmark.provenance,
        f"asked by lm-eval, {benchmark.shots} worked examples",
        base.metric,
        base.shortened,
        assess_rows(
            TAXONOMIES.get(benchmark.name),
            base.subjects,
            base.right,
            adapter.right if adapter else None,
            seed=derive_seed(seed, f"bootstrap {benchmark.name}"),
        ),
        {"base": base.aggregates, **({"adapter": adapter.aggregates} if adapter else {})},
        benchmark.task,
    )


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether these are numbers of a text's size or of an answer, at least one."""
    return len(values) > 0 and all(type(value) in (int, float) and 0 <= value < 1e12 for value in values)


def _assess_outcomes(folder: RunFolder) -> Assessment:
    """The pairs of a finished run's quick evaluation; every question weighs the same, as in the run's own table."""
    if not folder.outcomes.is_file():
        raise ArtifactError(
            f"{folder.path} has no outcomes yet: finish the run with drencoder run --resume {folder.path}."
        )
    recipe = load_recipe(folder.recipe)
    try:
        outcomes: Mapping[str, Any] = parse_json(read_bytes(folder.outcomes))
        base, run = outcomes["base model"], outcomes["this run"]
        losses, targets, right = (base["losses"], run["losses"]), base["targets"], (base["right"], run["right"])
        pairs = {name: (right[0][name], right[1][name]) for name in right[0]}
        # A run without evaluation data has no text, but no benchmark has no question.
        texts = [*losses, targets] if any((*losses, targets)) else []
        numbers = [*texts, *(hits for pair in pairs.values() for hits in pair)]
        if {len(some) for some in (*losses, targets)} != {len(targets)} or not all(map(_are_numbers, numbers)):
            raise ValueError
        if not all(type(one) is int and one > 0 for one in targets) or any(
            len(before) != len(after) for before, after in pairs.values()
        ):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder.outcomes} cannot be read ({type(error).__name__}): it was cut or changed."
        ) from None
    scored = {}
    for name, (before, after) in pairs.items():
        rows = assess_rows(
            None, [name] * len(before), before, after, seed=derive_seed(recipe.seed, f"bootstrap {name}")
        )
        scored[name] = BenchmarkAssessment(
            name,
            recipe.benchmarks.get(name, "embedded"),
            "asked as clients' records are, zero-shot",
            "letter",
            0,
            rows,
            {},
        )
    if not targets and not scored:
        raise DataError(NO_EVALUATION)
    loss = None
    if targets:
        change = loss_difference(*losses, targets, seed=derive_seed(recipe.seed, "bootstrap loss"))
        loss = LossAssessment(ratio_of_sums(losses[0], targets), ratio_of_sums(losses[1], targets), change)
    return Assessment(recipe.model.source, str(folder.path), scored, loss)
