"""The results page of the utility study: verdicts, tables, plots and a compact JSON, from the lines of its cells alone. No torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import utility_grid as grid
import utility_plots as plots
from utility_cells import COMPACT, Row, archive, read_cells, read_study, replace_text
from utility_forecast import forecasts, load_geometry
from utility_grid import ARMS, EQUAL_BYTES_ARMS, FOUR_BITS, PARTS, Scale, Setting
from utility_results import (
    AUTOMATIC,
    FEW,
    FREE_RATIO,
    MANY,
    REFERENCE,
    SMALL_CODE,
    Result,
    Results,
    against_comparators,
    duels,
    equal_bytes,
    held_back,
    load_results,
)
from utility_text import (
    FEW_SEEDS,
    Line,
    accuracy_cells,
    duel_cells,
    duel_head,
    loss_cells,
    number_text,
    right_share,
    spread_text,
    table,
)
from utility_theory import formula_part, geometry_part
from utility_verdicts import Verdict, verdicts

from drencoder.encoders.code_sizes import bytes_text

NAME = "utility"


def write_page(folder: Path, results_folder: Path) -> None:
    """Writes utility.md, utility.json and the plots; says what it wrote."""
    results, failures = load_results(folder)
    if not results:
        raise SystemExit(f"{folder} has no finished track yet: run the study first.")
    geometry = load_geometry(folder)
    results_folder.mkdir(parents=True, exist_ok=True)
    found = verdicts(results, geometry)
    pictures = _pictures(results, geometry, results_folder)
    parts = [
        _opening(folder, results, failures),
        _verdict_part(found, results),
        *(f"![{words}]({path.name})" for words, path in pictures),
        _no_loss_part(results),
        _equal_part(results),
        _comparator_part(results),
        formula_part(results, geometry),
        geometry_part(geometry),
        *_loss_parts(results),
        _failure_part(failures),
    ]
    replace_text(results_folder / f"{NAME}.md", "\n\n".join(part for part in parts if part) + "\n")
    whole = _compact(folder, results, failures, geometry, found)
    replace_text(results_folder / COMPACT, json.dumps(whole, separators=(",", ":"), allow_nan=False) + "\n")
    archive(folder, results_folder)
    for verdict in found:
        print(f"{verdict.number:3s} {verdict.word:12s} {verdict.count:10s} {verdict.claim}")
    print(f"{len(results)} finished tracks -> {results_folder / NAME}.md")


def _pictures(results: Results, geometry: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """(what it shows, file) of every figure for which there are lines."""
    main = [duel for duel in duels(results, [AUTOMATIC]) if not duel.ours.failed]
    made: list[tuple[str, Path | None]] = [
        ("Loss against bytes", plots.loss_against_bytes(results, folder / f"{NAME}-loss-against-bytes.png")),
        (
            "Forecast against outcome",
            plots.forecast_against_outcome(forecasts(results, geometry), folder / f"{NAME}-forecast.png"),
        ),
    ]
    if main:
        made.insert(0, ("Loss per setting", plots.dumbbells(main, results, folder / f"{NAME}-loss.png")))
    return [(words, path) for words, path in made if path is not None]


# --- parts of the page -----------------------------------------------------------------------------------


def _opening(folder: Path, results: Results, failures: Sequence[Row]) -> str:
    study, rows = read_study(folder), read_cells(folder)
    scale, machine = Scale(**study["scale"]), study["machine"]
    hours = sum(row["seconds"] for row in rows.values()) / 3600
    versions = ", ".join(sorted({row["version"] for row in rows.values()}))
    planned = len(grid.tracks({}))
    finished, edges = len(results), sum(result.edge for result in results.values())
    where = [[arm.name, _where(arm), f"{arm.first_rate:g}", arm.reason] for arm in ARMS.values()]
    return f"""# Encoded and private against tuned DP-LoRA

Does an encoded, differentially private federated run lose anything against DP-LoRA that sends whole updates? Made by

```
python benchmarks/utility.py --out DIR
python benchmarks/utility.py --out DIR --geometry
python benchmarks/utility.py --out DIR --page
```

on {machine["cores"]} CPU cores ({machine["processor"]}, PyTorch {machine["torch"]}, drencoder {versions}): {len(rows):,} runs, {hours:.1f} hours of one
core. **{finished} of {planned} tracks are finished** and stand here; a track is a method in a setting. {len(failures)} runs failed.

A setting is a trust model, a task of the embedded world, an adapter (small: rank 8 on q, k, v, o, {grid.ADAPTER_SIZES["small"]:,} values; large:
rank 32 on those and the MLP's three, {grid.ADAPTER_SIZES["large"]:,}), an expected cohort n and an ε (δ = 1e-5, add/remove). Under central trust
{grid.POPULATIONS["central"]:,} clients exist and a trusted server adds the noise; under local trust {grid.POPULATIONS["local"]:,}, of whom each answers once and adds its own
({"; ".join(f"{adapter} adapter, n {cohort}" for adapter, cohort in grid.LOCAL_PLACES)} only: smaller cohorts learn next to nothing, larger ones take too long here).
{scale.rounds} rounds, {scale.examples_per_client} records per client, mean gradients, FedAvgM, {scale.examples} held-out records, {scale.questions} questions per benchmark (task letters only: the
other tasks teach what the benchmarks do not ask). Every cell is one whole run with its ledger and certificate.

**Tuning.** Every track has runs on each of its tuning seeds ({grid.FIRST_TUNING_SEED} and on; the mean decides) at {grid.LEAST_RATES} learning rates, a factor of {grid.RATE_FACTOR:g} apart and at last {grid.RATE_FACTOR**0.5:.2g}, from the method's first guess, and at up to
{grid.MOST_RATES} while the best is the smallest or the largest; then, at the best, with the clip times {", ".join(f"{grid.CLIP_FACTOR**step:g}" for step in grid.CLIP_STEPS)} and the rate the other way. The smallest rate within {grid.CLEARLY:.0%} of the least loss is taken, and the first clip unless the other is better by more than that. First
guesses are from exploratory runs on tuning seeds. Judged on seeds from {grid.FIRST_JUDGED_SEED} on, which no rate was tuned on (how many of each is in the table below): the same clients, start and held-out records
for all methods, other cohorts and noise. In {edges} of {len(results)} tracks the best rate was the smallest or largest tried (marked e below).

**Chosen before.** Four earlier rounds (docs/log.md) were judged on seeds from 0 on, and settled momentum 1/4 for all, plain decoding, codes of B alone where k* >= 512, four bits a value and first rates. The fifth round was judged on
seeds that nothing had seen. Its sizes (1/2, or 1/{grid.SMALL_RATIO:g} where noise dominates) come from the fourth round and from seeds 430 and 431; its rule for rates that are alike from a rate that had won by
0.0001 in the fourth round and diverged for five of twelve seeds. It had lost 2 and 6 % at n 8 (facts, ε 4) with codes of A and B at 1/{FREE_RATIO}; so the sixth round sent B alone there, too, from a public A where k* < 512, chosen on seeds 500 to 523, and ran
all of hybrid's runs at n 8 anew, with n 512 at ε 1, local trust and the held-back task at n 8; the large adapter at n 8 got 24 judged seeds instead of 12 when one of hybrid's new runs there had been looked at.
The seventh round changed no method. It judged the large adapter at n 8 on {grid.SEEDS["central", "large", 8][1]} seeds and local trust on {grid.SEEDS["local", "small", 64][1]} (six before), both decided before any of those runs, and ran comparators, parts, `hybrid-64` and `lora`.
Then local trust was tuned again, on {grid.SEEDS["local", "small", 64][0]} seeds instead of two and both methods alike, after the 24 judged seeds had been seen (facts: +8 and +3 %): on seeds 540 to 545 other rates had been better.
The eighth round, which this is, changed no method either. It ran the last comparators at n 8 and, once more after the judged seeds had been seen (facts, ε 4: +2.3 %), tuned the large adapter at n 8 on {grid.SEEDS["central", "large", 8][0]} seeds instead of four, both methods alike,
decided before any of those runs: on seeds 620 to 631 twice the rate that four seeds had chosen for hybrid was better. The mended R (5b) was picked in the second round,
its threshold (5f) in this one, before `{grid.TEST_ARM}` ran to test it (5g). The task `{grid.HELD_BACK}` is held back: nothing was chosen by it since momentum 1/4, and it counts by itself (7).

{table(["trust", "adapter", "n", "tuning seeds", "judged seeds"], [[*map(str, (*place, *counts))] for place, counts in grid.SEEDS.items()])}

Held-out loss is nats per token, lower is better; the base model is sure of something else and its loss is high, so that noise alone
can lower it: read it beside the accuracy. Of more than {FEW_SEEDS} seeds the tables show the least loss, the quartiles and the most (how many); utility.json has all. k* has half of the clip's energy shared by all clients; noise dominates where k* < D/{FREE_RATIO}.

{table(["method", "runs in", "first rate", "why there"], where)}"""


def _where(arm: grid.Arm) -> str:
    if arm.places == grid.EVERYWHERE:
        places = "everywhere"
    else:
        places = "; ".join(f"{adapter}, n {cohort}" for adapter, cohort in arm.places)
    return f"{' and '.join(arm.trusts)}; {places}"


def _verdict_part(found: Sequence[Verdict], results: Results) -> str:
    note = (
        f"\n\n`{AUTOMATIC}` is the default encoder: its size, the start of its A and its four bits a value are from the plan; all others but `hybrid-10` and "
        f"`dp-lora-4-bits` send float32. Where k* >= D/{FREE_RATIO} it sends all of LoRA's B, which is "
        "FFA-LoRA's update in other coordinates, and differs from the arm `ffa` by bits, chance and what was tuned."
    )
    rows = [[one.number, one.claim, one.count, f"**{one.word}**"] for one in found]
    return f"## The finish line\n\n{table(['', 'claim', 'cells', 'verdict'], rows)}{note}"


def _no_loss_part(results: Results) -> str:
    found = duels(results, [AUTOMATIC])
    if not found:
        return ""
    rows = []
    for duel in found:
        word = "better" if duel.better else "within 1 %" if duel.no_worse else "**worse**"
        right = " / ".join(right_share(result) for result in (duel.ours, duel.theirs))
        rows.append([*duel_cells(duel), right, f"1/{duel.ours.ratio:.0f}", f"1/{duel.fewer_bytes:.0f}", word])
    head = [
        *duel_head(AUTOMATIC, REFERENCE),
        "right, ours / theirs",
        "values sent",
        "bytes sent",
        "verdict",
    ]
    spread = spread_text([duel for duel in found if not held_back(duel)])
    return f"## No loss, and equal clients (1, 3; held back: 7)\n\n{spread}\n\n{table(head, rows)}"


def _equal_part(results: Results) -> str:
    parts = ["## Equal bytes (2)", "Bytes are of all rounds, headers included."]
    for arm in EQUAL_BYTES_ARMS:
        rows, found = [], equal_bytes(results, arm)
        for duel in found:
            sent = [bytes_text(result.bytes_up) for result in (duel.ours, duel.theirs)]
            rows.append([*duel_cells(duel), " / ".join(sent), "better" if duel.better else "**worse**"])
        head = [*duel_head(f"{arm}, n {MANY}", f"DP-LoRA, n {FEW}"), "bytes up, ours / theirs", "verdict"]
        parts += [spread_text(found), table(head, rows)] if found else []
    return "\n\n".join(parts) if len(parts) > 2 else ""


def _comparator_part(results: Results) -> str:
    found = against_comparators(results)
    found += [duel for duel in against_comparators(results, FOUR_BITS) if duel not in found]
    extra = duels(results, PARTS, SMALL_CODE)
    if not found and not extra:
        return ""
    rows = []
    for duel in found:
        sizes = " / ".join(bytes_text(result.bytes_up) for result in (duel.ours, duel.theirs))
        word = "better" if duel.better else "**worse**"
        rows.append([duel.theirs.track.arm, duel.ours.track.arm, *duel_cells(duel), sizes, word])
    head = ["comparator", "ours", *duel_head("ours", "theirs"), "bytes up, ours / theirs", "verdict"]
    parts = [
        "## Comparators (4)",
        "Each against the largest of our codes that takes no more bytes than its own; below, where that was `hybrid-64`, also against the largest in four bits.",
        table(head, rows),
    ]
    if extra:
        lines = [[duel.ours.track.arm, *duel_cells(duel)] for duel in extra]
        parts += [
            f"The parts of hybrid alone, against {SMALL_CODE} (not counted as comparators; below zero: the part is better):",
            table(["part", *duel_head("part", SMALL_CODE)], lines),
        ]
    return "\n\n".join(parts)


def _loss_parts(results: Results) -> list[str]:
    """Every finished track: one table per trust, task and adapter."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for track, result in results.items():
        setting = track.setting
        groups.setdefault((setting.trust, setting.task, setting.adapter), []).append(result)
    head = ["n", "ε", "k*", "method", "loss", "per seed", "mmlu", "ceval", "values", "bytes up", "rate", "clip"]
    parts = []
    for (trust, task, adapter), found in sorted(groups.items()):
        rows: list[Line] = [
            _model_line(found, words, key) for words, key in (("base model", "base"), ("zero update", "zero"))
        ]
        rows += [_result_line(result) for result in sorted(found, key=_by_setting)]
        parts.append(f"## All losses: {trust}, {task}, {adapter}\n\n{table(head, rows)}")
    return parts


def _by_setting(result: Result) -> tuple[Any, ...]:
    setting = result.track.setting
    return setting.cohort, setting.epsilon or 0.0, list(ARMS).index(result.track.arm)


def _model_line(found: Sequence[Result], words: str, key: str) -> Line:
    rows = next((result.rows for result in found if not result.failed), ())
    losses = [row[key]["loss"] for row in rows]
    return ["-", "-", "-", words, *loss_cells(losses), *accuracy_cells([row[key] for row in rows]), "-", "-", "-", "-"]


def _result_line(result: Result) -> Line:
    setting = result.track.setting
    epsilon = "none" if setting.epsilon is None else f"{setting.epsilon:g}"
    noisy = "*" if result.noisy else ""
    sent = result.first("bytes_up")
    facts = [str(setting.cohort), epsilon, f"{number_text(result.k_star)}{noisy}", result.track.arm]
    rate = f"{result.first('rate'):.3g}{' e' if result.edge else ''}"
    size = "-" if result.code_size is None else f"{result.code_size:,}"
    up = "-" if sent is None else bytes_text(sent)
    return [
        *facts,
        *loss_cells(result.losses),
        *accuracy_cells(result.rows),
        size,
        up,
        rate,
        f"{result.first('clip'):g}",
    ]


def _failure_part(failures: Sequence[Row]) -> str:
    if not failures:
        return ""
    rows = [[row["key"], row["error"]] for row in failures]
    return f"## Runs that failed\n\n{table(['cell', 'why'], rows)}"


def _compact(
    folder: Path, results: Results, failures: Sequence[Row], geometry: Sequence[Row], found: Sequence[Verdict]
) -> dict[str, Any]:  # fmt: skip
    """Everything that the page is made of, JSON-ready: a failed run's loss is None."""

    def finite(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    tracks = []
    for track, result in results.items():
        facts = {"arm": track.arm, **asdict(track.setting), "k_star": finite(result.k_star)}
        tracks.append(
            facts
            | {
                "loss": [finite(loss) for loss in result.losses],
                "accuracy": [row.get("accuracy") for row in result.rows],
            }
            | {key: result.first(key) for key in ("bytes_up", "noise_multiplier", "rate", "clip", "epsilon", "encoder")}
            | {"edge": result.edge, "tuning": {step: finite(loss) for step, loss in result.tuning.items()}}
        )
    anchors = {key: _anchors(results, key) for key in ("base", "zero")}
    judged = [asdict(one) | {"verdict": one.word} for one in found]
    return {
        **read_study(folder), "seeds": [[*place, *counts] for place, counts in grid.SEEDS.items()], "verdicts": judged, "models": anchors, "tracks": tracks,
        "failures": [{"key": row["key"], "error": row["error"]} for row in failures], "geometry": geometry,
    }  # fmt: skip


def _anchors(results: Results, key: str) -> dict[str, list[float]]:
    """Task -> loss of the base model (or the untouched adapter) on every seed's held-out records."""
    known: dict[str, list[float]] = {}
    for track, result in results.items():
        setting: Setting = track.setting
        if not result.failed:
            known.setdefault(setting.task, [round(row[key]["loss"], 6) for row in result.rows])
    return known
