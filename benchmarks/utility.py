"""Does an encoded, differentially private federated run lose nothing against tuned DP-LoRA? A resumable study.

    python benchmarks/utility.py --out DIR [--processes 2] [--minutes 60] [--only arms=dp-lora,hybrid-64 cohorts=8,64 ...]
    python benchmarks/utility.py --out DIR --page [--results docs/results]
    python benchmarks/utility.py --out DIR --from docs/results [--page]    (a new folder out of what a page keeps)
    python benchmarks/utility.py --out DIR --status
    python benchmarks/utility.py --smoke

Every cell is one whole run of the product with its ledger and certificate, whose facts become one line of DIR/cells.jsonl; the run
folder is removed. Killed at any time, the same command goes on with the cells that have no line (`drencoder.study`).
utility_study/grid.py declares what runs where and how it is tuned; utility_study/page.py makes the tables, figures and verdicts from the lines alone.
"""

import argparse
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from utility_study import grid
from utility_study.archive import read_study, restore
from utility_study.grid import Scale, setting_of
from utility_study.page import write_page

from drencoder.errors import DrencoderError
from drencoder.study.cell_run import federated
from drencoder.study.cells import STUDY, Cell, CellStore, Row, Track, loss_of, read_rows
from drencoder.study.pool import run_study, stored_results
from drencoder.study.tuning import most_cells, next_cells


def run_arm(cell: Cell, scale: Scale, folder: Path) -> Row:
    """The row of one cell, in a worker process."""
    from drencoder.runs.plan_overview import privacy_plan

    setting = setting_of(cell.track)
    plan = privacy_plan(grid.base_recipe(cell.track, cell.seed, scale))
    k_star = math.inf if plan.non_private else plan.k_star()
    rate, clip = grid.rate_and_clip(cell, k_star)
    row: Row = {
        "arm": cell.track.method,
        "setting": asdict(setting) | {"epsilon": cell.track.epsilon},
        "rate": rate,
        "clip": clip,
        "k_star": None if math.isinf(k_star) else k_star,
        "noise_multiplier": plan.noise_multiplier,
    }
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        row |= federated(grid.recipe_of(cell, scale, k_star), Path(temporary) / "run")
    return row


class Printer:
    """One line per cell that is finished now."""

    def __init__(self, tracks: Sequence[Track], stored: int) -> None:
        self._total = sum(most_cells(setting_of(track).plan) for track in tracks)
        self._stored, self._done = stored, 0

    def cell_done(self, cell: Cell, row: Row) -> None:
        self._done += 1
        if self._done > self._stored:
            outcome = row.get("error") or f"loss {loss_of(row):.4f}"
            print(f"{self._done:5d}/{self._total} {cell.key}: {outcome} ({row['seconds']:.1f} s)", flush=True)


def study(folder: Path, tracks: Sequence[Track], scale: Scale, processes: int, minutes: float) -> None:
    """Runs what is missing, in order."""
    with CellStore(folder, {"scale": asdict(scale)}) as store:
        for left in folder.glob("running-*"):  # by a start that was killed
            shutil.rmtree(left, ignore_errors=True)
        if changed := cells_of_other_rates(store.rows):
            sys.exit(f"{len(changed)} cells of {folder} had other learning rates ({changed[0]}): give another --out.")
        plans = grid.plans_of(tracks)
        printer = Printer(tracks, len(stored_results(tracks, plans, store.rows)))
        with tempfile.TemporaryDirectory(dir=folder, prefix="running-") as running:
            work = partial(run_arm, scale=scale, folder=Path(running))
            outcome = run_study(tracks, plans, store, work, printer, processes=processes, minutes=minutes)
    for track, error in outcome.given_up.items():
        print(f"{track} BROKE:\n{''.join(traceback.format_exception(error))}", flush=True)
    if outcome.given_up:
        sys.exit("The tracks above were given up, which is no result of theirs. The same command tries them again.")


def cells_of_other_rates(rows: dict[str, Row]) -> list[str]:
    """Keys of the cells that would have another rate or clip today, since the study's constants were changed."""
    changed = []
    for track in grid.tracks({}):
        for cell, row in stored_results([track], grid.plans_of([track]), rows).items():
            k_star = math.inf if row.get("k_star") is None else row["k_star"]
            today = grid.rate_and_clip(cell, k_star)
            if "rate" in row and not all(map(partial(math.isclose, rel_tol=1e-6), today, (row["rate"], row["clip"]))):
                changed.append(cell.key)
    return changed


def print_status(folder: Path, tracks: Sequence[Track]) -> None:
    """Finished tracks and seconds per cell, by setting and arm."""
    rows, groups = read_rows(folder), dict[tuple[str, str, int, str], list[Track]]()
    for track in tracks:
        setting = setting_of(track)
        groups.setdefault((setting.trust, setting.adapter, setting.cohort, track.method), []).append(track)
    for (trust, adapter, cohort, arm), group in groups.items():
        finished, seconds = 0, []
        for track in group:
            plan = setting_of(track).plan
            known = stored_results([track], {track: plan}, rows)
            finished += not next_cells(track, plan, {cell: loss_of(row) for cell, row in known.items()})
            seconds += [row["seconds"] for row in known.values()]
        mean = f"{sum(seconds) / len(seconds):.1f} s a cell" if seconds else "not begun"
        print(f"{trust:12s} {adapter:6s} n{cohort:<4d} {arm:16s} {finished} of {len(group)} tracks done, {mean}")
    print(f"{len(rows)} cells, {sum(row['seconds'] for row in rows.values()) / 3600:.2f} hours of one core")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the study's folder; an old one is gone on with")
    parser.add_argument(
        "--smoke", action="store_true", help="two short cells in a folder of their own, to see that the script works"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after this many")
    kinds = "trusts, tasks, adapters, cohorts, epsilons, arms"
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND=VALUE,VALUE", help=f"of {kinds}")
    for declared in fields(Scale):
        parser.add_argument(f"--{declared.name.replace('_', '-')}", type=int, default=None, help="of another scale")
    parser.add_argument("--page", action="store_true", help="write utility.md, utility.json and figures instead")
    parser.add_argument("--from", dest="origin", type=Path, help="begin with the cells kept beside a results page")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--status", action="store_true", help="say what is done, and start nothing")
    args = parser.parse_args()
    if args.out is None and not args.smoke:
        parser.error("name a folder for the study: --out DIR")
    return args


def filters(texts: Sequence[str]) -> dict[str, list[str]]:
    """`--only` as values by kind."""
    known = grid.filter_values()
    only = {}
    for text in texts:
        kind, equals, values = text.partition("=")
        if kind not in known or not equals:
            sys.exit(f"--only {text!r}: write KIND=VALUE,VALUE with a kind of {', '.join(sorted(known))}.")
        only[kind] = values.split(",")
        if strange := sorted(set(only[kind]) - known[kind]):
            sys.exit(
                f"--only {text!r}: {kind} has no {', '.join(strange)}; name some of {', '.join(sorted(known[kind]))}."
            )
    return only


def scale_of(args: argparse.Namespace) -> Scale:
    """What the command line says; what it leaves open is as in the folder's study, or the default of a new one."""
    known = asdict(grid.scale_of(read_study(args.out)["scale"])) if (args.out / STUDY).is_file() else {}
    given = {declared.name: getattr(args, declared.name) for declared in fields(Scale)}
    return Scale(**known | {name: value for name, value in given.items() if value is not None})


def smoke() -> None:
    """Two cells of one track with one round each, and nothing kept."""
    with tempfile.TemporaryDirectory() as folder:
        tracks = grid.tracks(
            filters(["trusts=central", "adapters=small", "cohorts=8", "tasks=letters", "epsilons=4", "arms=dp-lora"])
        )
        setting, out = setting_of(tracks[0]), Path(folder)
        cells = next_cells(tracks[0], setting.plan, {})[:2]
        rows = [run_arm(cell, Scale(rounds=1, examples=4), out) for cell in cells]
        print(*(f"{cell.key}: loss {loss_of(row):.4f}" for cell, row in zip(cells, rows, strict=True)), sep="\n")


def main() -> None:
    args = arguments()
    if args.smoke:
        return smoke()
    tracks = grid.tracks(filters(args.only))
    try:
        if args.origin:
            restore(args.origin, args.out)
        if args.status:
            print_status(args.out, tracks)
        elif args.page:
            write_page(args.out, args.results)
        else:
            runnable = [track for track in tracks if not grid.ARMS[track.method].retired]
            study(args.out, runnable, scale_of(args), args.processes, args.minutes)
    except DrencoderError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished cells are kept: start the same command again to go on.")


if __name__ == "__main__":
    main()
