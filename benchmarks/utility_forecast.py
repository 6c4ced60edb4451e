"""Who should win, from measured geometry alone: R of METHOD 2.6, what mends it, and the longest stable step. No torch."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from utility_cells import GEOMETRY, Row
from utility_grid import FORESEEN, TEST_ARM, Setting
from utility_results import Duel, Result, Results, duels

from drencoder.encoders.code_sizes import few_coordinates
from drencoder.privacy.plan import ALIGNMENT

KIND, OTHER_KINDS = "gauss-newton", ("hessian", "finite")  # curvatures: the one that is judged, and what else is shown
MENDED = ("finite", "start")  # kind and stage
# R takes the best step of a quadratic for both, which DP-LoRA's products of A and B do not allow it (docs/log.md, sixth round). What it
# reaches of its best gain was read off the 40 duels of the eighth round: of the eight codes whose mended R is 0.50 or less six lose, of the
# 32 with 0.61 or more one.
REACHED = 0.55
FLAT = 1e-6  # of a curvature


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
    def reached(self) -> float:
        """`mended` over what DP-LoRA reaches of its best gain."""
        return self.mended / REACHED

    @property
    def progress(self) -> float:
        """rho x our step / theirs: the first-order gain of a round, with steps as long as tuning allowed instead of a quadratic's best."""
        return self.rho * _step(self.duel.ours) / _step(self.duel.theirs)

    @property
    def rehearsed(self) -> float:
        """DP-LoRA's least mean loss on the tuning seeds over ours. Not a forecast: what the very runs foretell of their own repetition on
        other seeds, which bounds what can be asked of one."""
        return min(self.duel.theirs.tuning.values()) / min(self.duel.ours.tuning.values())

    @property
    def fresh(self) -> bool:
        """Whether `stable` was chosen without this duel's geometry."""
        track = self.duel.ours.track
        return track.arm in ("hybrid-64", TEST_ARM) or track.setting.adapter == "large"

    @property
    def tests_reached(self) -> bool:
        """Whether REACHED was chosen before this duel was fought."""
        return self.duel.ours.track.arm == TEST_ARM

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
    for duel in duels(results, FORESEEN):
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


def stages_of(rows: Iterable[Row]) -> list[str]:
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
