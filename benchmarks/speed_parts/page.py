"""`docs/results/speed.md` out of the JSON. What was not measured says so, with its command."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_SIZES = (1, 8, 64, 512)
_WAYS = ("plain PEFT", "drencoder", "pfl", "Flower, FlowerTune's client", "Flower, model kept")
_PUBLISHED = (
    "python benchmarks/speed.py --part published --shape llama-7b --dolly databricks-dolly-15k.jsonl --tokenizer FOLDER "
    "--device cuda --dtype bfloat16"
)


def write_page(report: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    parts = [
        _HEAD,
        *_cpu(report.get("cpu", [])),
        *_growth(report.get("growth", {})),
        *_quickstart(report.get("quickstart")),
    ]
    return "\n".join([*parts, *_published(report.get("published", [])), _TAIL])


_HEAD = """# Speed and memory

Made by `python benchmarks/speed.py`, which writes this page and `speed.json`. Everything runs on one thread. Where other software takes part, each
way has a process of its own, is warmed up once, and then all take turns; a number is the median of the repeats, and a ratio is the median of the
ratios to plain PEFT in the same turn. *CPU* is the time that the processes computed, *wall* the time that passed; on a machine with other work the CPU
time says more. *Load* is how many processes wanted one of the cores. Memory is the sum of the largest resident memory of a way's processes.
"""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _cpu(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield """## One round of a cohort, beside other software

A round: each client takes minus its mean gradient over all its records in one pass, scales it down to a fixed length if it is longer, and the server
takes the mean. All ways begin with tokens and compute the same result (to 1e-4; the last column has the difference). drencoder's own noise, codes and ledger are left out,
since the others have none. *Plain PEFT* is `get_peft_model` and `loss.backward()`, one client after the other. *pfl* is Apple's simulator, version 0.6,
eager. *Flower* is the simulation of version 1.42 with one actor. A client as FlowerTune has it loads the model for each message; *model kept* is a client that
does not.
"""
    for row in sorted(rows, key=lambda row: (row["model"] != "embedded", row["model"], row["clients"])):
        machine = row["machine"]
        yield (
            f"**{row['model']}, {_count(row['clients'], 'client')} of {row['records']} records** ({row['tokens']:,} tokens, an adapter of "
            f"{row['adapter_values']:,} values; {_count(row['repeats'], 'turn')}; load {machine['load']} on {machine['cores']} cores)\n"
        )
        yield "| way | wall s | CPU s | speed by CPU (plain PEFT = 1) | speed by wall | peak MiB | difference |"
        yield "|---|---|---|---|---|---|---|"
        for way in row["ways"]:
            yield (
                f"| {way['way']} | {way['wall_s']:.2f} | {way['cpu_s']:.2f} | {way['speed_cpu']:.2f} | {way['speed_wall']:.2f} | "
                f"{way['peak_mib']:,.0f} | {way['difference']:.0e} |"
            )
        yield ""
        speeds = {way["way"]: way["speed_cpu"] for way in row["ways"]}
        others = [f"{speeds['drencoder'] / speed:.2f} of {way}" for way, speed in speeds.items() if way != "drencoder"]
        yield f"Speed of drencoder by CPU: {', '.join(others)}.\n"
        measured = set(speeds)
        if left := [way for way in _WAYS if way not in measured]:
            yield f"Not run at this size: {'; '.join(left)}.\n"
    done = {(row["model"] == "embedded", row["clients"]) for row in rows}
    for embedded, name in ((True, "embedded"), (False, "path/to/SmolLM2-135M-Instruct --records 4")):
        left = [str(size) for size in _SIZES if (embedded, size) not in done]
        if left:
            yield (
                f"Not run: {'the embedded model' if embedded else 'SmolLM2-135M'} with {' and '.join(left)} clients. Command: "
                f"`python benchmarks/speed.py --part cpu --model {name} --clients {' '.join(left)}`\n"
            )


def _growth(tables: Mapping[str, Any]) -> Iterable[str]:
    yield "## How it grows\n"
    yield (
        "Whole private rounds of the embedded model under central trust, one short record a client. A population costs next to nothing, since what a client "
        "holds is made or read when it is asked.\n"
    )
    for name, (title, columns) in _TABLES.items():
        if name not in tables:
            yield f"**{title}**: not run. Command: `python benchmarks/speed.py --part growth --tables {name}`\n"
            continue
        yield f"**{title}** (load {tables[name]['machine']['load']})\n"
        yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
        for row in tables[name]["rows"]:
            yield f"| {' | '.join(cell(row) for cell in columns.values())} |"
        yield ""
    yield "**One update**, CPU ms. Codes are of 1/64; 8,388,608 values are LLaMA-7B's adapter at rank 8.\n"
    if "encoders" not in tables:
        yield "Not run. Command: `python benchmarks/speed.py --part growth --tables encoders`\n"
        return
    rows = tables["encoders"]["rows"]
    names = list(rows[0]["ms"])
    yield f"| values | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for row in rows:
        cells = " | ".join(f"{row['ms'][name]:.1f}" for name in names)
        yield f"| {row['values']:,} | {cells} |"
    yield ""


def _round_cpu(row: Mapping[str, Any]) -> str:
    return f"{row['round_cpu_s']:.2f}"


def _peak(row: Mapping[str, Any]) -> str:
    return f"{row['rounds_peak_mib']:,.0f}"


Columns = dict[str, Callable[[Mapping[str, Any]], str]]
_TABLES: dict[str, tuple[str, Columns]] = {
    "clients": (
        "Clients in a round",
        {
            "clients": lambda row: f"{row['clients']:,}",
            "CPU s a round": _round_cpu,
            "CPU ms a client": lambda row: f"{1000 * row['round_cpu_s'] / row['clients']:.1f}",
            "peak MiB in the rounds": _peak,
        },
    ),
    "values": (
        "Values of an adapter, 16 clients in a round",
        {
            "values": lambda row: f"{row['adapter_values']:,}",
            "CPU s a round": _round_cpu,
            "peak MiB in the rounds": _peak,
        },
    ),
    "population": (
        "Population: planning",
        {
            "population": lambda row: f"{row['population']:,}",
            "CPU s of the plan": lambda row: f"{row['plan_cpu_s']:.2f}",
            "ms to draw a cohort": lambda row: f"{row['cohort_ms']:.0f}",
            "peak MiB": lambda row: f"{row['peak_mib']:,.0f}",
        },
    ),
    "crowd": (
        "Population: a run with 1,000 clients in a round",
        {
            "population": lambda row: f"{row['population']:,}",
            "CPU s a round": _round_cpu,
            "peak MiB in the rounds": _peak,
            "of the whole run": lambda row: f"{row['peak_mib']:,.0f}",
        },
    ),
    "rounds": (
        "Rounds: planning",
        {
            "rounds": lambda row: f"{row['rounds']:,}",
            "trust": lambda row: str(row["trust"]),
            "CPU s of the plan": lambda row: f"{row['plan_cpu_s']:.2f}",
        },
    ),
}


def _quickstart(row: Mapping[str, Any] | None) -> Iterable[str]:
    yield "## The quickstart\n"
    if row is None:
        yield "Not run. Command: `python benchmarks/speed.py --part quickstart`\n"
        return
    yield (
        f"The whole quickstart on one thread takes {row['run_wall_s']:.0f} s, {row['round_cpu_s']:.1f} s of CPU a round of about 450 clients, and "
        f"{row['peak_mib']:,.0f} MiB (one run; load {row['machine']['load']}).\n"
    )


def _published(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield """## The published setting

Dolly over 100 clients by Dirichlet(0.5), 5 a round, 20 rounds, rank 8, in LLaMA-7B's shape with random weights. The authors' public code took 13.5 hours for it on
an A100, as reported.
"""
    whole = [row for row in rows if row["shape"] == "llama-7b" and row["data"] == "Dolly"]
    if not whole:
        yield f"**Not run**: it needs a GPU. Command: `{_PUBLISHED}`, and again with `--epochs 10`.\n"
    for row in sorted(rows, key=lambda row: (row["shape"], row["epochs"])):
        note = "" if row["rounds"] == 20 else f" (an estimate from {row['rounds']} rounds)"
        yield (
            f"- `--shape {row['shape']}` ({row['parameters']:,} parameters), {row['data']}, {row['epochs']} local epoch(s), on {row['device']}: "
            f"{row['round_wall_s']:.1f} s a round, {row['whole_s'] / 60:.1f} minutes in all{note}; {row['rounds_peak_mib']:,.0f} MiB."
        )
    yield ""


_TAIL = """## Elsewhere

The GPU's part is `benchmarks/gpu.py`. [secure-aggregation.md](secure-aggregation.md) has the arithmetic of secure aggregation, [flower.md](flower.md) rounds over a
network. Training the embedded model took 26 minutes on one core for 11.7 million tokens (`tools/train_embedded.py`, version 0.1).
"""
