"""The ladder of learning rates: which rates are tried, which one is taken, and which cells a track needs next."""

import math
from collections.abc import Callable

import pytest

from drencoder.study.cells import Cell, Track
from drencoder.study.tuning import TuningPlan, is_at_edge, most_cells, next_cells, tuned_steps

TRACK = Track("dp-lora", 4.0, "central/facts")
PLAN = TuningPlan(
    seeds=range(1000, 1006), tuning_seeds=(100, 101), least_rates=4, most_rates=6, rate_factor=2.0, margin=0.01,
    clip_steps=(1,), clip_factor=4.0,
)  # fmt: skip
Loss = Callable[[float, int], float]


def run_track(loss: Loss) -> tuple[dict[Cell, float], list[list[Cell]]]:
    """Runs a track to its end with a made-up loss of (rate step, clip step); the cells in the order of the waves."""
    losses: dict[Cell, float] = {}
    waves = []
    while cells := next_cells(TRACK, PLAN, losses):
        waves.append(cells)
        losses |= {cell: loss(cell.rate_step, cell.clip_step) for cell in cells}
        assert len(waves) < 20
    return losses, waves


def rates_of(waves: list[list[Cell]]) -> list[float]:
    return list(dict.fromkeys(cell.rate_step for wave in waves for cell in wave if cell.clip_step == 0))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.2, [0.0, -1.0, 1.0, 0.5]),  # inside: half a step towards the better neighbour
        (-0.2, [0.0, -1.0, 1.0, -0.5]),
        (2.1, [0.0, -1.0, 1.0, 2.0, 3.0]),  # on while the best is at the edge, until it is inside
        (-1.9, [0.0, -1.0, 1.0, -2.0, -3.0]),
        (9.0, [0.0, -1.0, 1.0, 2.0, 3.0, 4.0]),  # and no further than six rates
    ],
)
def test_rates_are_tried_until_the_best_lies_inside(best: float, tried: list[float]) -> None:
    losses, waves = run_track(lambda rate, clip: 1.0 + (rate - best) ** 2 + clip)
    assert rates_of(waves) == tried
    nearest = min(tried, key=lambda rate: abs(rate - best))
    assert tuned_steps(PLAN, losses) == (nearest, 0)
    assert is_at_edge(PLAN, losses) == (best == 9.0)
    assert len(losses) <= most_cells(PLAN)


def test_of_two_that_are_alike_the_smaller_rate_and_the_first_clip_are_taken() -> None:
    flat = {-1.0: 1.3, 0.0: 1.009, 0.5: 1.0, 1.0: 1.0, 2.0: 1.5}
    losses, _ = run_track(lambda rate, clip: flat[rate] - 0.009 * clip)
    assert tuned_steps(PLAN, losses) == (0.0, 0)
    clearer, _ = run_track(lambda rate, clip: flat[rate] - 0.02 * clip)
    assert tuned_steps(PLAN, clearer) == (0.0, 1)
    clearly = {**flat, 0.0: 1.011}
    losses, _ = run_track(lambda rate, clip: clearly[rate])
    assert tuned_steps(PLAN, losses)[0] == 1.0


def test_a_rate_that_diverged_is_never_taken() -> None:
    losses, waves = run_track(lambda rate, clip: math.inf if rate > -1 else 5.0 - rate)
    assert tuned_steps(PLAN, losses)[0] == -1.0
    assert rates_of(waves) == [0.0, -1.0, 1.0, -2.0]


def test_no_judged_seed_is_tuned_on_and_all_of_them_are_run() -> None:
    losses, waves = run_track(lambda rate, clip: 1.0 + rate**2 + clip)
    assert [cell.seed for cell in waves[-1]] == list(PLAN.seeds)
    assert {cell.seed for wave in waves[:-1] for cell in wave} == set(PLAN.tuning_seeds)
    assert {(cell.rate_step, cell.clip_step) for cell in waves[-1]} == {(0.0, 0)}
    assert len(losses) == sum(map(len, waves))


def test_a_larger_clip_goes_with_a_smaller_rate() -> None:
    cell = Cell(TRACK, 100, 1.0, 1)
    assert PLAN.rate(0.75, cell) == 0.75 * 2 / 4
    assert PLAN.clip(1.0, cell) == 4.0
