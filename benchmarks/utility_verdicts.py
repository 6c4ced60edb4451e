"""The finish line of the utility study, counted. Nothing is typed by hand: no line, no verdict. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import utility_grid as grid
from utility_cells import Row
from utility_forecast import REACHED, forecasts
from utility_grid import COMPARATORS, EQUAL_BYTES_ARMS, FORESEEN, FOUR_BITS, OURS, Track
from utility_results import (
    AUTOMATIC,
    FEW,
    FREE_RATIO,
    MANY,
    REFERENCE,
    SAME_BYTES,
    Results,
    against_comparators,
    duels,
    equal_bytes,
    held_back,
)


@dataclass(frozen=True)
class Verdict:
    """`good` of `of` cells; met if that is at least (strictly: more than) the share `needed`. `whole`: no cell is missing."""

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


def verdicts(results: Results, geometry: Sequence[Row]) -> list[Verdict]:
    """The finish line of the issue, counted."""
    arm = AUTOMATIC
    both = duels(results, [AUTOMATIC])
    main, main_there = [duel for duel in both if not held_back(duel)], [duel for duel in both if held_back(duel)]
    noisy = [duel for duel in main if duel.ours.noisy]
    equal = {name: equal_bytes(results, name) for name in EQUAL_BYTES_ARMS}
    others, four_bits = against_comparators(results), against_comparators(results, FOUR_BITS)
    foreseen = forecasts(results, geometry)
    known = [one for one in foreseen if not held_back(one.duel)]
    known_there = [one for one in foreseen if held_back(one.duel)]
    errors = [abs(row["error"]) for place in geometry for row in place["distortion"]]

    def count(items: Sequence[Any], test: Callable[[Any], bool], whole: bool) -> tuple[int, int, bool]:
        return sum(map(test, items)), len(items), whole

    all_main, all_ours = _judged_everywhere(results), _finished(results, [*OURS, REFERENCE])
    all_others = _finished(results, [*OURS, *COMPARATORS])
    places = {(row["task"], row["adapter"]) for row in geometry}
    all_places = places >= {(task, adapter) for task in grid.TASKS for adapter in grid.ADAPTERS}
    return [
        Verdict("1a", f"{arm}: held-out loss no worse than tuned DP-LoRA, 1 % margin on the mean over seeds",
                *count(main, lambda duel: duel.no_worse, all_main)),
        Verdict("1b", "the same with the whole 95 % interval within the margin (stricter than asked)",
                *count(main, lambda duel: duel.surely_no_worse, all_main)),
        Verdict("1c", "the same unless the whole interval is beyond the margin (laxer than asked: what chance may explain passes)",
                *count(main, lambda duel: not duel.surely_worse and not duel.ours.failed, all_main)),
        Verdict("1d", f"{arm}: at 1/64 of DP-LoRA's bytes or fewer where noise dominates (k* < D/64)",
                *count(noisy, lambda duel: duel.fewer_bytes >= FREE_RATIO / SAME_BYTES, all_main)),
        *(Verdict(number, f"equal bytes: {name} with n = {MANY} better than DP-LoRA with n = {FEW}",
                  *count(equal[name], lambda duel: duel.better, _finished(results, [name, REFERENCE])))
          for number, name in zip(("2", "2b"), EQUAL_BYTES_ARMS, strict=True)),
        Verdict("3", f"equal clients: {arm} better than tuned DP-LoRA in half of the cells where noise dominates",
                *count(noisy, lambda duel: duel.better, all_main), needed=0.5),
        Verdict("4", "better than each comparator with no more bytes, in most cells",
                *count(others, lambda duel: duel.better, all_others), needed=0.5, strictly=True),
        Verdict("4b", "the same with the codes in four bits alone, as the product sends them (hybrid-64 is float32)",
                *count(four_bits, lambda duel: duel.better, all_others), needed=0.5, strictly=True),
        Verdict("5", "R of METHOD 2.6 names the winner in 80 % of the cells",
                *count(known, lambda one: one.right(one.gain), all_ours and all_places), needed=0.8),
        Verdict("5b", "the same, mended: D and D_P from noise as long as a run's, at the start (chosen after the fact)",
                *count(known, lambda one: one.right(one.mended), all_ours and all_places), needed=0.8),
        Verdict("5c", "first order, with the steps that tuning allowed: rho x our step / theirs (chosen after the fact)",
                *count(known, lambda one: one.right(one.progress), all_ours and all_places), needed=0.8),
        Verdict("5d", "the longest stable step: the gradient's energy over the sharpest curvature after one noisy step, ours / theirs (chosen after the fact)",
                *count(known, lambda one: one.right(one.stable), all_ours and all_places), needed=0.8),
        Verdict("5e", "5d where no geometry had been measured when it was chosen: hybrid-64, and the large adapter",
                *count([one for one in known if one.fresh], lambda one: one.right(one.stable), all_ours and all_places), needed=0.8),
        Verdict("5f", f"5b over {REACHED:g}, what DP-LoRA reaches of its best gain (chosen after the fact)",
                *count(known, lambda one: one.right(one.reached), all_ours and all_places), needed=0.8),
        Verdict("5g", "5f in duels that were fought after it was chosen: hybrid-64 at n 8 and with the large adapter",
                *count([one for one in known if one.tests_reached], lambda one: one.right(one.reached), _finished(results, FORESEEN) and all_places), needed=0.8),
        Verdict("5h", "no forecast, but what one could know: the method whose runs on the tuning seeds have the lower loss",
                *count(known, lambda one: one.right(one.rehearsed), all_ours and all_places), needed=0.8),
        Verdict("5i", "5d in settings whose 95 % interval leaves zero out",
                *count([one for one in known if one.duel.clear], lambda one: one.right(one.stable), all_ours and all_places), needed=0.8),
        Verdict("6", "distortion of kronecker on its own prior within 1 % of the water-filling value",
                *count(errors, lambda error: error <= 0.01, all_places)),
        Verdict("7a", f"{arm} on the held-back task: no worse than tuned DP-LoRA, 1 % margin",
                *count(main_there, lambda duel: duel.no_worse, all_main)),
        Verdict("7b", "R, mended, on the held-back task",
                *count(known_there, lambda one: one.right(one.mended), all_main), needed=0.8),
        Verdict("7c", "5c on the held-back task",
                *count(known_there, lambda one: one.right(one.progress), all_main), needed=0.8),
        Verdict("7d", "5d on the held-back task",
                *count(known_there, lambda one: one.right(one.stable), all_main), needed=0.8),
    ]  # fmt: skip


def _finished(results: Results, arms: Sequence[str]) -> bool:
    """Whether every track that the study declares for these arms is there."""
    return all(track in results for track in grid.tracks({}) if track.arm in arms)


def _judged_everywhere(results: Results) -> bool:
    """Whether the automatic size and the reference meet in every setting with noise."""
    wanted = [track.setting for track in grid.tracks({}) if track.arm == REFERENCE]
    return all(Track(AUTOMATIC, setting) in results for setting in wanted)
