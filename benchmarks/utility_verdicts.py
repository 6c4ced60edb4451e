"""From the lines of a utility study to paired differences and verdicts. Nothing is typed by hand: no line, no verdict. No torch.

A *result* is a finished track: its tuned cell on every final seed. A failed run counts as an infinite loss.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import utility_grid as grid
from utility_cells import GEOMETRY, Row, by_track, loss_of, read_cells
from utility_grid import COMPARATORS, OURS, Setting, Track

from drencoder.encoders.sizes import few_coordinates, message_bytes, noise_dominates
from drencoder.privacy.plan import ALIGNMENT
from drencoder.scores import Difference, paired_over_seeds

MARGIN = 0.01  # of DP-LoRA's loss
FREE_RATIO = 64  # of DP-LoRA's bytes: the code that has to be free where noise dominates
SAME_BYTES = 1.01  # headers and scales
REFERENCE, AUTOMATIC, SMALL_CODE = "dp-lora", "hybrid", "hybrid-10"
KIND, OTHER_KINDS = "gauss-newton", ("hessian", "finite")  # curvatures: the one that is judged, and what else is shown
MENDED = ("finite", "start")  # kind and stage
FLAT = 1e-6  # of a curvature
FEW, MANY = 8, 512  # 512 codes of 1/64 are as many bytes as 8 whole updates
EQUAL_BYTES_ARMS = ("hybrid-10", "hybrid-64")


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
        recipe = grid.base_recipe(self.track.setting, 0, grid.Scale()).changed(dict(grid.ARMS[self.track.arm].knobs))
        return message_bytes(self.code_size, recipe.wire_dtype) if self.code_size else 0

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


def against_comparators(results: Results) -> list[Duel]:
    """Each comparator against the largest of our codes that takes no more bytes than its own."""
    found = []
    for track, theirs in results.items():
        if track.arm not in COMPARATORS or theirs.failed:
            continue
        mine = [results[other] for arm in OURS if (other := Track(arm, track.setting)) in results]
        fitting = [ours for ours in mine if 0 < ours.bytes_up <= SAME_BYTES * theirs.bytes_up]
        if fitting:
            found.append(Duel.of(max(fitting, key=lambda ours: (ours.bytes_up, ours.code_size or 0)), theirs))
    return found


# --- the formula -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """R of METHOD 2.6 for one duel: `gains` by curvature and stage, each the geometric mean over seeds; `rho` that over stages, too.

    `stable`: the decrease of the loss along the longest stable step, to first order, over DP-LoRA's. A gradient (or its code) of energy
    E and a sharpest direction L, after one round's step with its noise, make it 2 E / L; median over seeds and step lengths.
    """

    duel: Duel
    gains: Mapping[tuple[str, str], float]
    rho: float
    stable: float

    @property
    def gain(self) -> float:
        """The forecast that is judged: the geometric mean over stages, with the curvature that has no negative directions."""
        return self.over_stages(KIND)

    @property
    def mended(self) -> float:
        """The same with what noise as long as a run's does to the loss at the start, where A's is invisible to derivatives (B = 0)."""
        return self.gains[MENDED]

    @property
    def progress(self) -> float:
        """rho x our step / theirs: the first-order gain of a round, with steps as long as tuning allowed instead of a quadratic's best."""
        return self.rho * _step(self.duel.ours) / _step(self.duel.theirs)

    def over_stages(self, kind: str) -> float:
        return math.exp(fmean(math.log(gain) for (other, _), gain in self.gains.items() if other == kind))

    def right(self, gain: float) -> bool:
        return (gain > 1) == self.duel.better


def _step(result: Result) -> float:
    """Rate x clip: what the server moves by when all updates are clipped."""
    return float(result.first("rate")) * float(result.first("clip"))


def load_geometry(folder: Path) -> list[Row]:
    path = folder / GEOMETRY
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


def forecasts(results: Results, geometry: Sequence[Row]) -> list[Forecast]:
    """R for every hybrid arm against DP-LoRA; none for a task and adapter whose geometry is not measured."""
    found = []
    for duel in duels(results, OURS):
        ours, setting = duel.ours, duel.ours.track.setting
        pairs = _paired_rows(geometry, ours)
        if not pairs or ours.failed or not math.isfinite(ours.k_star):
            continue
        logs: dict[tuple[str, str], list[float]] = {}
        for mine, whole in pairs:
            for kind in (KIND, *OTHER_KINDS):
                logs.setdefault((kind, mine["stage"]), []).append(math.log(gain(mine, whole, ours, kind)))
        rho = math.exp(fmean(math.log(code_of(mine, ours)["rho"]) for mine, _ in pairs))
        steps = [_steps(mine, whole, setting, ours.ratio) for mine, whole in pairs if mine["stage"] == "start"]
        if not all(steps):
            continue
        stable = median(ratio for mine, whole in steps for ratio in _decreases(mine, whole))
        gains = {place: math.exp(fmean(values)) for place, values in logs.items()}
        found.append(Forecast(duel, gains, rho, stable))
    return found


def _paired_rows(geometry: Sequence[Row], ours: Result) -> list[tuple[Row, Row]]:
    """(where the code's run starts, where DP-LoRA's does) per stage and seed; those that have the code."""
    setting = ours.track.setting
    here = {
        (row["start"], row["stage"], row["seed"]): row
        for row in geometry
        if (row["task"], row["adapter"]) == (setting.task, setting.adapter)
    }
    start = "public" if few_coordinates(ours.k_star) else "peft"
    pairs = [
        (row, here["peft", stage, seed])
        for (where, stage, seed), row in here.items()
        if where == start and ("peft", stage, seed) in here
    ]
    return [(mine, whole) for mine, whole in pairs if code_of(mine, ours)]


def stages(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in rows))


def measured_k_star(row: Row, result: Result) -> float:
    """k* with the alignment of this geometry instead of one half."""
    return result.k_star * row["alignment"] / ALIGNMENT


def gain(mine: Row, whole: Row, result: Result, kind: str) -> float:
    """R = rho^2 (1 + D/k*) / (rho + rho' D_P/k*), with the measures of the code that ran; times what another start of A makes of
    |g|^2 / lambda, the gain of a noiseless step."""
    code, k_star = code_of(mine, result), measured_k_star(mine, result)
    rho, inside = code["rho"], code["rho_client"] * code["D_P"][kind]
    ours = rho**2 / (rho + inside / k_star)
    theirs = 1 / (1 + whole["D"][kind] / measured_k_star(whole, result))
    starts = (mine["mean_norm"] / whole["mean_norm"]) ** 2 * abs(whole["lambda"][kind] / mine["lambda"][kind])
    return starts * ours / theirs


def code_of(row: Row, result: Result) -> Row:
    """The measures of a hybrid code of this size; empty if they were not taken."""
    fitting = [one for one in row["codes"] if math.isclose(one["ratio"], result.ratio, rel_tol=0.05)]
    return fitting[0] if fitting else {}


def _steps(mine: Row, whole: Row, setting: Setting, ratio: float) -> tuple[Row, Row] | None:
    """The code's step and DP-LoRA's in this setting; None if one was not measured."""
    ours = [
        step
        for step in mine["steps"]
        if step["setting"] == str(setting) and step["ratio"] and math.isclose(step["ratio"], ratio, rel_tol=0.05)
    ]
    theirs = [step for step in whole["steps"] if step["setting"] == str(setting) and step["ratio"] is None]
    return (ours[0], theirs[0]) if ours and theirs else None


def _decreases(mine: Row, whole: Row) -> list[float]:
    """Ours over theirs at each step length. A sharpness that rounding has made negative counts as flat."""
    pairs = zip(mine["sharpest"], whole["sharpest"], strict=True)
    return [mine["energy"] * max(theirs, FLAT) / (whole["energy"] * max(ours, FLAT)) for ours, theirs in pairs]


# --- verdicts --------------------------------------------------------------------------------------------


def verdicts(results: Results, geometry: Sequence[Row]) -> list[Verdict]:
    """The finish line of the issue, counted."""
    arm = AUTOMATIC
    both = duels(results, [AUTOMATIC])
    main, main_there = [duel for duel in both if not held_back(duel)], [duel for duel in both if held_back(duel)]
    noisy = [duel for duel in main if duel.ours.noisy]
    equal = {name: equal_bytes(results, name) for name in EQUAL_BYTES_ARMS}
    others = against_comparators(results)
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
        Verdict("5", "R of METHOD 2.6 names the winner in 80 % of the cells",
                *count(known, lambda one: one.right(one.gain), all_ours and all_places), needed=0.8),
        Verdict("5b", "the same, mended: D and D_P from noise as long as a run's, at the start (chosen after the fact)",
                *count(known, lambda one: one.right(one.mended), all_ours and all_places), needed=0.8),
        Verdict("5c", "first order, with the steps that tuning allowed: rho x our step / theirs (chosen after the fact)",
                *count(known, lambda one: one.right(one.progress), all_ours and all_places), needed=0.8),
        Verdict("5d", "the longest stable step: the gradient's energy over the sharpest curvature after one noisy step, ours / theirs (chosen after the fact)",
                *count(known, lambda one: one.right(one.stable), all_ours and all_places), needed=0.8),
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
