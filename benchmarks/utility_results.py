"""From the lines of a utility study to finished tracks and paired differences. No torch.

A *result* is a finished track: its tuned cell on every final seed. A failed run counts as an infinite loss. A *duel* is two results on
the same seeds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import utility_grid as grid
from utility_cells import Row, by_track, loss_of, read_cells
from utility_grid import COMPARATORS, OURS, Setting, Track

from drencoder.encoders.code_sizes import message_bytes, noise_dominates
from drencoder.evaluation.statistics import Difference, paired_over_seeds

MARGIN = 0.01  # of DP-LoRA's loss
FREE_RATIO = 64  # of DP-LoRA's bytes: the code that has to be free where noise dominates
SAME_BYTES = 1.01  # headers and scales
REFERENCE, AUTOMATIC, SMALL_CODE = "dp-lora", "hybrid", "hybrid-10"
FEW, MANY = 8, 512  # 512 codes of 1/64 are as many bytes as 8 whole updates


@dataclass(frozen=True)
class Result:
    """One finished track; `rows` are its final seeds', in order."""

    track: Track
    rows: tuple[Row, ...]
    edge: bool  # whether the best learning rate was the smallest or largest that was tried
    tuning: Mapping[str, float]  # "rate step, clip step" -> mean loss on the tuning seeds

    @property
    def losses(self) -> list[float]:
        return [loss_of(row) for row in self.rows]

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def failed(self) -> bool:
        return not all(map(math.isfinite, self.losses))

    def first(self, *path: str) -> Any:
        """A fact of the first seed's run that did not fail, by its path in the line; None if there is none."""
        for row in self.rows:
            found: Any = row
            for key in path:
                found = found.get(key) if isinstance(found, Mapping) else None
            if found is not None:
                return found
        return None

    @property
    def k_star(self) -> float:
        """With half of the clip's energy shared by all clients; infinite without noise."""
        known = self.first("k_star")
        return math.inf if known is None else known

    @property
    def code_size(self) -> int | None:
        return self.first("encoder", "code_size")

    @property
    def ratio(self) -> float:
        """D / K as the certificate has it; not a number if every seed failed."""
        return self.track.setting.adapter_size / self.code_size if self.code_size else math.nan

    @property
    def bytes_up(self) -> int:
        """All uploads of a run, headers included; 0 if every seed failed."""
        return self.first("bytes_up") or 0

    @property
    def message(self) -> int:
        """Bytes of one upload, header included, which chance has no part in; without trust who was drawn decides `bytes_up`. 0 if every
        seed failed."""
        return message_bytes(self.code_size, grid.wire_dtype_of(self.track)) if self.code_size else 0

    @property
    def noisy(self) -> bool:
        """Whether noise dominates: k* < D / 64."""
        return noise_dominates(self.track.setting.adapter_size, self.k_star)


@dataclass(frozen=True)
class Duel:
    """Two results, on the seeds that both were judged on."""

    ours: Result
    theirs: Result

    @classmethod
    def of(cls, ours: Result, theirs: Result) -> "Duel":
        """Small cohorts have more seeds than large ones: the first ones of each are paired."""
        common = min(len(ours.rows), len(theirs.rows))
        return cls(replace(ours, rows=ours.rows[:common]), replace(theirs, rows=theirs.rows[:common]))

    @property
    def differences(self) -> list[float]:
        """Ours minus theirs, per seed."""
        return [a - b for a, b in zip(self.ours.losses, self.theirs.losses, strict=True)]

    @property
    def mean(self) -> float:
        return math.inf if self.ours.failed else self.ours.loss - self.theirs.loss

    @property
    def relative(self) -> float:
        return self.mean / self.theirs.loss

    @property
    def interval(self) -> Difference | None:
        """Student's over seeds; None with fewer than three or after a failure."""
        return None if self.ours.failed or len(self.differences) < 3 else paired_over_seeds(self.differences)

    @property
    def better(self) -> bool:
        return self.mean < 0

    @property
    def no_worse(self) -> bool:
        return self.mean <= MARGIN * self.theirs.loss

    @property
    def surely_no_worse(self) -> bool:
        return self.interval is not None and self.interval.high <= MARGIN * self.theirs.loss

    @property
    def surely_worse(self) -> bool:
        return self.interval is not None and self.interval.low > MARGIN * self.theirs.loss

    @property
    def fewer_bytes(self) -> float:
        """How many times as many bytes one upload of theirs has."""
        return self.theirs.message / self.ours.message if self.ours.message else math.nan

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and (self.interval.high < 0 or self.interval.low > 0)


Results = Mapping[Track, Result]


def load_results(folder: Path) -> tuple[dict[Track, Result], list[Row]]:
    """Finished tracks in the study's order, and the lines of runs that failed."""
    rows = read_cells(folder)
    parts = by_track({cell: loss_of(row) for cell, row in rows.items()})
    results = {}
    for track in grid.tracks({}):
        losses = parts.get(track, {})
        if not losses or grid.next_cells(track, losses):
            continue
        rate_step, clip_step = grid.tuned(track, losses)
        final = tuple(rows[grid.Cell(track, seed, rate_step, clip_step)] for seed in track.setting.seeds)
        mean = {
            f"{rate:+g}, {clip:+d}": loss
            for clip in (0, *grid.CLIP_STEPS)
            for rate, loss in sorted(grid.tried(track, losses, clip).items())
        }
        results[track] = Result(track, final, grid.at_edge(track, losses), mean)
    return results, [row for row in rows.values() if "error" in row]


def duels(results: Results, arms: Iterable[str], reference: str = REFERENCE) -> list[Duel]:
    """Every arm against the reference in the same setting, where both are finished and the reference did not fail."""
    found = []
    for arm in arms:
        for track, ours in results.items():
            theirs = results.get(Track(reference, track.setting))
            if track.arm == arm and theirs is not None and not theirs.failed:
                found.append(Duel.of(ours, theirs))
    return found


def held_back(duel: Duel) -> bool:
    """Whether it is of the task that counts by itself."""
    return duel.ours.track.setting.task == grid.HELD_BACK


def equal_bytes(results: Results, arm: str) -> list[Duel]:
    """Ours with 64 times the clients of DP-LoRA: the same number of bytes goes up."""
    found = []
    for track, ours in results.items():
        setting = track.setting
        if track.arm != arm or setting.cohort != MANY:
            continue
        few = Setting(setting.trust, setting.task, setting.adapter, FEW, setting.epsilon)
        theirs = results.get(Track(REFERENCE, few))
        if theirs is not None and not theirs.failed:
            found.append(Duel.of(ours, theirs))
    return found


def against_comparators(results: Results, arms: Sequence[str] = OURS) -> list[Duel]:
    """Each comparator against the largest of our codes (of these arms) that takes no more bytes than its own."""
    found = []
    for track, theirs in results.items():
        if track.arm not in COMPARATORS or theirs.failed:
            continue
        mine = [results[other] for arm in arms if (other := Track(arm, track.setting)) in results]
        fitting = [ours for ours in mine if 0 < ours.bytes_up <= SAME_BYTES * theirs.bytes_up]
        if fitting:
            found.append(Duel.of(max(fitting, key=lambda ours: (ours.bytes_up, ours.code_size or 0)), theirs))
    return found
