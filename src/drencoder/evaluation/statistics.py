"""From right and wrong answers to scores, intervals and paired tests. numpy and scipy only.

Legend: Q questions, N texts, S subjects, B bootstrap draws. Every interval is a 95 % one.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import ndtri

from drencoder.data.benchmarks.taxonomy import Taxonomy
from drencoder.errors import DataError

_Z95 = float(ndtri(0.975))
_DRAWS = 10_000
_CHUNK_VALUES = 2_000_000  # of a bootstrap's index table, so that memory stays flat


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % confidence interval over `count` examples or questions."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def outcome_estimates(
    losses: Sequence[float], targets: Sequence[int], right: Mapping[str, Sequence[bool]]
) -> dict[str, Any]:
    """A model's held-out loss and its accuracy on each benchmark, with 95 % intervals, as the certificate has them.

    `losses` and `targets`: nats and tokens of each text (none: the loss is None); `right`: benchmark -> whether each question was
    answered rightly.
    """
    accuracy = {}
    for name, hits in right.items():
        share = sum(hits) / len(hits)
        accuracy[name] = asdict(Estimate(share, *wilson(share, len(hits)), len(hits)))
    return {"loss": asdict(ratio_of_sums(losses, targets)) if losses else None, "accuracy": accuracy}


@dataclass(frozen=True)
class Difference:
    """A paired difference (second minus first), its 95 % interval and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float
    count: int


@dataclass(frozen=True)
class McNemar:
    """Questions that only the second model got right (`gained`) or only the first (`lost`), and the exact p-value."""

    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class Row:
    """Accuracy on a part of a benchmark: on all of it, on C-Eval's Hard subset, a category or a subject.

    `part` is "overall", "hard", "category" or "subject". `difference` is the adapter's accuracy minus the base's; `mcnemar`
    counts single questions.
    """

    part: str
    name: str
    base: Estimate
    adapter: Estimate | None = None
    difference: Difference | None = None
    mcnemar: McNemar | None = None


@dataclass(frozen=True)
class BenchmarkAssessment:
    """A base model, and perhaps its adapter, on one benchmark.

    Attributes:
      provenance: where the questions come from.
      prompt: how they were asked, in words.
      metric: what says that an answer is right.
      shortened: prompts that were longer than the model's context and lost their beginning.
      rows: `overall` first.
      lm_eval: "base" and "adapter" -> lm-eval's own table (group or task -> metric -> value); empty if it was not asked.
      task: lm-eval's name of the whole; empty if it was not asked.
    """

    name: str
    provenance: str
    prompt: str
    metric: str
    shortened: int
    rows: Sequence[Row]
    lm_eval: Mapping[str, Mapping[str, Mapping[str, float]]]
    task: str = ""


@dataclass(frozen=True)
class LossAssessment:
    """Held-out loss (nats per response token) of base and adapter on the same texts."""

    base: Estimate
    adapter: Estimate
    difference: Difference


@dataclass(frozen=True)
class Assessment:
    """What `drencoder evaluate` found; `adapter` is the run folder, or None for a model without one."""

    model: str
    adapter: str | None
    benchmarks: Mapping[str, BenchmarkAssessment]
    loss: LossAssessment | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain tables of numbers and texts, for JSON."""
        return asdict(self)


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval (Wilson 1927) of a share seen in `count` independent questions.

    `count` may be fractional: the effective number of a weighted mean.
    """
    z2 = _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return centre - half, centre + half


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Sum over sum (loss per token, say), with the interval of a ratio estimator over independent texts.

    Raises:
      DataError: there is nothing to add.
    """
    total = sum(counts)
    if total <= 0:
        raise DataError("there is no held-out token to average over: give texts with a response.")
    mean = sum(sums) / total
    residuals = sum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    error = _Z95 * math.sqrt(residuals) / total
    return Estimate(mean, mean - error, mean + error, len(sums))


def assess_rows(
    taxonomy: Taxonomy | None,
    subjects: Sequence[str],
    base: Sequence[bool],
    adapter: Sequence[bool] | None = None,
    *,
    seed: int,
) -> list[Row]:
    """Accuracies, and paired tests of the adapter against its base, on the whole benchmark and on each part of it.

    They are averaged as the benchmark's authors do: MMLU over questions (Hendrycks et al. 2021), C-Eval over subjects
    (Huang et al. 2023), overall and in every category alike. The p-values are those of single tests: with many subjects,
    some are small by chance.

    Args:
      taxonomy: the benchmark's categories; None = it has none, and is averaged over questions.
      subjects: (Q,) the subject of each question.
      base, adapter: (Q,) whether the model answered it rightly.
      seed: of the bootstrap.

    Raises:
      DataError: there is no question.
    """
    rows = []
    for part, name, indices in _parts(taxonomy, subjects):
        own = [subjects[index] for index in indices]
        by_subject = taxonomy is not None and taxonomy.by_subject
        before = [bool(base[index]) for index in indices]
        row = Row(part, name, _accuracy(own, before, by_subject))
        if adapter is not None:
            after = [bool(adapter[index]) for index in indices]
            row = Row(
                part, name, row.base, _accuracy(own, after, by_subject),
                accuracy_difference(own, before, after, by_subject=by_subject, seed=seed), mcnemar(before, after),
            )  # fmt: skip
        rows.append(row)
    return rows


def _parts(taxonomy: Taxonomy | None, subjects: Sequence[str]) -> Iterator[tuple[str, str, list[int]]]:
    """(part, name, indices of its questions) of every part that has questions; one subject is no part of its own."""
    piles: dict[str, list[int]] = {}
    for index, subject in enumerate(subjects):
        piles.setdefault(subject, []).append(index)
    yield "overall", "overall", list(range(len(subjects)))
    if taxonomy is not None:
        groups = {"Hard subset": taxonomy.hard, **taxonomy.categories}
        for name, members in groups.items():
            indices = [index for subject in piles if subject in members for index in piles[subject]]
            if indices:
                yield ("hard" if name == "Hard subset" else "category"), name, indices
    if taxonomy is not None or len(piles) > 1:
        yield from (("subject", subject, piles[subject]) for subject in sorted(piles))


def _accuracy(subjects: Sequence[str], right: Sequence[bool], by_subject: bool) -> Estimate:
    """Mean over questions or over subjects, with Wilson's interval.

    The variance of a mean of S shares p_s over n_s questions is sum p_s (1 - p_s) / n_s / S^2. Putting the mean share m
    for every p_s gives m (1 - m) / n, n = S^2 / sum 1 / n_s: the n of Wilson's interval. With equal n_s that variance
    is never too small, since p (1 - p) is concave; and it stays above zero where every p_s is 0 or 1.
    """
    if not subjects:
        raise DataError("there is no multiple-choice question to score: give the benchmark some.")
    share, effective = sum(right) / len(right), float(len(right))
    if by_subject:
        piles: dict[str, list[bool]] = {}
        for subject, hit in zip(subjects, right, strict=True):
            piles.setdefault(subject, []).append(hit)
        share = sum(sum(pile) / len(pile) for pile in piles.values()) / len(piles)
        effective = len(piles) ** 2 / sum(1 / len(pile) for pile in piles.values())
    return Estimate(share, *wilson(min(1.0, share), effective), len(subjects))


# --- paired comparisons ----------------------------------------------------------------------------


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact McNemar test (McNemar 1947): of the questions that one model alone got right, is it a fair coin which?"""
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    p = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p))


def accuracy_difference(
    subjects: Sequence[str],
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    by_subject: bool,
    seed: int,
    draws: int = _DRAWS,
) -> Difference:
    """Paired bootstrap of the accuracy, second model minus first, over questions.

    A mean over subjects (`by_subject`, as C-Eval has it) is a mean over questions that weigh 1 / (questions of their subject); a weight is drawn
    with its question, so that subjects with few questions do not pretend to be known exactly.

    Raises:
      DataError: there is no question.
    """
    if not subjects:
        raise DataError("there is no multiple-choice question to compare: give the benchmark some.")
    sizes = Counter(subjects)
    weight_Q = np.array([1 / sizes[subject] if by_subject else 1.0 for subject in subjects])
    sign_Q = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return _bootstrap(sign_Q * weight_Q, weight_Q, seed, draws)


def loss_difference(
    first_N: Sequence[float], second_N: Sequence[float], targets_N: Sequence[int], *, seed: int, draws: int = _DRAWS
) -> Difference:
    """Paired bootstrap of the held-out loss (nats per token, a ratio of sums), second model minus first, over texts.

    Args:
      first_N, second_N: (N,) each text's loss, summed over its tokens, under either model.
      targets_N: (N,) its number of predicted tokens.

    Raises:
      DataError: there is no text, or a loss is not finite.
    """
    change_N = np.asarray(second_N, dtype=np.float64) - np.asarray(first_N, dtype=np.float64)
    if not len(change_N):
        raise DataError("there is no held-out text to compare: raise evaluation.examples.")
    if not np.isfinite(change_N).all():
        raise DataError("a held-out loss is not finite: the model or its adapter is broken.")
    return _bootstrap(change_N, np.asarray(targets_N, dtype=np.float64), seed, draws)


def _bootstrap(sum_N: np.ndarray, weight_N: np.ndarray, seed: int, draws: int) -> Difference:
    """Percentile bootstrap (Efron 1979) of sum over weight, both drawn together, by item.

    p is twice the smaller share of draws on either side of zero, at least 2 / (draws + 1).
    """
    if sum_N.shape != weight_N.shape:
        raise ValueError(f"{len(sum_N)} values and {len(weight_N)} weights: they must be paired")
    rng = np.random.default_rng(seed)
    count = len(sum_N)
    parts = []
    for size in _chunks(draws, count):
        chosen_BN = rng.integers(count, size=(size, count))
        parts.append(sum_N[chosen_BN].sum(axis=1) / weight_N[chosen_BN].sum(axis=1))
    drawn_B = np.concatenate(parts)
    low, high = np.quantile(drawn_B, [0.025, 0.975])
    tail = min(int(np.sum(drawn_B <= 0)), int(np.sum(drawn_B >= 0)))
    p = min(1.0, 2 * (1 + tail) / (1 + draws))
    return Difference(float(sum_N.sum() / weight_N.sum()), float(low), float(high), p, count)


def paired_over_seeds(differences: Sequence[float]) -> Difference:
    """Student's t interval and test of the mean of paired differences, one per seed.

    Raises:
      DataError: there are fewer than three, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 3:
        raise DataError(f"{len(values)} paired seeds give no interval: run at least 3.")
    if not np.isfinite(values).all():
        raise DataError("a paired difference is not finite: leave out the seeds whose run failed.")
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    freedom = len(values) - 1
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(values))
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - half, mean + half, p, len(values))


def _chunks(draws: int, width: int) -> list[int]:
    size = max(1, min(draws, _CHUNK_VALUES // width))
    return [min(size, draws - start) for start in range(0, draws, size)]
