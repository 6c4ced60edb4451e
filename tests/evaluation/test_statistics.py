"""Scores, intervals and paired tests against other formulas, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.errors import DataError
from drencoder.evaluation.statistics import (
    Estimate,
    Row,
    accuracy_difference,
    assess_rows,
    loss_difference,
    mcnemar,
    paired_over_seeds,
    ratio_of_sums,
    wilson,
)

MMLU, CEVAL = TAXONOMIES["mmlu"], TAXONOMIES["ceval"]
Z = 1.959963984540054


@pytest.mark.parametrize(("share", "count"), [(0.0, 7), (1.0, 7), (0.25, 40), (0.7, 12.5)])
def test_wilsons_bounds_solve_their_equation(share: float, count: float) -> None:
    low, high = wilson(share, count)
    assert low < share + 1e-12
    assert high > share - 1e-12
    for bound in (low, high):  # |share - p| = z sqrt(p (1 - p) / n)
        assert abs(share - bound) == pytest.approx(Z * math.sqrt(max(0.0, bound * (1 - bound)) / count), abs=1e-7)


def test_ratio_of_sums_is_the_mean_where_all_texts_are_equally_long() -> None:
    losses = [1.0, 4.0, 2.5, 3.0, 0.5]
    estimate = ratio_of_sums(losses, [2] * 5)
    assert estimate.value == pytest.approx(np.mean(losses) / 2)
    assert estimate.high - estimate.value == pytest.approx(Z * np.std(losses) / math.sqrt(5) / 2)
    assert estimate.value - estimate.low == pytest.approx(estimate.high - estimate.value)
    with pytest.raises(DataError, match="no held-out token"):
        ratio_of_sums([], [])


def accuracies(rows: list[Row], part: str) -> dict[str, Estimate]:
    return {row.name: row.base for row in rows if row.part == part}


def test_mmlu_weighs_questions_and_ceval_subjects() -> None:
    subjects = ["anatomy"] * 6 + ["virology"] * 2 + ["philosophy"] * 2
    right = [True] * 6 + [False] * 2 + [True, False]
    mmlu = assess_rows(MMLU, subjects, right, seed=0)
    assert mmlu[0].part == "overall"
    assert mmlu[0].base.value == pytest.approx(0.7)
    assert (mmlu[0].base.low, mmlu[0].base.high) == pytest.approx(wilson(0.7, 10))
    categories = accuracies(mmlu, "category")
    assert {name: one.value for name, one in categories.items()} == pytest.approx({"other": 0.75, "humanities": 0.5})
    counts = {name: one.count for name, one in accuracies(mmlu, "subject").items()}
    assert counts == {"anatomy": 6, "philosophy": 2, "virology": 2}
    assert accuracies(mmlu, "hard") == {}
    assert all(row.adapter is row.difference is row.mcnemar is None for row in mmlu)

    subjects = ["law"] * 6 + ["logic"] * 2 + ["college_physics"] * 2
    ceval = assess_rows(CEVAL, subjects, right, seed=0)
    assert ceval[0].base.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert ceval[0].base.count == 10
    assert accuracies(ceval, "category")["Humanities"].value == pytest.approx(0.5)
    physics = accuracies(ceval, "subject")["college_physics"]
    assert accuracies(ceval, "category")["STEM"] == physics == accuracies(ceval, "hard")["Hard subset"]
    with pytest.raises(DataError, match="no multiple-choice question"):
        assess_rows(CEVAL, [], [], seed=0)


def test_a_task_without_categories_has_its_subjects_only_if_there_are_some() -> None:
    assert [row.name for row in assess_rows(None, ["one"] * 3, [True, False, True], seed=0)] == ["overall"]
    rows = assess_rows(None, ["b", "a", "b"], [True, False, True], seed=0)
    assert [(row.part, row.name) for row in rows] == [("overall", "overall"), ("subject", "a"), ("subject", "b")]


def test_every_part_is_tested_in_pairs() -> None:
    subjects = ["law"] * 6 + ["logic"] * 4 + ["college_physics"] * 5
    rng = np.random.default_rng(2)
    first, second = ([bool(hit) for hit in rng.random(15) < share] for share in (0.3, 0.8))
    parts = {
        "overall": subjects,
        "Hard subset": ["college_physics"],
        "STEM": ["college_physics"],
        "Humanities": ["law", "logic"],
        "law": ["law"],
        "logic": ["logic"],
        "college_physics": ["college_physics"],
    }
    rows = assess_rows(CEVAL, subjects, first, second, seed=4)
    assert {row.name for row in rows} == set(parts)
    for row in rows:
        chosen = [index for index, subject in enumerate(subjects) if subject in parts[row.name]]
        before, after = ([hits[index] for index in chosen] for hits in (first, second))
        own = [subjects[index] for index in chosen]
        assert row.mcnemar == mcnemar(before, after)
        assert row.difference == accuracy_difference(own, before, after, by_subject=True, seed=4)
        assert row.adapter is not None
        assert row.difference.value == pytest.approx(row.adapter.value - row.base.value)


def test_the_interval_of_a_subject_mean_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    subjects = CEVAL.subjects[:20]
    sizes = {subject: 6 + 2 * (index % 5) for index, subject in enumerate(subjects)}
    chances = {subject: rng.uniform(0.2, 0.9) for subject in subjects}
    truth = float(np.mean(list(chances.values())))
    names = [subject for subject in subjects for _ in range(sizes[subject])]
    hits = 0
    for _ in range(400):
        overall = assess_rows(CEVAL, names, [rng.random() < chances[name] for name in names], seed=0)[0].base
        hits += overall.low <= truth <= overall.high
    assert hits / 400 > 0.95 - 6 * math.sqrt(0.95 * 0.05 / 400)


def test_mcnemar_is_the_binomial_sum() -> None:
    for gained, lost in itertools.product(range(9), range(9)):
        first = [False] * gained + [True] * lost + [True, False]
        second = [True] * gained + [False] * lost + [True, False]
        found = mcnemar(first, second)
        n = gained + lost
        tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
        assert (found.gained, found.lost) == (gained, lost)
        assert found.p == pytest.approx(min(1.0, 2 * tail))


def enumerate_bootstrap(sums: list[float], weights: list[float]) -> np.ndarray:
    """Every resample of a handful of items, each once: the bootstrap distribution itself."""
    chosen = np.array(list(itertools.product(range(len(sums)), repeat=len(sums))))
    return np.asarray(sums)[chosen].sum(1) / np.asarray(weights)[chosen].sum(1)


def test_the_bootstrap_draws_from_the_enumerated_distribution() -> None:
    subjects = ["anatomy"] * 3 + ["virology"] * 3
    first, second = [True, False, False, True, False, False], [True, True, True, False, True, False]
    found = accuracy_difference(subjects, first, second, by_subject=False, seed=1, draws=40_000)
    every = enumerate_bootstrap([0, 1, 1, -1, 1, 0], [1] * 6)
    assert found.value == pytest.approx(2 / 6)
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=1e-9)
    # 40,000 draws know a share to 0.0025 at most, six sigma are 0.015.
    assert found.p == pytest.approx(2 * min(np.mean(every <= 0), np.mean(every >= 0)), abs=0.03)
    assert found.p < 0.6


def test_the_bootstrap_of_a_subject_mean_weighs_subjects_alike() -> None:
    subjects = ["law"] * 4 + ["logic"] * 2
    first, second = [True, False, False, False, True, False], [True, True, False, False, False, True]
    found = accuracy_difference(subjects, first, second, by_subject=True, seed=0, draws=40_000)
    before, after = (assess_rows(CEVAL, subjects, right, seed=0)[0].base.value for right in (first, second))
    assert found.value == pytest.approx(after - before)
    every = enumerate_bootstrap([0, 0.25, 0, 0, -0.5, 0.5], [0.25] * 4 + [0.5] * 2)
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.02)
    alone = accuracy_difference(["law", "logic"], [False, False], [True, False], by_subject=True, seed=0)
    assert alone.high > alone.low  # one question a subject is not certainty


def test_paired_differences_do_not_depend_on_chance_twice() -> None:
    subjects, first = ["anatomy"] * 8, [True, False] * 4
    assert accuracy_difference(subjects, first, first, by_subject=False, seed=3).p == 1.0
    second = [True] * 8
    one, same = (accuracy_difference(subjects, first, second, by_subject=False, seed=3, draws=500) for _ in range(2))
    assert one == same
    back = accuracy_difference(subjects, second, first, by_subject=False, seed=3, draws=500)
    assert (back.value, back.low, back.high) == pytest.approx((-one.value, -one.high, -one.low))
    with pytest.raises(DataError, match="no multiple-choice question"):
        accuracy_difference([], [], [], by_subject=False, seed=0)


def test_the_loss_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    trials, texts, truth = 300, 60, -0.3
    hits = half_hits = rejected = 0
    for trial in range(trials):
        targets = rng.integers(1, 8, size=texts)
        first = targets * 2.0 + rng.normal(0, 1, texts)
        second = first + targets * truth + rng.normal(0, 1, texts) * np.sqrt(targets)
        found = loss_difference(first.tolist(), second.tolist(), targets.tolist(), seed=trial, draws=600)
        hits += found.low <= truth <= found.high
        half = (found.high - found.low) / 4
        half_hits += abs(found.value - truth) <= half
        rejected += found.p < 0.05
    sigma = math.sqrt(0.95 * 0.05 / trials)
    assert abs(hits / trials - 0.95) < 6 * sigma
    assert half_hits / trials < 0.95 - 6 * sigma  # half the interval would be found out
    assert rejected / trials > 0.9


def test_p_values_of_equal_models_are_rarely_small() -> None:
    rng = np.random.default_rng(2)
    small = 0
    for trial in range(300):
        targets, noise = rng.integers(1, 8, size=50), rng.normal(0, 1, 50)
        small += loss_difference([0.0] * 50, noise.tolist(), targets.tolist(), seed=trial, draws=500).p < 0.05
    assert small / 300 < 0.05 + 6 * math.sqrt(0.05 * 0.95 / 300)
    assert small > 0


def test_chunks_of_a_large_bootstrap_are_one_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(50), rng.random(50)
    whole = loss_difference(first, second, [3] * 50, seed=9, draws=200)
    monkeypatch.setattr("drencoder.evaluation.statistics._CHUNK_VALUES", 700)
    assert loss_difference(first, second, [3] * 50, seed=9, draws=200) == whole


def test_losses_that_cannot_be_compared_are_one_sentence() -> None:
    with pytest.raises(DataError, match="no held-out text"):
        loss_difference([], [], [], seed=0)
    with pytest.raises(DataError, match="not finite"):
        loss_difference([1.0, math.nan], [1.0, 2.0], [1, 1], seed=0)
    with pytest.raises(ValueError, match="paired"):
        loss_difference([1.0, 2.0], [1.0, 2.0], [1], seed=0)


def test_differences_over_seeds_are_students_t() -> None:
    differences = [0.1, -0.05, 0.2, 0.12]
    found, reference = paired_over_seeds(differences), stats.ttest_1samp(differences, 0.0)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, reference.pvalue))
    three = paired_over_seeds([1.0, 2.0, 3.0])  # t of two degrees of freedom: 4.3027
    assert (three.value, three.high - three.value) == pytest.approx((2.0, 4.302652729911275 / math.sqrt(3)))
    assert paired_over_seeds([0.0] * 3).p == 1.0
    assert paired_over_seeds([0.5] * 3).p == 0.0
    with pytest.raises(DataError, match="2 paired seeds give no interval: run at least 3"):
        paired_over_seeds([0.1, 0.2])
    with pytest.raises(DataError, match="not finite"):
        paired_over_seeds([0.1, 0.2, math.nan])
