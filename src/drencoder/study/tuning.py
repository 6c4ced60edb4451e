"""The ladder of learning rates that every method of a study climbs alike, and which cells a track needs next. No torch.

Tuning runs are on seeds of their own and judged by their mean held-out loss. The first guess and its two neighbours come first. Then the
ladder goes on beyond whichever end is the best so far; once the best lies inside, it tries half steps around it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from drencoder.study.cells import Cell, Track

Losses = Mapping[Cell, float]  # held-out losses of the finished cells of one track
Step = TypeVar("Step", float, int)


@dataclass(frozen=True)
class TuningPlan:
    """How a track is tuned and on which seeds it is judged.

    Args:
      seeds: those that the tuned rate is judged on.
      tuning_seeds: those that it is chosen on; none of `seeds`.
      least_rates: learning rates that are tried in any case.
      most_rates: and at most, while the best is the smallest or the largest.
      rate_factor: ratio between neighbouring learning rates.
      margin: a larger rate, or another clip, has to be better by more than this share of the loss.
      clip_steps: steps of the clip that are tried at the best rate.
      clip_factor: ratio between neighbouring clips. The rate goes the other way, so that steps stay as long as they were.
    """

    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    least_rates: int
    most_rates: int
    rate_factor: float
    margin: float = 0.0
    clip_steps: tuple[int, ...] = ()
    clip_factor: float = 1.0

    def rate(self, first: float, cell: Cell) -> float:
        """The learning rate of a cell whose method starts at `first`."""
        return first * self.rate_factor**cell.rate_step / self.clip_factor**cell.clip_step

    def clip(self, first: float, cell: Cell) -> float:
        """The clip of a cell whose track starts at `first`."""
        return first * self.clip_factor**cell.clip_step


def next_cells(track: Track, plan: TuningPlan, losses: Losses) -> list[Cell]:
    """The cells that a track needs next, given the losses of those that are finished; empty when the track is finished."""

    def missing(steps: Iterable[tuple[float, int]], seeds: Sequence[int]) -> list[Cell]:
        cells = [Cell(track, seed, rate, clip) for rate, clip in steps for seed in seeds]
        return [cell for cell in cells if cell not in losses]

    rates = tuning_losses(plan, losses)
    if opening := [step for step in (0.0, -1.0, 1.0)[: plan.least_rates] if step not in rates]:
        return missing([(step, 0) for step in opening], plan.tuning_seeds)
    if len(rates) < plan.least_rates or (len(rates) < plan.most_rates and is_at_edge(plan, losses)):
        return missing([(_next_step(rates, plan.margin), 0)], plan.tuning_seeds)
    best = _best(rates, plan.margin)
    clips = missing([(best, step) for step in plan.clip_steps], plan.tuning_seeds)
    return clips or missing([tuned_steps(plan, losses)], plan.seeds)


def tuned_steps(plan: TuningPlan, losses: Losses) -> tuple[float, int]:
    """(rate step, clip step) that tuning chose: the smallest of those whose loss is within the margin of the least."""
    best = _best(tuning_losses(plan, losses), plan.margin)
    clips = {step: tuning_losses(plan, losses, step).get(best, math.inf) for step in (0, *plan.clip_steps)}
    return best, _best(clips, plan.margin)


def is_at_edge(plan: TuningPlan, losses: Losses) -> bool:
    """Whether the best learning rate is the smallest or the largest that was tried."""
    rates = tuning_losses(plan, losses)
    return _best(rates, plan.margin) in (min(rates), max(rates))


def tuning_losses(plan: TuningPlan, losses: Losses, clip_step: int = 0) -> dict[float, float]:
    """Rate step -> mean loss over the tuning seeds, for the steps at which all of these are finished."""
    by_step: dict[float, list[float]] = {}
    for cell, loss in losses.items():
        if cell.seed in plan.tuning_seeds and cell.clip_step == clip_step:
            by_step.setdefault(cell.rate_step, []).append(loss)
    return {step: fmean(values) for step, values in by_step.items() if len(values) == len(plan.tuning_seeds)}


def most_cells(plan: TuningPlan) -> int:
    """The most cells that a track can need."""
    return len(plan.tuning_seeds) * (plan.most_rates + len(plan.clip_steps)) + len(plan.seeds)


def _best(means: Mapping[Step, float], margin: float) -> Step:
    """The smallest step whose mean is within the margin of the least."""
    least = min(means.values())
    return min(step for step, mean in means.items() if mean <= (1 + margin) * least)


def _next_step(rates: Mapping[float, float], margin: float) -> float:
    """Beyond the better end; half a step towards the better neighbour if the best lies inside."""
    ordered, best = sorted(rates), _best(rates, margin)
    place = ordered.index(best)
    if place == 0:
        return best - 1.0
    if place == len(ordered) - 1:
        return best + 1.0
    below, above = ordered[place - 1], ordered[place + 1]
    return (best + (below if rates[below] < rates[above] else above)) / 2
