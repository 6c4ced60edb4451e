"""How good is a finished run, or any model: MMLU, C-Eval and held-out text, the adapter paired with its base."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from drencoder.data.benchmarks.questions import Benchmark, load_benchmarks
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.prompts_template import render
from drencoder.data.sources import open_source
from drencoder.data.tokenization import make_examples
from drencoder.errors import ArtifactError, DataError, ModelError
from drencoder.evaluation.held_out import AskedQuestions, ask_questions, choice_picks, held_out_outcomes
from drencoder.evaluation.statistics import (
    Assessment,
    BenchmarkAssessment,
    LossAssessment,
    accuracy_difference,
    loss_difference,
    mcnemar,
    ratio_of_sums,
    score_benchmark,
)
from drencoder.models.base_model import BaseModel, load_base, resolve_device
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.rng import derive_seed
from drencoder.runs.run_folder import RunFolder

__all__ = ["assess"]

# Longest prompt unless told otherwise: five worked examples of the longest subjects need about 3,000 tokens.
_LONGEST_PROMPT_TOKENS = 4096


def assess(
    target: Path | str,
    *,
    benchmarks: Sequence[str] | None = None,
    where: Mapping[str, str] | None = None,
    split: str | None = None,
    subjects: Sequence[str] | None = None,
    shots: int | None = None,
    template: str | None = None,
    count: int | None = None,
    examples: int | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
) -> Assessment:
    """Scores a base model and, for a run, its adapter on the same questions and texts.

    None means: as the run's recipe says, or its default for a model that has no run.

    Args:
      target: a run folder (`recipe.resolved.toml` and `adapter/`), else a model: "embedded", a folder or a hub id.
      benchmarks: any of "mmlu" and "ceval"; none at all when empty.
      where: benchmark -> "embedded", a folder of CSV files, or "hub:ORG/NAME".
      split, subjects, shots, template: as the knobs of `[evaluation]`.
      count: questions per benchmark; 0 = all (not of the embedded world, which has no end).
      examples: held-out texts of a run, which needs the run's data; 0 = leave them out. A model has none.
      max_tokens: of a prompt; None = the model's context, 4,096 at most.
      device: "auto", "cpu" or "cuda".

    Raises:
      DrencoderError: the target, its data or a benchmark cannot be had, or an option cannot be meant.
    """
    for name, value, least in (("examples", examples, 0), ("max_tokens", max_tokens, 8)):
        if value is not None and value < least:
            raise DataError(f"{name} = {value} is too few: give at least {least}.")
    folder = Path(target)
    is_run = RunFolder(folder).recipe.is_file()
    recipe = load_recipe(RunFolder(folder).recipe) if is_run else Recipe(model=config.Model(source=str(target)))
    given = {"benchmarks": benchmarks, "split": split, "subjects": subjects, "shots": shots, "template": template}
    recipe = _with(recipe, {**given, **_places(where or {})}, device)
    count = recipe.evaluation.questions if count is None else count
    drawn = load_benchmarks(recipe.evaluation, recipe.data, seed=recipe.seed, count=count)
    resolve_device(recipe.model.device)
    base = load_base(recipe.model)
    lora = LoraModel(base, recipe.adapter if is_run else _smallest_adapter(base), seed=recipe.seed)
    adapter_D = _load_adapter(RunFolder(folder), lora) if is_run else None
    limit = max_tokens or _context_tokens(base)
    scored = {name: _assess_benchmark(lora, adapter_D, benchmark, recipe, limit) for name, benchmark in drawn.items()}
    loss = None
    if adapter_D is not None and examples != 0:
        loss = _assess_loss(lora, adapter_D, recipe, examples or recipe.evaluation.examples)
    return Assessment(recipe.model.source, str(target) if is_run else None, scored, loss)


def _places(where: Mapping[str, str]) -> Mapping[str, str]:
    if unknown := set(where) - set(TAXONOMIES):
        raise DataError(f"benchmark {min(unknown)!r} is not known: choose one of {', '.join(TAXONOMIES)}.")
    return where


def _with(recipe: Recipe, given: Mapping[str, Any], device: str | None) -> Recipe:
    """The recipe with what was given in place of its own; the knobs check themselves."""
    changed = {key: value for key, value in given.items() if value is not None}
    model = recipe.model if device is None else replace(recipe.model, device=device)
    return replace(recipe, evaluation=replace(recipe.evaluation, **changed), model=model)


def _context_tokens(base: BaseModel) -> int:
    context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return min(context or _LONGEST_PROMPT_TOKENS, _LONGEST_PROMPT_TOKENS)


def _smallest_adapter(base: BaseModel) -> config.Adapter:
    """A rank-1 adapter on some linear layer: a model without a run is scored as the zero update of one."""
    head = base.model.get_output_embeddings()
    for name, module in base.model.named_modules():
        # GPT-2 and its kin call their linear layers Conv1D; PEFT knows both.
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            return config.Adapter(rank=1, targets=(name.rpartition(".")[2],))
    raise ModelError(f"{base.source!r} has no linear layer: give a causal language model.")


def _load_adapter(folder: RunFolder, lora: LoraModel) -> Tensor:
    """The run's released adapter as one vector (D,)."""
    path = folder.adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtifactError(
            f"{folder.path} has no adapter yet: finish the run with drencoder run --resume {folder.path}."
        )
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has an error type of its own, not an OSError
        raise ArtifactError(f"{path} cannot be read ({error}): it was cut or changed; restore it.") from None
    return lora.layout.flatten(tensors).to(lora.device)


def _assess_benchmark(
    lora: LoraModel, adapter_D: Tensor | None, benchmark: Benchmark, recipe: Recipe, limit: int
) -> BenchmarkAssessment:
    taxonomy, template = TAXONOMIES[benchmark.name], recipe.evaluation.template
    asked = ask_questions(lora, benchmark.questions, limit, examples=benchmark.examples, template=template)
    base = _right(lora, torch.zeros_like(lora.initial_D), asked, benchmark)
    result = BenchmarkAssessment(
        benchmark.name,
        benchmark.provenance,
        template,
        benchmark.shots,
        sum(kept < benchmark.shots for kept in asked.shots),
        score_benchmark(taxonomy, benchmark.subjects, base),
    )
    if adapter_D is None:
        return result
    adapter = _right(lora, adapter_D, asked, benchmark)
    seed = derive_seed(recipe.seed, f"bootstrap {benchmark.name}")
    return replace(
        result,
        adapter=score_benchmark(taxonomy, benchmark.subjects, adapter),
        difference=accuracy_difference(taxonomy, benchmark.subjects, base, adapter, seed=seed),
        mcnemar=mcnemar(base, adapter),
    )


def _right(lora: LoraModel, adapter_D: Tensor, asked: AskedQuestions, benchmark: Benchmark) -> list[bool]:
    picks = choice_picks(lora, adapter_D, asked.options)
    return [pick == answer for pick, answer in zip(picks, benchmark.answers, strict=True)]


def _assess_loss(lora: LoraModel, adapter_D: Tensor, recipe: Recipe, count: int) -> LossAssessment:
    source = open_source(recipe.data, population=recipe.federation.population, seed=recipe.seed)
    rendered = map(render, source.held_out(count))
    limit, owner = recipe.data.max_tokens, "the server's held-out set"
    model = lora.base
    texts = make_examples(rendered, model.tokenize, model.end_id, limit, owner=owner, start=model.start_ids)
    base, targets = held_out_outcomes(lora, torch.zeros_like(lora.initial_D), texts)
    adapter, _ = held_out_outcomes(lora, adapter_D, texts)
    return LossAssessment(
        ratio_of_sums(base, targets),
        ratio_of_sums(adapter, targets),
        loss_difference(base, adapter, targets, seed=derive_seed(recipe.seed, "bootstrap loss")),
    )
