"""The study's table in the README, between two marks, so that no figure is typed by hand. No torch."""

import math
import sys
from pathlib import Path

from utility_cells import replace_text
from utility_forecast import REACHED, forecasts, load_geometry
from utility_grid import EQUAL_BYTES_ARMS, HELD_BACK
from utility_plots import name
from utility_results import (
    AUTOMATIC,
    FEW,
    FREE_RATIO,
    MANY,
    Duel,
    Results,
    duels,
    equal_bytes,
    held_back,
    load_results,
)
from utility_text import right_share, table
from utility_verdicts import verdicts

BEGIN, END = "<!-- benchmarks/utility.py: begin -->", "<!-- benchmarks/utility.py: end -->"
HEAD = ["setting (*: noise dominates)", "k*", "values, bytes sent", "hybrid", "DP-LoRA", "Δ loss", "right, hybrid / DP-LoRA"]  # fmt: skip


def refresh(readme: Path, study: Path) -> None:
    """Writes the table and the counts anew; everything outside of the marks stays as it is."""
    text = readme.read_text("utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{readme} must have {BEGIN} and {END} once each: put them where the table belongs.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    results, _ = load_results(study)
    found = [duel for duel in duels(results, [AUTOMATIC]) if not duel.ours.failed]
    body = (
        f"{BEGIN}\n{table(HEAD, list(map(_row, found)))}\n\n{_counts(found, results)}{_formula(results, study)}\n{END}"
    )
    replace_text(readme, before + body + after)
    print(f"{len(found)} settings -> {readme}")


def _row(duel: Duel) -> list[str]:
    ours, theirs = duel.ours, duel.theirs
    digits = 3 if theirs.loss < 0.5 else 2
    sizes = f"1/{ours.ratio:.0f}, 1/{duel.fewer_bytes:.0f}"
    losses = [f"{result.loss:.{digits}f}" for result in (ours, theirs)]
    right = " / ".join(right_share(result) for result in (ours, theirs))
    setting = name(duel).replace(HELD_BACK, f"{HELD_BACK} (held back)")
    return [setting, f"{ours.k_star:,.0f}", sizes, *losses, f"{duel.relative:+.0%}", right]


def _counts(found: list[Duel], results: Results) -> str:
    main = [duel for duel in found if not held_back(duel)]
    said = []
    for words, some in (
        ("Where noise does not dominate", [duel for duel in main if not duel.ours.noisy]),
        (f"Where it does (k* < D/{FREE_RATIO})", [duel for duel in main if duel.ours.noisy]),
        (f"On `{HELD_BACK}`, by which nothing was chosen,", [duel for duel in found if held_back(duel)]),
    ):
        if some:
            said.append(
                f"{words} {sum(duel.no_worse for duel in some)} of {len(some)} settings lose nothing beyond 1 % and "
                f"{sum(duel.better for duel in some)} win ({_range(some)}; the interval leaves zero out in "
                f"{sum(duel.clear and duel.better for duel in some)} that win and {sum(duel.clear and not duel.better for duel in some)} that lose), at 1/"
                f"{min(duel.fewer_bytes for duel in some):.0f} of the bytes or less."
            )
    for arm in EQUAL_BYTES_ARMS:
        if equal := equal_bytes(results, arm):
            good = sum(duel.better for duel in equal)
            said.append(
                f"For equal bytes, {MANY} clients with `{arm}` against {FEW} with whole updates, it is better in {good} of {len(equal)} settings ({_range(equal)})."
            )
    return "\n".join(said)


def _formula(results: Results, study: Path) -> str:
    """How often R named the winner; nothing where no geometry was measured."""
    geometry = load_geometry(study)
    counts = {one.number: one for one in verdicts(results, geometry)}
    if not counts["5"].of:
        return ""
    ours = sum(one.duel.better for one in forecasts(results, geometry) if not held_back(one.duel))
    return (
        f"\nThe formula that was to name the winner is right in {counts['5'].count} duels (of a code of a size with DP-LoRA, in a setting), with a curvature that sees what A's noise "
        f"does in {counts['5b'].count} (held-back task {counts['7b'].count}), that over {REACHED:g} in {counts['5f'].count} (chosen on 40 of these; {counts['5g'].count} of those fought afterwards), and with steps as long as sharpness after a noisy step allows in {counts['5d'].count} "
        f"(held-back task {counts['7d'].count}; a choice after the fact; where it was tested afterwards {counts['5e'].count}; always naming the code would be right in {ours}; "
        f"the tuning runs of the two methods name {counts['5h'].count} of the winners of other seeds)."
    )


def _range(found: list[Duel]) -> str:
    gains = [duel.relative for duel in found if math.isfinite(duel.relative)]
    return f"Δ {min(gains):+.0%} to {max(gains):+.0%}"
