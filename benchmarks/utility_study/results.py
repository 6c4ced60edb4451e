"""From the rows of a utility study to finished tracks, paired differences and verdicts. No torch.

A *result* is a finished track: its tuned cell on every judged seed. A failed run counts as an infinite loss. A *comparison* is
two results on the same seeds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from drencoder.encoders.code_sizes import message_bytes, noise_dominates
from drencoder.evaluation.statistics import Difference, paired_over_seeds
from drencoder.study.cells import Cell, Row, Track, loss_of
from drencoder.study.pool import stored_results
from drencoder.study.tuning import is_at_edge, next_cells, tuned_steps, tuning_losses
from utility_study import grid
from utility_study.grid import COMPARATORS, OURS, Setting, setting_of

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
    def setting(self) -> Setting:
        return setting_of(self.track)

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
            value: Any = row
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
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
        return self.setting.adapter_size / self.code_size if self.code_size else math.nan

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
        return noise_dominates(self.setting.adapter_size, self.k_star)


@dataclass(frozen=True)
class Comparison:
    """Two results, on the seeds that both were judged on."""

    ours: Result
    theirs: Result

    @classmethod
    def of(cls, ours: Result, theirs: Result) -> "Comparison":
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


def load_results(rows: Mapping[str, Row]) -> tuple[dict[Track, Result], list[Row]]:
    """Finished tracks in the study's order, and the rows of runs that failed."""
    results = {}
    for track in grid.tracks({}):
        plan = setting_of(track).plan
        known = stored_results([track], {track: plan}, rows)
        losses = {cell: loss_of(row) for cell, row in known.items()}
        if not losses or next_cells(track, plan, losses):
            continue
        judged = tuple(known[Cell(track, seed, *tuned_steps(plan, losses))] for seed in plan.seeds)
        mean = {
            f"{rate:+g}, {clip:+d}": loss
            for clip in (0, *plan.clip_steps)
            for rate, loss in sorted(tuning_losses(plan, losses, clip).items())
        }
        results[track] = Result(track, judged, is_at_edge(plan, losses), mean)
    return results, [row for row in rows.values() if "error" in row]


def compare_arms(results: Results, arms: Iterable[str], reference: str = REFERENCE) -> list[Comparison]:
    """Every arm against the reference in the same setting, where both are finished and the reference did not fail."""
    pairs = []
    for arm in arms:
        for track, ours in results.items():
            theirs = results.get(replace(track, method=reference))
            if track.method == arm and theirs is not None and not theirs.failed:
                pairs.append(Comparison.of(ours, theirs))
    return pairs


def held_back(pair: Comparison) -> bool:
    """Whether it is of the task that counts by itself."""
    return pair.ours.setting.task == grid.HELD_BACK


def equal_bytes(results: Results, arm: str) -> list[Comparison]:
    """Ours with 64 times the clients of DP-LoRA: the same number of bytes goes up."""
    pairs = []
    for track, ours in results.items():
        if track.method != arm or ours.setting.cohort != MANY:
            continue
        few = replace(ours.setting, cohort=FEW)
        theirs = results.get(few.track(REFERENCE, track.epsilon))
        if theirs is not None and not theirs.failed:
            pairs.append(Comparison.of(ours, theirs))
    return pairs


def against_comparators(results: Results, arms: Sequence[str] = OURS) -> list[Comparison]:
    """Each comparator against the largest of our codes (of these arms) that takes no more bytes than its own."""
    pairs = []
    for track, theirs in results.items():
        if track.method not in COMPARATORS or theirs.failed:
            continue
        mine = [results[other] for arm in arms if (other := replace(track, method=arm)) in results]
        fitting = [ours for ours in mine if 0 < ours.bytes_up <= SAME_BYTES * theirs.bytes_up]
        if fitting:
            pairs.append(Comparison.of(max(fitting, key=lambda ours: (ours.bytes_up, ours.code_size or 0)), theirs))
    return pairs


# --- claims ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`good` of `of` settings; met if that is at least (strictly: more than) the share `needed`. `whole`: no setting is missing."""

    number: str
    claim: str
    good: int
    of: int
    whole: bool
    needed: float = 1.0
    strictly: bool = False

    @property
    def count(self) -> str:
        return f"{self.good} of {self.of}"

    @property
    def word(self) -> str:
        if not self.of:
            return "not measured"
        share = self.good / self.of
        met = share > self.needed if self.strictly else share >= self.needed
        return ("met" if met else "NOT met") + ("" if self.whole else " so far")


def verdicts(results: Results) -> list[Verdict]:
    """The claims that the study was made to test, counted. Nothing is typed by hand: no row, no verdict."""
    both = compare_arms(results, [AUTOMATIC])
    main, held = [pair for pair in both if not held_back(pair)], [pair for pair in both if held_back(pair)]
    noisy = [pair for pair in main if pair.ours.noisy]
    others, four_bits = against_comparators(results), against_comparators(results, grid.FOUR_BITS)

    def count(pairs: Sequence[Comparison], test: Callable[[Comparison], bool], whole: bool) -> tuple[int, int, bool]:
        return sum(map(test, pairs)), len(pairs), whole

    all_main, all_others = _finished(results, [AUTOMATIC, REFERENCE]), _finished(results, [*OURS, *COMPARATORS])
    return [
        Verdict("1a", f"{AUTOMATIC}: held-out loss no worse than tuned DP-LoRA, 1 % margin on the mean over seeds",
                *count(main, lambda pair: pair.no_worse, all_main)),
        Verdict("1b", "the same with the whole 95 % interval within the margin (stricter than asked)",
                *count(main, lambda pair: pair.surely_no_worse, all_main)),
        Verdict("1c", "the same unless the whole interval is beyond the margin (laxer than asked: what chance may explain passes)",
                *count(main, lambda pair: not pair.surely_worse and not pair.ours.failed, all_main)),
        Verdict("1d", f"{AUTOMATIC}: at 1/64 of DP-LoRA's bytes or fewer where noise dominates (k* < D/64)",
                *count(noisy, lambda pair: pair.fewer_bytes >= FREE_RATIO / SAME_BYTES, all_main)),
        *(Verdict(number, f"equal bytes: {name} with n = {MANY} better than DP-LoRA with n = {FEW}",
                  *count(equal_bytes(results, name), lambda pair: pair.better, _finished(results, [name, REFERENCE])))
          for number, name in zip(("2", "2b"), grid.EQUAL_BYTES_ARMS, strict=True)),
        Verdict("3", f"equal clients: {AUTOMATIC} better than tuned DP-LoRA in half of the settings where noise dominates",
                *count(noisy, lambda pair: pair.better, all_main), needed=0.5),
        Verdict("4", "better than each comparator with no more bytes, in most settings",
                *count(others, lambda pair: pair.better, all_others), needed=0.5, strictly=True),
        Verdict("4b", "the same with the codes in four bits alone, as the product sends them (hybrid-64 is float32)",
                *count(four_bits, lambda pair: pair.better, all_others), needed=0.5, strictly=True),
        Verdict("7", f"{AUTOMATIC} on the held-back task: no worse than tuned DP-LoRA, 1 % margin",
                *count(held, lambda pair: pair.no_worse, all_main)),
    ]  # fmt: skip


def _finished(results: Results, arms: Sequence[str]) -> bool:
    """Whether every track that the study declares for these arms is there."""
    return all(track in results for track in grid.tracks({}) if track.method in arms)
