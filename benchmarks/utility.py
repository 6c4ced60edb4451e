"""Does an encoded, differentially private federated run lose nothing against tuned DP-LoRA? A resumable study (issue 4).

    python benchmarks/utility.py --out DIR [--processes 2] [--minutes 60] [--only arms=dp-lora,hybrid-64 cohorts=8,64 ...]
    python benchmarks/utility.py --out DIR --geometry
    python benchmarks/utility.py --out DIR --page [--results docs/results] [--readme README.md]
    python benchmarks/utility.py --out DIR --from docs/results [--page]    (a new folder out of what a page keeps)
    python benchmarks/utility.py --out DIR --status
    python benchmarks/utility.py --out DIR --rounds 2 --examples 32 --questions 8 --only ...    (a smoke test)

Every cell is one whole run of the product with its ledger and certificate, whose facts become one line of DIR/cells.jsonl; the
run folder is removed. Killed at any time, the same command goes on with the cells that have no line. What runs where, with which
tuning, is declared in utility_grid.py; the table, plots and verdicts are made by utility_table.py from the lines alone.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import utility_grid as grid
from utility_cells import (
    CELLS,
    GEOMETRY,
    STUDY,
    Row,
    by_track,
    claim,
    loss_of,
    other_rates,
    read_cells,
    read_study,
    restore,
)
from utility_grid import Cell, Scale, Track

_WATCH_S = 5.0


# --- one cell, in a worker -------------------------------------------------------------------------------


def start_worker(parent: int) -> None:
    """One thread each; a worker whose parent was killed ends itself, as nobody would read its result."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cell(cell: Cell, scale: Scale, folder: Path) -> Row:
    """The line of one cell. A run that cannot be or that diverges has `error` and no loss."""
    from drencoder import __version__  # torch is loaded in the worker, after its thread count is set
    from drencoder.errors import ArtifactError, DrencoderError
    from drencoder.runs import run as experiment  # torch is loaded in the worker, after its thread count is set
    from drencoder.runs.plan_overview import privacy_plan

    started = time.monotonic()
    plan = privacy_plan(grid.base_recipe(cell.track.setting, cell.seed, scale))
    k_star = math.inf if plan.non_private else plan.k_star()
    rate, clip = grid.rate_and_clip(cell, k_star)
    row: Row = {
        "key": cell.key,
        "setting": asdict(cell.track.setting),
        "arm": cell.track.arm,
        "seed": cell.seed,
        "rate_step": cell.rate_step,
        "clip_step": cell.clip_step,
        "rate": rate,
        "clip": clip,
        "version": __version__,
        "k_star": None if math.isinf(k_star) else k_star,
        "noise_multiplier": plan.noise_multiplier,
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            recipe = grid.recipe_of(cell, scale, k_star)
            row |= facts(
                experiment.run(recipe, Path(temporary) / "run").certificate, grid.asks_letters(cell.track.setting)
            )
    except ArtifactError:  # a full disk is no result: it may be otherwise tomorrow
        raise
    except DrencoderError as error:
        row["error"] = str(error)
    return row | {"seconds": round(time.monotonic() - started, 2)}


def facts(certificate: Mapping[str, Any], with_accuracy: bool) -> Row:
    """What the study keeps of a certificate."""
    results, encoder = certificate["results"], certificate["encoder"]
    kept = ("name", "code_size", "update_size", "head", "directions", "random", "expected_capture")
    gate = {key: value for key, value in encoder.items() if key.startswith("gate_public_")}

    def accuracy(model: str) -> dict[str, float]:
        known = results[model]["accuracy"] if with_accuracy else {}
        return {name: round(estimate["value"], 5) for name, estimate in known.items()}

    return {
        "loss": results["this run"]["loss"],
        "accuracy": accuracy("this run"),
        "base": {"loss": results["base model"]["loss"]["value"], "accuracy": accuracy("base model")},
        "zero": {"loss": results["zero update"]["loss"]["value"], "accuracy": accuracy("zero update")},
        "bytes_up": certificate["bytes"]["uploaded"],
        "rounds": certificate["rounds"],
        "epsilon": {name: observer["by_relation"]["add_remove"]["epsilon_pld"] for name, observer in certificate["observers"].items()},
        "encoder": {key: encoder[key] for key in kept if key in encoder} | gate,
    }  # fmt: skip


# --- the loop --------------------------------------------------------------------------------------------


def study(folder: Path, tracks: Sequence[Track], scale: Scale, processes: int, minutes: float) -> list[Track]:
    """Runs what is missing, in order; every finished cell is on disk before the next is asked for.

    Returns the tracks that were given up because a run of theirs broke: not a result, so nothing of it is stored.
    """
    rows = read_cells(folder)
    if changed := other_rates(rows):
        sys.exit(f"{len(changed)} cells of {folder} had other learning rates ({changed[0]}): give another --out.")
    losses = {cell: loss_of(row) for cell, row in rows.items()}
    running = folder / "running"
    running.mkdir()
    started, total = time.monotonic(), grid.most_cells(tracks)
    pending: dict[Future[Row], Cell] = {}
    broken: list[Track] = []
    pool = ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (os.getpid(),))
    lines = (folder / CELLS).open("a", encoding="utf-8")
    try:
        while True:
            timely = time.monotonic() - started < 60 * minutes
            left = [track for track in tracks if track not in broken] if timely else []
            for cell in wanted(left, losses, set(pending.values()))[: processes - len(pending)]:
                pending[pool.submit(run_cell, cell, scale, running)] = cell
            if not pending:
                return broken
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                cell = pending.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    sys.exit(
                        "a worker process died (out of memory?): give fewer --processes and start the command again."
                    )
                except Exception:  # an arm's bug must not end the night of all others
                    print(f"{cell.key} BROKE:\n{traceback.format_exc()}", flush=True)
                    broken.append(cell.track)
                    continue
                store(lines, row)
                losses[cell] = loss_of(row)
                outcome = row.get("error") or f"loss {losses[cell]:.4f}"
                print(f"{done(tracks, losses):5d}/{total} {cell.key}: {outcome} ({row['seconds']:.1f} s)", flush=True)
    finally:
        lines.close()
        if pending:  # interrupted: do not wait for what runs
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(running, ignore_errors=True)


def store(lines: TextIO, row: Row) -> None:
    """One line, on the disk when this returns."""
    lines.write(json.dumps(row) + "\n")
    lines.flush()
    os.fsync(lines.fileno())


def wanted(tracks: Sequence[Track], losses: grid.Losses, taken: set[Cell]) -> list[Cell]:
    """Cells to run next, first track first."""
    per_track = by_track(losses)
    found = (cell for track in tracks for cell in grid.next_cells(track, per_track.get(track, {})))
    return [cell for cell in found if cell not in taken]


def done(tracks: Sequence[Track], losses: grid.Losses) -> int:
    here = set(tracks)
    return sum(cell.track in here for cell in losses)


def print_status(folder: Path, tracks: Sequence[Track]) -> None:
    """Finished tracks and seconds per cell, by adapter, cohort and arm."""
    rows = read_cells(folder)
    parts = by_track({cell: loss_of(row) for cell, row in rows.items()})
    groups: dict[tuple[str, str, int, str], list[Track]] = {}
    for track in tracks:
        setting = track.setting
        groups.setdefault((setting.trust, setting.adapter, setting.cohort, track.arm), []).append(track)
    for (trust, adapter, cohort, arm), group in groups.items():
        finished = sum(not grid.next_cells(track, parts.get(track, {})) for track in group)
        seconds = [row["seconds"] for cell, row in rows.items() if cell.track in group]
        mean = f"{sum(seconds) / len(seconds):.1f} s a cell" if seconds else "not begun"
        print(f"{trust:12s} {adapter:6s} n{cohort:<4d} {arm:16s} {finished} of {len(group)} tracks done, {mean}")
    print(f"{len(rows)} cells, {sum(row['seconds'] for row in rows.values()) / 3600:.2f} hours of one core")


# --- the command line ------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the study's folder; an old one is gone on with")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after this many")
    kinds = "trusts, tasks, adapters, cohorts, epsilons, arms"
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND=VALUE,VALUE", help=f"of {kinds}")
    for declared in fields(Scale):
        parser.add_argument(f"--{declared.name.replace('_', '-')}", type=int, default=None, help="of another scale")
    parser.add_argument("--geometry", action="store_true", help="measure rho, rho', D and D_P instead")
    parser.add_argument("--page", action="store_true", help="write utility.md, utility.json and plots instead")
    parser.add_argument("--from", dest="origin", type=Path, help="begin with the cells kept beside a results page")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, help="with --page: put the study's table into this README, too")
    parser.add_argument("--status", action="store_true", help="say what is done, and start nothing")
    return parser.parse_args()


def filters(texts: Sequence[str]) -> dict[str, list[str]]:
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


def wanted_scale(args: argparse.Namespace) -> Scale:
    """What the command line says; what it leaves open is as in the folder's study, or the default of a new one."""
    known = read_study(args.out)["scale"] if (args.out / STUDY).is_file() else {}
    said = {declared.name: getattr(args, declared.name) for declared in fields(Scale)}
    return Scale(**known | {name: value for name, value in said.items() if value is not None})


def main() -> None:
    args = arguments()
    if args.readme and not args.page:
        sys.exit("--readme is written together with the page: give --page, too.")
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.origin:
        restore(args.origin, args.out)
    only, scale = filters(args.only), wanted_scale(args)
    tracks = grid.tracks(only)
    if args.status:
        return print_status(args.out, tracks)
    if args.page:
        from utility_table import write_page

        write_page(args.out, args.results)
        if args.readme:
            from utility_readme import refresh

            refresh(args.readme, args.out)
        return
    lock = claim(args.out, scale)
    try:
        if args.geometry:
            from utility_geometry import measure

            measure(args.out / GEOMETRY, scale, only)
        elif broken := study(args.out, tracks, scale, args.processes, args.minutes):
            sys.exit(f"given up, see above: {', '.join(map(str, broken))}. The same command tries them again.")
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
