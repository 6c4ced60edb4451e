"""Asks a model the questions of lm-eval's tasks and keeps, item by item, whether the answer was right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from drencoder.errors import DataError
from drencoder.evaluation.lm_eval_tasks import LoadedBenchmark, quiet_lm_eval
from drencoder.models.base_model import BaseModel

# Which of a task's metrics says whether an answer was right, the first that it has.
_METRICS = ("acc", "exact_match", "em")


@final
@dataclass(frozen=True)
class ItemLog:
    """What one model answered.

    Attributes:
      metric: of lm-eval, that decided which answers are right.
      subjects: (Q,) the subject of each question, in lm-eval's order.
      right: (Q,) whether it was answered rightly.
      aggregates: lm-eval's own table: group or task -> metric -> value.
      shortened: prompts that were longer than the model's context and lost their beginning.
    """

    metric: str
    subjects: list[str]
    right: list[bool]
    aggregates: dict[str, dict[str, float]]
    shortened: int


def ask_tasks(
    benchmark: LoadedBenchmark,
    base: BaseModel,
    *,
    limit: int | None = None,
    batch: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ItemLog:
    """Runs lm-eval's `evaluate` on the model as it is now: with the adapter that is switched on, or without one.

    Args:
      limit: questions of each task, the first ones; None = all.
      batch: requests of one forward pass.
      on_progress: is called with the requests that were answered and their number (four a multiple-choice question).

    Raises:
      DataError: lm-eval's log has no right and wrong answers.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quiet_lm_eval():
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=batch)
        observed = _observe(model, on_progress)
        results: Any = lm_eval.evaluate(observed, benchmark.tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    metrics, subjects, right = set(), [], []
    for task, subject in benchmark.subjects.items():
        samples = results["samples"][task]
        metric = _right_metric(task, samples)
        first = samples[0]["filter"]  # the others judge the same answers by another rule
        chosen = sorted((s for s in samples if s["filter"] == first), key=lambda sample: sample["doc_id"])
        metrics.add(metric)
        subjects += [subject] * len(chosen)
        right += [bool(sample[metric]) for sample in chosen]
    return ItemLog(", ".join(sorted(metrics)), subjects, right, _aggregates(results), observed.shortened)


def _right_metric(task: str, samples: Sequence[Any]) -> str:
    for metric in _METRICS:
        if all(metric in sample and sample[metric] in (0, 1) for sample in samples):
            return metric
    raise DataError(
        f"task {task}: lm-eval logs no right and wrong answers ({', '.join(_METRICS)}): choose another task."
    )


def _aggregates(results: Any) -> dict[str, dict[str, float]]:
    """lm-eval's values without their standard errors; a filter's name is shown where it has one."""
    table = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        table[name] = {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
    return table


def _observe(model: Any, on_progress: Callable[[int, int], None]) -> Any:
    """The model behind lm-eval's interface, without its bars; it counts what is asked and what is answered."""
    from lm_eval.api.model import LM

    class ObservedModel(LM):
        """Passes each request on. `shortened`: distinct prompts so far that the context could not hold."""

        def __init__(self) -> None:
            super().__init__()
            self.shortened = self._done = self._total = 0
            model.set_cache_hook(self)  # the hook is told each answer when it is there

        def add_partial(self, *_answer: Any) -> None:
            self._done += 1
            on_progress(self._done, self._total)

        def loglikelihood(self, requests: list[Any]) -> Any:
            longest: dict[str, int] = {}
            for context, continuation in (request.args for request in requests):
                longest[context] = max(longest.get(context, 0), len(model.tok_encode(context + continuation)))
            self.shortened += sum(length > model.max_length + 1 for length in longest.values())
            return self._ask(model.loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> Any:
            return self._ask(model.loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any]) -> Any:
            return self._ask(model.generate_until, requests)

        def _ask(self, method: Callable[..., Any], requests: list[Any]) -> Any:
            self._total += len(requests)
            on_progress(self._done, self._total)  # the first batch, of the longest texts, can take minutes
            return method(requests, disable_tqdm=True)

    return ObservedModel()
