"""The results page of the utility study: verdicts, tables, figures and a compact JSON, from the rows of its cells alone. No torch."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from drencoder.encoders.code_sizes import bytes_text
from drencoder.errors import ArtifactError
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import Row, read_rows
from drencoder.study.tables import markdown_table
from utility_study import grid, plots
from utility_study.archive import ARCHIVE, COMPACT, archive, read_study
from utility_study.grid import ARMS, EQUAL_BYTES_ARMS, FOUR_BITS, PARTS
from utility_study.plots import setting_words
from utility_study.results import (
    AUTOMATIC,
    FEW,
    FREE_RATIO,
    MANY,
    REFERENCE,
    SMALL_CODE,
    Comparison,
    Result,
    Results,
    Verdict,
    against_comparators,
    compare_arms,
    equal_bytes,
    held_back,
    load_results,
    verdicts,
)

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
    archive(folder, results_folder)
    for verdict in claims:
        print(f"{verdict.number:3s} {verdict.word:12s} {verdict.count:10s} {verdict.claim}")
    print(f"{len(results)} finished tracks -> {results_folder / NAME}.md")


def _figures(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """(what it shows, file) of every figure for which there are rows."""
    main = [pair for pair in compare_arms(results, [AUTOMATIC]) if not pair.ours.failed]
    figures = []
    if main:
        figures.append(("Loss per setting", plots.dumbbells(main, results, folder / f"{NAME}-loss.png")))
    if path := plots.loss_against_bytes(results, folder / f"{NAME}-loss-against-bytes.png"):
        figures.append(("Loss against bytes", path))
    return figures


# --- parts of the page -----------------------------------------------------------------------------------


def _opening(study: Mapping[str, Any], rows: Mapping[str, Row], results: Results, failures: Sequence[Row]) -> str:
    scale, machine = grid.scale_of(study["scale"]), study["machine"]
    hours = sum(row["seconds"] for row in rows.values()) / 3600
    versions = ", ".join(sorted({row["version"] for row in rows.values()}))
    seeds = [[*map(str, (*place, *counts))] for place, counts in grid.SEEDS.items()]
    arms = [[arm.name, _where(arm), f"{arm.first_rate:g}", arm.reason] for arm in ARMS.values()]
    return f"""# Encoded and private against tuned DP-LoRA

Does an encoded, differentially private federated run lose anything against DP-LoRA that sends whole updates? This page is made by

```
python benchmarks/utility.py --out DIR
python benchmarks/utility.py --out DIR --page
```

on {machine["cores"]} CPU cores ({machine["processor"]}, PyTorch {machine["torch"]}, drencoder {versions}), from {len(rows):,} runs that took {hours:.1f} hours of one core. Each row of
`{ARCHIVE}` holds the facts of one run: `--out DIR --from docs/results --page` makes this page again from them. **{len(results)} of {len(grid.tracks({}))} tracks are
finished** and stand here; a track is a method in a setting at one ε. {len(failures)} runs failed.

## How it was done

**Settings.** A setting is a trust model, a task of the embedded world, an adapter and an expected cohort of n clients. The small adapter has rank 8 on q, k, v, o
({grid.ADAPTER_SIZES["small"]:,} values), the large one rank 32 on those and the MLP's three ({grid.ADAPTER_SIZES["large"]:,} values). δ is 1e-5 under add/remove adjacency. Under central trust there are
{grid.POPULATIONS["central"]:,} clients, and a trusted server adds the noise. Under local trust there are {grid.POPULATIONS["local"]:,}, and each of them answers once and adds its own noise. Local trust was run
with {"; ".join(f"the {adapter} adapter and n = {cohort}" for adapter, cohort in grid.LOCAL_PLACES)} only: smaller cohorts learn next to nothing, and larger ones take too long here.

**Runs.** Every run has {scale.rounds} rounds with {scale.examples_per_client} records per client, mean gradients and FedAvgM, and leaves a ledger and a certificate. It is judged by {scale.examples} held-out records, and by
{study["scale"].get("questions", scale.examples)} questions per benchmark where the task is `letters`: the other tasks teach what the benchmarks do not ask.

**Tuning.** All methods are tuned alike, by the mean held-out loss over seeds of their own ({grid.FIRST_TUNING_SEED} and on). A method tries {grid.LEAST_RATES} learning rates: its first guess and its neighbours, a factor of
{grid.RATE_FACTOR:g} apart, then one half way ({grid.RATE_FACTOR**0.5:.2g}) beside the best. While the best is the smallest or the largest, it tries more, up to {grid.MOST_RATES}. At the best rate it then tries the clip times
{", ".join(f"{grid.CLIP_FACTOR**step:g}" for step in grid.CLIP_STEPS)} with the rate divided by the same number. The smallest rate within {grid.CLEARLY:.0%} of the least loss is taken, and the first clip unless the other one is better by more than that. First guesses
come from exploratory runs on tuning seeds. In {sum(result.edge for result in results.values())} of {len(results)} tracks the best rate was the smallest or largest that was tried; these are marked e below.

**Judging.** Methods are judged on seeds from {grid.FIRST_JUDGED_SEED} on, which no rate was tuned on. A seed gives all methods the same clients, start and held-out records, and each its own cohorts and noise.

{markdown_table(["trust", "adapter", "n", "tuning seeds", "judged seeds"], seeds)}

**What was chosen before, and on which seeds.** The study went through eight rounds (docs/log.md), of which this page shows the last.

- Rounds 1 to 4 were judged on seeds from 0 on. They settled momentum 1/4 for all methods, plain decoding, codes of B alone where k* >= 512, four bits a value, and the first rates.
- Round 5 was judged on seeds that nothing had seen. Its code sizes (1/2, or 1/{grid.SMALL_RATIO:g} where noise dominates) come from round 4 and from seeds 430 and 431. Its rule for rates that are alike comes from a rate that had
  won by 0.0001 in round 4 and diverged for five of twelve seeds.
- Round 5 had lost 2 and 6 % at n 8 (facts, ε 4) with codes of A and B at 1/{FREE_RATIO}. So round 6 sent B alone there, too, from a public A where k* < 512, which was chosen on seeds 500 to 523, and ran all of hybrid's runs at n 8
  anew. It added n 512 at ε 1, local trust, and the held-back task at n 8. The large adapter at n 8 got 24 judged seeds instead of 12 after one of hybrid's new runs there had been looked at.
- Round 7 changed no method. It judged the large adapter at n 8 on {grid.SEEDS["central", "large", 8][1]} seeds and local trust on {grid.SEEDS["local", "small", 64][1]} (six before), both decided before any of those runs, and ran comparators, parts,
  `hybrid-64` and `lora`. After the {grid.SEEDS["local", "small", 64][1]} judged seeds had been seen (facts: +8 and +3 %), local trust was tuned again, both methods alike, on {grid.SEEDS["local", "small", 64][0]} seeds instead of two: on seeds 540 to 545 other rates had been better.
- Round 8 changed no method either. It ran the last comparators at n 8. After the judged seeds had been seen (facts, ε 4: +2.3 %), it tuned the large adapter at n 8 again, both methods alike, on {grid.SEEDS["central", "large", 8][0]} seeds instead of four. This was
  decided before any of those runs: on seeds 620 to 631 twice the rate that four seeds had chosen for hybrid was better.
- The task `{grid.HELD_BACK}` is held back: nothing was chosen by it since momentum 1/4, and it is counted by itself (claim 7).

**How to read the tables.** Held-out loss is in nats per token, and lower is better. The base model is sure of something else, so its loss is high, and noise alone can lower it: read the loss beside the accuracy. Where a
track has more than {FEW_SEEDS} seeds, the tables show the least loss, the quartiles and the largest, with the number of seeds; utility.json has all. k* is the number of values that a round can learn under its noise, if half of the
clip's energy is shared by all clients. Noise dominates where k* < D/{FREE_RATIO}, and D is the number of values of the adapter.

{markdown_table(["method", "runs in", "first rate", "why there"], arms)}"""


def _where(arm: grid.Arm) -> str:
    if arm.places == grid.EVERYWHERE:
        places = "everywhere"
    else:
        places = "; ".join(f"{adapter}, n {cohort}" for adapter, cohort in arm.places)
    return f"{' and '.join(arm.trusts)}; {places}"


def _verdict_part(claims: Sequence[Verdict]) -> str:
    note = (
        f"`{AUTOMATIC}` is the default encoder: the plan chooses its size, the start of its A and its four bits a value. All other methods but `hybrid-10` and "
        f"`dp-lora-4-bits` send float32. Where k* >= D/{FREE_RATIO}, `{AUTOMATIC}` sends all of LoRA's B. That is FFA-LoRA's update in other coordinates, so it differs from the "
        "method `ffa` by bits, chance and tuning only.\n\nTwo claims of earlier versions of this page are gone. Claim 5 was that a formula predicts which method wins: it was right in "
        "11 of 48 comparisons, and docs/log.md keeps what was found. Claim 6, about what the encoder `kronecker` loses, is a test of the package (tests/encoders/test_kronecker.py)."
    )
    rows = [[one.number, one.claim, one.count, f"**{one.word}**"] for one in claims]
    return f"## The claims\n\n{markdown_table(['', 'claim', 'settings', 'verdict'], rows)}\n\n{note}"


def _no_loss_part(results: Results) -> str:
    pairs = compare_arms(results, [AUTOMATIC])
    if not pairs:
        return ""
    rows = []
    for pair in pairs:
        word = "better" if pair.better else "within 1 %" if pair.no_worse else "**worse**"
        right = " / ".join(_right_share(result) for result in (pair.ours, pair.theirs))
        rows.append([*_pair_cells(pair), right, f"1/{pair.ours.ratio:.0f}", f"1/{pair.fewer_bytes:.0f}", word])
    head = [
        *_pair_head(AUTOMATIC, REFERENCE),
        "right, ours / theirs",
        "values sent",
        "bytes sent",
        "verdict",
    ]
    spread = _spread_text([pair for pair in pairs if not held_back(pair)])
    return f"## Against DP-LoRA with as many clients (claims 1 and 3; held back: 7)\n\n{spread}\n\n{markdown_table(head, rows)}"


def _equal_part(results: Results) -> str:
    parts = [
        "## Against DP-LoRA with as many bytes (claim 2)",
        "Bytes are those of all uploads of a run, headers included.",
    ]
    for arm in EQUAL_BYTES_ARMS:
        rows, pairs = [], equal_bytes(results, arm)
        for pair in pairs:
            sent = [bytes_text(result.bytes_up) for result in (pair.ours, pair.theirs)]
            rows.append([*_pair_cells(pair), " / ".join(sent), "better" if pair.better else "**worse**"])
        head = [*_pair_head(f"{arm}, n {MANY}", f"DP-LoRA, n {FEW}"), "bytes up, ours / theirs", "verdict"]
        parts += [_spread_text(pairs), markdown_table(head, rows)] if pairs else []
    return "\n\n".join(parts) if len(parts) > 2 else ""


def _comparator_part(results: Results) -> str:
    pairs = against_comparators(results)
    pairs += [pair for pair in against_comparators(results, FOUR_BITS) if pair not in pairs]
    extra = compare_arms(results, PARTS, SMALL_CODE)
    if not pairs and not extra:
        return ""
    rows = []
    for pair in pairs:
        sizes = " / ".join(bytes_text(result.bytes_up) for result in (pair.ours, pair.theirs))
        word = "better" if pair.better else "**worse**"
        rows.append([pair.theirs.track.method, pair.ours.track.method, *_pair_cells(pair), sizes, word])
    head = ["comparator", "ours", *_pair_head("ours", "theirs"), "bytes up, ours / theirs", "verdict"]
    parts = [
        "## Against other encoders and other DP-LoRA (claim 4)",
        "Each comparator is held against the largest of our codes that takes no more bytes than its own. Where that is `hybrid-64`, further lines hold it against the largest in four bits, too.",
        markdown_table(head, rows),
    ]
    if extra:
        lines = [[pair.ours.track.method, *_pair_cells(pair)] for pair in extra]
        parts += [
            f"The encoder with one part changed, against {SMALL_CODE}. These lines are not counted as comparators; below zero the changed encoder is better.",
            markdown_table(["part", *_pair_head("part", SMALL_CODE)], lines),
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
    for (trust, task, adapter), group in sorted(groups.items()):
        rows: list[Line] = [
            _model_line(group, words, key) for words, key in (("base model", "base"), ("zero update", "zero"))
        ]
        rows += [_result_line(result) for result in sorted(group, key=_by_setting)]
        parts.append(f"## All losses: {trust}, {task}, {adapter}\n\n{markdown_table(head, rows)}")
    return parts


def _by_setting(result: Result) -> tuple[Any, ...]:
    return result.setting.cohort, result.track.epsilon or 0.0, list(ARMS).index(result.track.method)


def _model_line(group: Sequence[Result], words: str, key: str) -> Line:
    rows = next((result.rows for result in group if not result.failed), ())
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


def _pair_head(ours: str, theirs: str) -> list[str]:
    sides = [ours, "its seeds", theirs, "its seeds"]
    return ["setting (*: noise dominates)", "k*", "base model", "zero update", *sides, "Δ [95 %]", "Δ / loss"]


def _pair_cells(pair: Comparison) -> list[str]:
    result, interval = pair.ours, pair.interval
    models = [_loss_cells([row[key]["loss"] for row in pair.theirs.rows])[0] for key in ("base", "zero")]
    change = f"{pair.mean:+.3f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")
    losses = [*_loss_cells(pair.ours.losses), *_loss_cells(pair.theirs.losses)]
    return [setting_words(pair), _number_text(result.k_star), *models, *losses, change, f"{pair.relative:+.1%}"]


def _spread_text(pairs: Sequence[Comparison]) -> str:
    """The size of the gain in one sentence."""
    gains = sorted(pair.relative for pair in pairs if math.isfinite(pair.relative))
    if not gains:
        return ""
    middle = gains[len(gains) // 2]
    return f"Δ / loss goes from {gains[0]:+.1%} to {gains[-1]:+.1%}, with {middle:+.1%} in the middle. Below zero ours is better."


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
