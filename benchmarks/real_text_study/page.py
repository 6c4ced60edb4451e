"""The page of the study of real text: one table, one figure, energy by round and what follows, from the cells that are there. No torch."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_text as study

from drencoder.encoders.code_sizes import bytes_text
from drencoder.errors import ArtifactError
from drencoder.evaluation.statistics import Estimate, ratio_of_sums
from drencoder.reading import parse_json
from drencoder.runs.plots import save_figure
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import STUDY, Cell, Row, loss_of, read_rows
from drencoder.study.tables import markdown_table

NAME = "real-text"
SMALL = 0.05  # nats: a difference that no user would notice
_COLOURS = {
    "hybrid": "#0072b2", "hybrid-few": "#56b4e9", "dp-lora": "#d55e00", "lora": "#57606a", "random": "#009e73", "ffa": "#cc79a7",
    "steps": "#e69f00", "autoencoder": "#7f5539", "fedcg": "#000000",
}  # fmt: skip


def write_page(out: Path, results: Path) -> None:
    """Writes real-text.md, real-text.json and the figure.

    Raises:
      ArtifactError: no cell is finished, or the results cannot be written.
    """
    rows = read_rows(out)
    cells = [cell for cell in study.CELLS if cell.key in rows and "error" not in rows[cell.key]]
    if not cells:
        raise ArtifactError(f"{out} has no finished cell yet: run the study first.")
    results.mkdir(parents=True, exist_ok=True)
    facts = parse_json((out / STUDY).read_bytes())
    _draw(cells, rows, results / f"{NAME}.png")
    parts = [
        _opening(cells, rows, facts),
        _losses(cells, rows),
        f"![Held-out loss against uploaded bytes]({NAME}.png)\n\nEach point is compared with the base model on the same texts: an eighth of the held-out ones in a round, all of them "
        "at the end (the last point).",
        _comparisons(out, cells, rows),
        _energy(cells, rows),
        _benchmarks(out),
        _left_out(rows),
    ]
    store = RunFolder(results)
    store.write(results / f"{NAME}.md", ("\n\n".join(part for part in parts if part) + "\n").encode())
    kept = {cell.key: rows[cell.key] for cell in cells}
    store.write(results / f"{NAME}.json", (json.dumps({"study": facts, "cells": kept}, indent=1) + "\n").encode())
    print(f"{len(cells)} of {len(study.CELLS)} cells -> {results / NAME}.md")


def _opening(cells: Sequence[Cell], rows: dict[str, Row], facts: dict[str, Any]) -> str:
    known = {key: value for key, value in facts["cells_depend_on"].items() if key != "model"}
    size = study.Size(**known)
    machine, minutes = facts["machine"], sum(rows[cell.key]["seconds"] for cell in cells) / 60
    tasks = "\n".join(f"- *{name}*: {words}." for name, (words, _) in study.TASKS.items())
    return f"""# A real model and real text

What does a user get who names a model, a file, ε and nothing else, and what do other encoders and DP-LoRA get at equal privacy? The model is
SmolLM2-135M-Instruct (frozen, float32, a LoRA adapter of rank 8 on q, k, v and o). The tasks are public data sets:

{tasks}

Every run has {size.rounds} rounds of {size.cohort} clients on average, {size.records} records of at most {size.tokens} tokens each, the plain template, FedAdam
at a rate of {study.RATE:g} unless the table says otherwise (the default's follows from its plan), δ = 1e-5, and {size.measured} held-out texts; everything else is the default of this version. The first clip
is measured on text that the model writes itself. Most runs are of a state of this version in which that text had up to 64 tokens and was new in every round; now it has 32 and is written once, which a pair of
such runs could not tell apart ([log](../log.md#a-model-and-text-of-ones-own-issue-16)). **{len(cells)} of {len(study.CELLS)} planned runs were made**, one at a time with one thread, on a machine of {machine["cores"]} cores
({machine["processor"]}, PyTorch {machine["torch"]}) that was busy with other work, {minutes:.0f} minutes altogether. Most arms have one seed, so a difference between two rows is
believed here only where its interval, over the held-out texts, leaves zero out; it says nothing about other seeds. Differences below {SMALL:g} nats are called small. Made by

```
python benchmarks/real_text.py --model FOLDER --data FOLDER --out DIR
python benchmarks/real_text.py --out DIR --page
```"""


def _words(cell: Cell) -> list[str]:
    task, trust = cell.track.setting.split("/")
    budget = "none" if cell.track.epsilon is None else f"{cell.track.epsilon:g}"
    return [task, study.ARMS[cell.track.method].words, trust.replace("no-privacy", "-"), budget, str(cell.seed)]


def _losses(cells: Sequence[Cell], rows: dict[str, Row]) -> str:
    lines = []
    for task in study.TASKS:
        own = [cell for cell in cells if cell.track.setting.startswith(f"{task}/")]
        if not own:
            continue
        first = rows[own[0].key]
        lines.append([task, "guessing uniformly", "-", "-", "-", "-", f"{first['uniform']:.2f}", "0", "-"])
        for name in ("base model", "zero update"):
            lines.append([task, name, "-", "-", "-", "-", _estimate(first["results"][name]), "0", "-"])
        for cell in sorted(own, key=lambda one: loss_of(rows[one.key])):
            row = rows[cell.key]
            loss, minutes = _estimate(row["results"]["this run"]), f"{row['seconds'] / 60:.0f}"
            lines.append([*_words(cell), f"{row['rate']:g}", loss, bytes_text(row["bytes_up"]), minutes])
    head = ["task", "what", "trust", "ε", "seed", "rate", "held-out loss", "uploaded by all", "minutes"]
    return (
        "## Losses\n\nNats per token, with 95 % intervals over the held-out texts; the best of a task first.\n\n"
        + markdown_table(head, lines)
    )


def _estimate(row: dict[str, float]) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _draw(cells: Sequence[Cell], rows: dict[str, Row], path: Path) -> None:
    """What each measured round has gained over the base model, against the bytes that all clients have sent by then, one panel a task.

    Rounds are measured on fewer texts than the end, and both are compared with the base model on the same texts.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in study.TASKS if any(cell.track.setting.startswith(f"{task}/") for cell in cells)]
    figure = Figure(figsize=(4.6 * len(tasks), 6.4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        drawn: Counter[str] = Counter()  # a method's rows have its colour, and a marker each
        for cell in cells:
            if not cell.track.setting.startswith(f"{task}/"):
                continue
            row = rows[cell.key]
            start = row["metrics"][0]["loss"]
            points = [
                (one["bytes_up"] / 1e6, one["loss"] - start)
                for one in row["metrics"][1:-1]
                if one["bytes_up"] and "loss" in one
            ]
            points.append((row["bytes_up"] / 1e6, loss_of(row) - row["results"]["base model"]["value"]))
            dashed = cell.track.epsilon != 8 or "local" in cell.track.setting
            method = cell.track.method
            marker = "os^Dvx"[drawn[method] % 6]
            drawn[method] += 1
            axis.plot(
                *zip(*points, strict=True), color=_COLOURS[method], linestyle="--" if dashed else "-", marker=marker, markersize=4,
                linewidth=1, label=" ".join(_label(cell)),
            )  # fmt: skip
        axis.axhline(0.0, linestyle=":", color="#57606a", label="base model")
        axis.set_xscale("log")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("MB uploaded by all clients so far")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.axes[0].set_ylabel("held-out loss minus the base model's (nats per token)")
    save_figure(figure, path)


def _label(cell: Cell) -> list[str]:
    trust = cell.track.setting.split("/")[1]
    words = [cell.track.method]
    if cell.track.epsilon is not None:
        words.append(f"ε {cell.track.epsilon:g}" + (", local" if trust == "local" else ""))
    if cell.rate_step:
        words.append(f"rate x{2.0**cell.rate_step:g}")
    return [*words, f"seed {cell.seed}"] if cell.seed else words


def _comparisons(out: Path, cells: Sequence[Cell], rows: dict[str, Row]) -> str:
    """The default against every other run of its task, trust, epsilon and seed, text by text."""
    lines, told = [], []
    for cell in cells:
        task = cell.track.setting.split("/")[0]
        ours = _default_beside(cell, cells)
        if ours is None or ours == cell:
            continue
        change = _difference(out, ours, cell)
        ratio = rows[cell.key]["bytes_up"] / max(1, rows[ours.key]["bytes_up"])
        word = _verdict(change)
        lines.append([task, *_words(cell)[1:4], f"{2.0**cell.rate_step:g}", f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})", f"{ratio:.2g}", word])  # fmt: skip
        told.append((cell, change, ratio, word))
    if not lines:
        return ""
    head = [
        "task",
        "against",
        "trust",
        "ε",
        "rate x",
        "its loss minus the default's",
        "its bytes by the default's",
        "in words",
    ]
    return (
        "## The default against the others\n\nThe difference is that of the same held-out texts, with its 95 % interval; above zero the default is better. Arms without "
        "privacy are compared with the default at ε 8 under central trust.\n\n"
        + markdown_table(head, lines)
        + "\n\n"
        + _meaning(cells, rows, told)
    )


def _default_beside(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    task, trust = cell.track.setting.split("/")
    place = f"{task}/{trust.replace('no-privacy', 'central')}"
    wanted = (place, cell.track.epsilon or 8.0, cell.seed)
    defaults = [one for one in cells if one.track.method == "hybrid" and not one.rate_step]
    return next((one for one in defaults if (one.track.setting, one.track.epsilon, one.seed) == wanted), None)


def _difference(out: Path, ours: Cell, theirs: Cell) -> Estimate:
    first, second = (
        parse_json((out / "runs" / one.key / "outcomes.json").read_bytes())["this run"] for one in (ours, theirs)
    )
    changes = [later - earlier for earlier, later in zip(first["losses"], second["losses"], strict=True)]
    return ratio_of_sums(changes, first["targets"])


def _verdict(change: Estimate) -> str:
    if change.low <= 0 <= change.high:
        return "cannot be told apart"
    better = "the default is better" if change.value > 0 else "the default is worse"
    return f"{better}, by little" if abs(change.value) < SMALL else better


def _meaning(cells: Sequence[Cell], rows: dict[str, Row], told: Sequence[tuple[Cell, Estimate, float, str]]) -> str:
    """What the numbers say about a user's choice of encoder, in sentences that each rest on a row above."""
    sentences = []
    for cell in cells:
        task, trust = cell.track.setting.split("/")
        if (cell.track.method, cell.seed, cell.rate_step) == ("hybrid", 0, 0):
            row = rows[cell.key]
            base, value = row["results"]["base model"]["value"], loss_of(row)
            sentences.append(
                f"*{task}*, {trust} trust, ε {cell.track.epsilon:g}: the default, with no rate chosen, goes from {base:.2f} to {value:.2f} with {bytes_text(row['bytes_up'])} of "
                "uploads by all clients together."
            )
    for method, words in (
        ("dp-lora", "DP-LoRA"),
        ("random", "The random sketch"),
        ("ffa", "FFA-LoRA"),
        ("lora", "LoRA without privacy"),
    ):
        own = [
            (cell, change, ratio, word)
            for cell, change, ratio, word in told
            if cell.track.method == method and cell.track.epsilon in (8.0, None)
        ]
        if own:
            each = "; ".join(
                f"{' '.join(cell.track.setting.split('/')[:2]).removesuffix(' central').removesuffix(' no-privacy').replace(' local', ' (local trust)')}{f', rate x{2.0**cell.rate_step:g}' if cell.rate_step else ''}: {change.value:+.2f} nats at {ratio:.2g} times the bytes, {word}"
                for cell, change, ratio, word in own
            )
            sentences.append(f"{words} against the default: {each}.")
    for cell in cells:
        row = rows[cell.key]
        if loss_of(row) > row["results"]["base model"]["value"]:
            task, arm, trust, *_ = _words(cell)
            unfit = ". Such a row is no measure of what the method can do"
            why = f"The rate was too large for it{unfit}"
            if row["energy"] and all(round_["mean"] < 1e-3 for round_ in row["energy"]):
                why = (
                    "Its code holds nothing of the update (below), so that the server's steps are noise at any rate: the check before the "
                    "rounds, which the study turns off, refuses it"
                )
            elif trust == "local":
                why = f"The noise of so few clients, each with its own, is too much for this rate (the plan chooses a lower one){unfit}"
            sentences.append(
                f"*{task}*, {arm}, {trust} trust, rate x{2.0**cell.rate_step:g}: the run ended worse than it began. {why}.".replace(
                    "- trust", "no privacy"
                )
            )
    return "**What it means for a choice of encoder.**\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _energy(cells: Sequence[Cell], rows: dict[str, Row]) -> str:
    shown = (1, 2, 5, 10)
    lines = []
    for cell in cells:
        by_round = {one["round"]: one for one in rows[cell.key]["energy"]}
        if not by_round or cell.track.method in ("dp-lora", "lora"):
            continue
        last = by_round[max(by_round)]
        parts = [f"{by_round[r]['mean']:.2f} / {by_round[r]['client']:.2f}" if r in by_round else "-" for r in shown]
        lines.append([*_words(cell)[:4], *parts, f"{last['agreement']:.2f}"])
    if not lines:
        return ""
    head = ["task", "what", "trust", "ε", *(f"round {r}" for r in shown), "agreement"]
    return (
        "## Energy that a code holds\n\nThe share of the mean update's energy, and of a client's own, that the code keeps, measured on the clients' own updates of a round, "
        "which only a study of public text may look at. *Agreement* is the length of the mean update by the mean length of the clients' (last round): near 1 all clients "
        "pull one way. DP-LoRA and LoRA send whole updates and keep all. The share is that of the whole update, LoRA's A included: the default and FFA-LoRA leave A where it "
        "started, and A's gradient, which is zero at the start, soon is most of a whole update's length without being needed to learn.\n\n"
        + markdown_table(head, lines)
    )


def _benchmarks(out: Path) -> str:
    """MMLU and C-Eval of base and one adapted model, from what `drencoder evaluate --json` printed into evaluate-*.json."""
    lines = []
    for path in sorted(out.glob("evaluate-*.json")):
        for name, found in parse_json(path.read_bytes())["benchmarks"].items():
            row = next(one for one in found["rows"] if one["part"] == "overall")
            parts = [f"{name}: {found['prompt']}", f"{row['base']['count']:.0f}", _estimate(row["base"])]
            if row["adapter"]:
                change, test = row["difference"], row["mcnemar"]
                parts += [
                    _estimate(row["adapter"]),
                    f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})",
                ]
                parts += [f"{test['gained']}/{test['lost']}", f"{test['p']:.2f}"]
            lines.append([path.stem.removeprefix("evaluate-"), *parts])
    if not lines:
        return ""
    head = ["run", "benchmark", "questions", "base", "adapted", "difference", "gained/lost", "p"]
    return (
        "## MMLU and C-Eval\n\nBy lm-eval, through `drencoder evaluate DIR/runs/KEY --tasks mmlu,ceval --subjects ... --limit ... --json > DIR/evaluate-RUN.json`. "
        "The adapter was trained for another task, so nothing but harm was to be expected; p is McNemar's.\n\n"
        + markdown_table(head, lines)
    )


def _left_out(rows: dict[str, Row]) -> str:
    failed = [f"- `{key}`: {row['error']}" for key, row in rows.items() if "error" in row]
    missing = [cell.key for cell in study.CELLS if cell.key not in rows]
    parts = []
    if failed:
        parts.append("## Runs that could not be\n\n" + "\n".join(failed))
    if missing:
        parts.append(
            "## Not run\n\nThe hours ended before these cells, which the first command above goes on with (`--cells KEY` runs one):\n\n"
            + "\n".join(f"- `{key}`" for key in missing)
        )
    return "\n\n".join(parts)
