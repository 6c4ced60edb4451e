"""The results page of the utility study: verdicts, tables, figures and a compact JSON, from the rows of its cells alone. No torch.

Beside the page lies an archive of every row, from which a study's folder can be made again on another machine.
"""

import json
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import utility_grid as grid
import utility_plots as plots
from utility_grid import ARMS, EQUAL_BYTES_ARMS, FOUR_BITS, PARTS, Scale
from utility_plots import setting_words
from utility_results import (
    AUTOMATIC,
    FEW,
    FREE_RATIO,
    MANY,
    REFERENCE,
    SMALL_CODE,
    Duel,
    Result,
    Results,
    Verdict,
    against_comparators,
    duels,
    equal_bytes,
    held_back,
    load_results,
    verdicts,
)

from drencoder.encoders.code_sizes import bytes_text
from drencoder.errors import ArtifactError
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import CELLS, STUDY, CellStore, Row, read_rows
from drencoder.study.tables import markdown_table

ARCHIVE = "utility-cells.jsonl.xz"
COMPACT = "utility.json"
FEW_SEEDS = 6  # whose losses a table can show one by one; utility.json has all
Line = Sequence[str]
NAME = "utility"


def write_page(folder: Path, results_folder: Path) -> None:
    """Writes utility.md, utility.json, the figures and the archive; prints the verdicts.

    Raises:
      ArtifactError: no track is finished, or the results cannot be written.
    """
    rows, study = read_rows(folder), read_study(folder)
    results, failures = load_results(rows)
    if not results:
        raise ArtifactError(f"{folder} has no finished track yet: run the study first.")
    results_folder.mkdir(parents=True, exist_ok=True)
    claims = verdicts(results)
    parts = [
        _opening(study, rows, results, failures),
        _verdict_part(claims),
        *(f"![{words}]({path.name})" for words, path in _figures(results, results_folder)),
        _no_loss_part(results),
        _equal_part(results),
        _comparator_part(results),
        *_loss_parts(results),
        _failure_part(failures),
    ]
    store = RunFolder(results_folder)
    store.write(results_folder / f"{NAME}.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    whole = json.dumps(_compact(study, results, failures, claims), separators=(",", ":"), allow_nan=False)
    store.write(results_folder / COMPACT, f"{whole}\n".encode())
    lines = sorted((folder / CELLS).read_bytes().splitlines(keepends=True))  # the same rows give the same bytes
    store.write(results_folder / ARCHIVE, lzma.compress(b"".join(lines), preset=9))
    for verdict in claims:
        print(f"{verdict.number:3s} {verdict.word:12s} {verdict.count:10s} {verdict.claim}")
    print(f"{len(results)} finished tracks -> {results_folder / NAME}.md")


def read_study(folder: Path) -> dict[str, Any]:
    """The scale and the machine of a study's cells.

    Raises:
      ArtifactError: the folder holds no study.
    """
    try:
        known = json.loads((folder / STUDY).read_text("utf-8"))
        return {"scale": known["cells_depend_on"]["scale"], "machine": known["machine"]}
    except (OSError, ValueError, TypeError, KeyError):
        raise ArtifactError(
            f"{folder} holds no utility study: give the --out of one, or --from a results page."
        ) from None


def restore(results_folder: Path, folder: Path) -> None:
    """Makes a study's folder out of the archive beside a page.

    Raises:
      ArtifactError: the folder has cells already, or the results cannot be read.
    """
    if (folder / CELLS).exists():
        raise ArtifactError(f"{folder} has cells already: leave --from out to go on with them, or give another --out.")
    try:
        known = json.loads((results_folder / COMPACT).read_text("utf-8"))
        rows = list(map(json.loads, lzma.decompress((results_folder / ARCHIVE).read_bytes()).splitlines()))
    except OSError as error:
        raise ArtifactError(f"{error.filename} is missing: give the folder that --page wrote.") from None
    except (ValueError, lzma.LZMAError) as error:
        raise ArtifactError(
            f"{results_folder} cannot be read ({error}): restore the files that --page wrote."
        ) from None
    with CellStore(folder, {"scale": known["scale"]}, {"machine": known["machine"]}) as store:
        store.add(*rows)


def _figures(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """(what it shows, file) of every figure for which there are rows."""
    main = [duel for duel in duels(results, [AUTOMATIC]) if not duel.ours.failed]
    figures = []
    if main:
        figures.append(("Loss per setting", plots.dumbbells(main, results, folder / f"{NAME}-loss.png")))
    if path := plots.loss_against_bytes(results, folder / f"{NAME}-loss-against-bytes.png"):
        figures.append(("Loss against bytes", path))
    return figures


# --- parts of the page -----------------------------------------------------------------------------------


def _opening(study: Mapping[str, Any], rows: Mapping[str, Row], results: Results, failures: Sequence[Row]) -> str:
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
decided before any of those runs: on seeds 620 to 631 twice the rate that four seeds had chosen for hybrid was better. The task `{grid.HELD_BACK}` is held back: nothing was chosen by it since momentum 1/4, and it counts by itself (7).

{markdown_table(["trust", "adapter", "n", "tuning seeds", "judged seeds"], [[*map(str, (*place, *counts))] for place, counts in grid.SEEDS.items()])}

Held-out loss is nats per token, lower is better; the base model is sure of something else and its loss is high, so that noise alone
can lower it: read it beside the accuracy. Of more than {FEW_SEEDS} seeds the tables show the least loss, the quartiles and the most (how many); utility.json has all. k* has half of the clip's energy shared by all clients; noise dominates where k* < D/{FREE_RATIO}.

{markdown_table(["method", "runs in", "first rate", "why there"], where)}"""


def _where(arm: grid.Arm) -> str:
    if arm.places == grid.EVERYWHERE:
        places = "everywhere"
    else:
        places = "; ".join(f"{adapter}, n {cohort}" for adapter, cohort in arm.places)
    return f"{' and '.join(arm.trusts)}; {places}"


def _verdict_part(claims: Sequence[Verdict]) -> str:
    note = (
        f"\n\n`{AUTOMATIC}` is the default encoder: its size, the start of its A and its four bits a value are from the plan; all others but `hybrid-10` and "
        f"`dp-lora-4-bits` send float32. Where k* >= D/{FREE_RATIO} it sends all of LoRA's B, which is "
        "FFA-LoRA's update in other coordinates, and differs from the arm `ffa` by bits, chance and what was tuned. "
        "Claim 5 of earlier versions, that a formula can predict which method wins, was wrong: docs/log.md says how, and claim 6, about the closed form of `kronecker`, is "
        "`tests/encoders/test_kronecker.py` now."
    )
    rows = [[one.number, one.claim, one.count, f"**{one.word}**"] for one in claims]
    return f"## The finish line\n\n{markdown_table(['', 'claim', 'cells', 'verdict'], rows)}{note}"


def _no_loss_part(results: Results) -> str:
    found = duels(results, [AUTOMATIC])
    if not found:
        return ""
    rows = []
    for duel in found:
        word = "better" if duel.better else "within 1 %" if duel.no_worse else "**worse**"
        right = " / ".join(_right_share(result) for result in (duel.ours, duel.theirs))
        rows.append([*_duel_cells(duel), right, f"1/{duel.ours.ratio:.0f}", f"1/{duel.fewer_bytes:.0f}", word])
    head = [
        *_duel_head(AUTOMATIC, REFERENCE),
        "right, ours / theirs",
        "values sent",
        "bytes sent",
        "verdict",
    ]
    spread = _spread_text([duel for duel in found if not held_back(duel)])
    return f"## No loss, and equal clients (1, 3; held back: 7)\n\n{spread}\n\n{markdown_table(head, rows)}"


def _equal_part(results: Results) -> str:
    parts = ["## Equal bytes (2)", "Bytes are of all rounds, headers included."]
    for arm in EQUAL_BYTES_ARMS:
        rows, found = [], equal_bytes(results, arm)
        for duel in found:
            sent = [bytes_text(result.bytes_up) for result in (duel.ours, duel.theirs)]
            rows.append([*_duel_cells(duel), " / ".join(sent), "better" if duel.better else "**worse**"])
        head = [*_duel_head(f"{arm}, n {MANY}", f"DP-LoRA, n {FEW}"), "bytes up, ours / theirs", "verdict"]
        parts += [_spread_text(found), markdown_table(head, rows)] if found else []
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
        rows.append([duel.theirs.track.method, duel.ours.track.method, *_duel_cells(duel), sizes, word])
    head = ["comparator", "ours", *_duel_head("ours", "theirs"), "bytes up, ours / theirs", "verdict"]
    parts = [
        "## Comparators (4)",
        "Each against the largest of our codes that takes no more bytes than its own; below, where that was `hybrid-64`, also against the largest in four bits.",
        markdown_table(head, rows),
    ]
    if extra:
        lines = [[duel.ours.track.method, *_duel_cells(duel)] for duel in extra]
        parts += [
            f"The parts of hybrid alone, against {SMALL_CODE} (not counted as comparators; below zero: the part is better):",
            markdown_table(["part", *_duel_head("part", SMALL_CODE)], lines),
        ]
    return "\n\n".join(parts)


def _loss_parts(results: Results) -> list[str]:
    """Every finished track: one table per trust, task and adapter."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results.values():
        setting = result.setting
        groups.setdefault((setting.trust, setting.task, setting.adapter), []).append(result)
    head = ["n", "ε", "k*", "method", "loss", "per seed", "mmlu", "ceval", "values", "bytes up", "rate", "clip"]
    parts = []
    for (trust, task, adapter), found in sorted(groups.items()):
        rows: list[Line] = [
            _model_line(found, words, key) for words, key in (("base model", "base"), ("zero update", "zero"))
        ]
        rows += [_result_line(result) for result in sorted(found, key=_by_setting)]
        parts.append(f"## All losses: {trust}, {task}, {adapter}\n\n{markdown_table(head, rows)}")
    return parts


def _by_setting(result: Result) -> tuple[Any, ...]:
    return result.setting.cohort, result.track.epsilon or 0.0, list(ARMS).index(result.track.method)


def _model_line(found: Sequence[Result], words: str, key: str) -> Line:
    rows = next((result.rows for result in found if not result.failed), ())
    losses = [row[key]["loss"] for row in rows]
    return [
        "-",
        "-",
        "-",
        words,
        *_loss_cells(losses),
        *_accuracy_cells([row[key] for row in rows]),
        "-",
        "-",
        "-",
        "-",
    ]


def _result_line(result: Result) -> Line:
    setting, budget = result.setting, result.track.epsilon
    epsilon = "none" if budget is None else f"{budget:g}"
    noisy = "*" if result.noisy else ""
    sent = result.first("bytes_up")
    facts = [str(setting.cohort), epsilon, f"{_number_text(result.k_star)}{noisy}", result.track.method]
    rate = f"{result.first('rate'):.3g}{' e' if result.edge else ''}"
    size = "-" if result.code_size is None else f"{result.code_size:,}"
    up = "-" if sent is None else bytes_text(sent)
    return [
        *facts,
        *_loss_cells(result.losses),
        *_accuracy_cells(result.rows),
        size,
        up,
        rate,
        f"{result.first('clip'):g}",
    ]


def _failure_part(failures: Sequence[Row]) -> str:
    if not failures:
        return ""
    rows = [[row["key"], row["error"]] for row in failures]
    return f"## Runs that failed\n\n{markdown_table(['cell', 'why'], rows)}"


def _compact(
    study: Mapping[str, Any], results: Results, failures: Sequence[Row], claims: Sequence[Verdict]
) -> dict[str, Any]:
    """Everything that the page is made of, ready for JSON: a failed run's loss is None."""

    def finite(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    tracks = []
    for track, result in results.items():
        tracks.append(
            {"arm": track.method, **asdict(result.setting), "epsilon_target": track.epsilon}
            | {"k_star": finite(result.k_star), "loss": [finite(loss) for loss in result.losses]}
            | {"accuracy": [row.get("accuracy") for row in result.rows]}
            | {key: result.first(key) for key in ("bytes_up", "noise_multiplier", "rate", "clip", "epsilon", "encoder")}
            | {"edge": result.edge, "tuning": {step: finite(loss) for step, loss in result.tuning.items()}}
        )
    return {
        **study,
        "seeds": [[*place, *counts] for place, counts in grid.SEEDS.items()],
        "verdicts": [asdict(one) | {"verdict": one.word} for one in claims],
        "models": {key: _anchors(results, key) for key in ("base", "zero")},
        "tracks": tracks,
        "failures": [{"key": row["key"], "error": row["error"]} for row in failures],
    }


def _anchors(results: Results, key: str) -> dict[str, list[float]]:
    """Task -> loss of the base model (or the untouched adapter) on every seed's held-out records."""
    known: dict[str, list[float]] = {}
    for result in results.values():
        if not result.failed:
            known.setdefault(result.setting.task, [round(row[key]["loss"], 6) for row in result.rows])
    return known


# --- numbers in words ------------------------------------------------------------------------------------


def _duel_head(ours: str, theirs: str) -> list[str]:
    sides = [ours, "its seeds", theirs, "its seeds"]
    return ["setting (*: noise dominates)", "k*", "base model", "zero update", *sides, "Δ [95 %]", "Δ / loss"]


def _duel_cells(duel: Duel) -> list[str]:
    result, interval = duel.ours, duel.interval
    models = [_loss_cells([row[key]["loss"] for row in duel.theirs.rows])[0] for key in ("base", "zero")]
    change = f"{duel.mean:+.3f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")
    losses = [*_loss_cells(duel.ours.losses), *_loss_cells(duel.theirs.losses)]
    return [setting_words(duel), _number_text(result.k_star), *models, *losses, change, f"{duel.relative:+.1%}"]


def _spread_text(found: Sequence[Duel]) -> str:
    """The size of the gain in one sentence."""
    gains = sorted(duel.relative for duel in found if math.isfinite(duel.relative))
    if not gains:
        return ""
    middle = gains[len(gains) // 2]
    return (
        f"Δ / loss: from {gains[0]:+.1%} to {gains[-1]:+.1%}, in the middle {middle:+.1%}; below zero ours is better."
    )


def _right_share(result: Result) -> str:
    """Share of multiple-choice questions answered rightly, over benchmarks and seeds; "-" if the task does not teach them."""
    known = [share for row in result.rows for share in row.get("accuracy", {}).values()]
    return f"{fmean(known):.2f}" if known else "-"


def _loss_cells(values: Sequence[float]) -> list[str]:
    """Mean, and every seed; of more than FEW_SEEDS the least, the quartiles and the most."""
    if not values:
        return ["-", "-"]
    ordered = sorted(values)
    few = len(values) <= FEW_SEEDS
    shown = values if few else [ordered[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
    texts = [f"{value:.3f}" if math.isfinite(value) else "failed" for value in shown]
    return [f"{fmean(values):.3f}", " ".join(texts) if few else f"{' / '.join(texts)} ({len(values)})"]


def _accuracy_cells(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    known = [row["accuracy"] for row in rows if row.get("accuracy")]
    return [f"{fmean(one[name] for one in known):.2f}" if known else "-" for name in ("mmlu", "ceval")]


def _number_text(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
