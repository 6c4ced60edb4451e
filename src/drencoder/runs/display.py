"""What a person sees in the terminal: the plan, the rounds as they come, the summary. No torch here.

Names, paths, errors and provenance come from outside: from recipes, folders and other machines. They are shown letter for
letter. So every console of the package comes from `make_console`, which knows no markup, style is given by `Text` objects,
and `printable` takes the control characters out.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drencoder.encoders.code_sizes import bytes_text
from drencoder.models.training_size import free_memory, gigabytes
from drencoder.privacy.plan import PrivacyPlan
from drencoder.privacy.site_epsilons import UNITS
from drencoder.reading import printable
from drencoder.runs.certificate import lost_sentences
from drencoder.runs.plan_overview import Overview
from drencoder.runs.unit_table import k_star_text

_SHOWN_ROUNDS = 10
_RUN_FILES = "adapter/, ledger.jsonl, certificate.json, report.html"


# --- what every command shows with -----------------------------------------------------------------


def make_console(**options: Any) -> Console:
    """Returns a console that shows strings letter for letter: no markup, no emoji codes, no highlighting.

    Args:
      options: what `rich.console.Console` takes, such as `file`, `width` and `stderr`.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def make_table(title: str, *headings: str, words: Sequence[str] = (), caption: str | None = None) -> Table:
    """Returns an empty table with its title on the left. Columns named in `words` stand on the left, the others right."""
    table = Table(
        title=Text(printable(title), style="table.title"),
        title_justify="left",
        caption=None if caption is None else Text(printable(caption), style="table.caption"),
        caption_justify="left",
        show_header=bool(headings),
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table


def make_progress(unit: str, console: Console | None = None, *, what: bool = False) -> Progress:
    """Returns a progress bar that counts `unit` and shows the time that has passed and that is left.

    `console` is where it shows, standard output if none is given; with `what`, each bar begins with its own description.
    """
    heading = [TextColumn("{task.description}", markup=False)] if what else []
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*heading, *columns, console=console)


def estimate_cell(value: float, low: float, high: float) -> Text:
    """Returns an estimate and its interval, the interval dimmed."""
    return Text.assemble(f"{value:.3f} ", (f"[{low:.3f}, {high:.3f}]", "dim"))


def show_note(console: Console, label: str, text: str, style: str = "yellow") -> None:
    """Prints a label in colour and then a sentence."""
    console.print(Text.assemble((f"{label}: ", style), printable(text)))


def show_run_folder(console: Console, folder: Path) -> None:
    """Prints where a finished run lies and what is in it."""
    console.print(f"Run folder: {printable(folder)}  ({_RUN_FILES})", soft_wrap=True)


# --- tables ----------------------------------------------------------------------------------------


def plan_tables(overview: Overview, name: str, encoder: str) -> list[Table]:
    """Returns the plan as two tables: the run, and epsilon per observer."""
    plan = overview.privacy
    run = make_table(f"Plan of {name!r}")
    run.add_row("trust", _trust_words(plan))
    run.add_row("owners", printable(overview.owners))
    run.add_row("evaluation", printable(overview.evaluation_rests_on))
    units = f"{plan.unit}s"
    about = f"about {plan.expected_cohort:,.0f} a round (q = {plan.sampling_rate:g})"
    if plan.curated:
        run.add_row("unit", UNITS[plan.unit])
        run.add_row("sites", f"{plan.population:,}, all in every round; each draws its own {units} in secret")
        run.add_row(units, f"{plan.units:,}, as everybody may take it ({plan.site_units:,} a site), {about}")
    else:
        run.add_row(units, f"{plan.population:,}, {about}")
    stage1 = f"stage 1 (about {plan.stage1_cohort:,.0f} {units}), then " if plan.stage1_rate else ""
    run.add_row("schedule", f"{stage1}{plan.rounds} rounds")
    if plan.capped and not plan.curated:
        run.add_row("participation cap", f"{plan.participation_cap} release(s) of one client in the whole run")
    if plan.noise_multiplier:
        run.add_row("noise multiplier", f"{plan.noise_multiplier:.4f} (noise std / clip_l2), delta = {plan.delta:g}")
        if plan.trust == "secure-aggregation":
            terms = plan.share_terms(1)
            run.add_row(
                "noise shares",
                f"{terms.multiplier:.4f} of each {'site' if plan.curated else 'client'}; at least {terms.least_contributors} contributors a round or it is "
                f"void, {terms.honest} of them honest",
            )
        run.add_row("clip", overview.clip)
        run.add_row("k*", f"{k_star_text(overview.k_star)} coordinates that the noise lets a round learn")
    run.add_row("server", overview.server_step)
    _add_size_rows(run, overview, encoder)
    observers = {key: value.to_dict() for key, value in plan.epsilons().items()}
    return [run, observers_table(observers, plan.delta, plan.unit)]


def _add_size_rows(run: Table, overview: Overview, encoder: str) -> None:
    """Adds what the run sends: adapter, code and uploads."""
    if overview.training_bytes is not None:
        run.add_row("memory", memory_words(*overview.training_bytes))
    if overview.training_way:
        run.add_row("training", overview.training_way)
    if overview.adapter_size is None or overview.code_size is None:
        run.add_row("adapter", "size known once the model is on this machine")
        return
    ratio = overview.adapter_size / overview.code_size
    sender = "a node and round" if overview.privacy.trust == "secure-aggregation" else "a message"
    run.add_row("adapter", f"{overview.adapter_size:,} values")
    run.add_row(
        "code",
        f"{overview.code_size:,} values ({encoder}, 1/{ratio:.3g}), {overview.message_bytes:,} bytes {sender}",
    )
    if overview.code_reason:
        run.add_row("code size", overview.code_reason)
    run.add_row(
        "uploads",
        f"stage 1 {bytes_text(overview.stage1_bytes or 0)}, stage 2 {bytes_text(overview.stage2_bytes or 0)}; "
        f"plain LoRA {bytes_text(overview.plain_lora_bytes or 0)}",
    )


def memory_words(usual: int, most: int) -> str:
    """Returns what training takes, and what is free, in one line."""
    longest = f", up to {gigabytes(most)} if a client's texts are as long as data.max_tokens" if most > usual else ""
    free = free_memory()
    return f"training takes about {gigabytes(usual)}{longest}" + (
        "" if free is None else f"; {gigabytes(free)} are free here"
    )


def _trust_words(plan: PrivacyPlan) -> Text:
    if "round" in plan.non_private:
        return Text("non-private")
    if plan.non_private:
        return Text.assemble(f"{plan.trust}, ", ("but stage 1 sends real gradients un-noised", "red"))
    return Text(plan.trust)


def observers_table(observers: Mapping[str, Mapping[str, Any]], delta: float, unit: str = "client") -> Table:
    """Returns epsilon for each observer: PLD under both adjacencies, RDP under add/remove."""
    table = make_table(
        f"{unit.capitalize()}-level epsilon at delta = {delta:g}",
        *("observer", "add/remove", "replace-one", "add/remove, RDP"),
        words=("observer",),
        caption=f"clients: the other {'ones' if unit == 'client' else 'sites'}; public: all who get the model; none: no promise against this observer",
    )
    for observer, row in observers.items():
        add_remove, replace_one = row["by_relation"]["add_remove"], row["by_relation"]["replace_one"]
        epsilons = [add_remove["epsilon_pld"], replace_one["epsilon_pld"], add_remove["epsilon_rdp"]]
        table.add_row(observer, *map(_epsilon_cell, epsilons))
    return table


def _epsilon_text(epsilon: float | str | None) -> str:
    """Returns epsilon with three digits, or "none" for no guarantee. Files write an infinite epsilon as "inf"."""
    if epsilon is None:
        return "-"
    return "none" if math.isinf(float(epsilon)) else f"{float(epsilon):.3f}"


def _epsilon_cell(epsilon: float | str | None) -> Text:
    text = _epsilon_text(epsilon)
    return Text(text, style="red" if text == "none" else "")


def _spent_text(epsilon: Mapping[str, float | str]) -> str:
    """Returns epsilon spent against the server and the public, short."""
    public = f"{_epsilon_text(epsilon['public'])} (public)"
    return public if math.isinf(float(epsilon["server"])) else f"{_epsilon_text(epsilon['server'])} (server) {public}"


def summary_table(certificate: Mapping[str, Any]) -> Table:
    """Returns the results of base model, zero update and this run, and the loss of guessing uniformly."""
    results = certificate["results"]
    benchmarks = list(results["base model"]["accuracy"])
    headings = ("model", "held-out loss", *(f"{printable(name)} accuracy" for name in benchmarks))
    table = make_table("Result (95 % confidence intervals)", *headings, words=("model",))
    table.add_row("guessing uniformly", f"{certificate['uniform_loss']:.3f}", *["-"] * len(benchmarks))
    for name, result in results.items():
        estimates = [result["loss"], *(result["accuracy"][benchmark] for benchmark in benchmarks)]
        cells = ("-" if one is None else estimate_cell(one["value"], one["low"], one["high"]) for one in estimates)
        table.add_row(name, *cells)
    return table


# --- a run -----------------------------------------------------------------------------------------


class RunDisplay:
    """Shows a run as it goes: a live table on a terminal, one line per event elsewhere."""

    def __init__(self, console: Console, *, rounds: int, encoder: str, name: str) -> None:
        self.console = console
        self._encoder, self._name = encoder, name
        self._rows: list[Mapping[str, Any]] = []
        self._started = time.monotonic()
        self._progress = make_progress("rounds")
        self._task = self._progress.add_task("rounds", total=rounds)
        self._live: Live | None = None

    def planned(self, overview: Overview) -> None:
        """Shows the plan and what should be known before the run starts."""
        for table in plan_tables(overview, self._name, self._encoder):
            self.console.print(table)
        for warning in overview.warnings():
            show_note(self.console, "Note", warning)

    def say(self, text: str) -> None:
        """Prints one line about what is going on."""
        self.console.print(Text.assemble((f"{time.monotonic() - self._started:6.1f} s", "dim"), f"  {printable(text)}"))

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Shows a metrics row: round, loss, accuracy, epsilon, bytes_up."""
        self._rows.append(row)
        if not self.console.is_terminal:
            self.say(self._line(row))
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._progress.update(self._task, completed=row["round"])
        self._live.update(Group(self._table(), self._progress), refresh=True)

    def close(self) -> None:
        """Leaves the last state of the live table on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finished(self, certificate: Mapping[str, Any]) -> None:
        """Shows the result, the guarantee and the bytes of a finished run."""
        self.close()
        self.console.print(summary_table(certificate))
        show_note(self.console, "Verdict", certificate["verdict"], "bold")
        self.console.print(observers_table(certificate["observers"], certificate["delta"], certificate["unit"]))
        if not certificate["private"]:
            show_note(self.console, "NOT PRIVATE", certificate["statement"], "bold red")
        for sentence in lost_sentences(certificate["slots_without_result"]):
            show_note(self.console, "Note", sentence)
        sent = certificate["bytes"]
        self.console.print(
            f"Uploads: {bytes_text(sent['uploaded'])} ({sent['counted']}), plain LoRA {bytes_text(sent['plain_lora'])}: "
            f"{sent['plain_lora'] / max(1, sent['uploaded']):.1f} times more."
        )

    def _table(self) -> Table:
        table = make_table("Stage 2", "round", "held-out loss", "accuracy", "epsilon spent", "bytes up")
        for row in self._rows[-_SHOWN_ROUNDS:]:
            table.add_row(*self._cells(row))
        return table

    def _cells(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        loss, accuracy = ("-" if row.get(key) is None else f"{row[key]:.3f}" for key in ("loss", "accuracy"))
        return str(row["round"]), loss, accuracy, _spent_text(row["epsilon"]), bytes_text(row["bytes_up"])

    def _line(self, row: Mapping[str, Any]) -> str:
        number, loss, accuracy, epsilon, sent = self._cells(row)
        measured = [
            f"{what} {value}, " for what, value in (("held-out loss", loss), ("accuracy", accuracy)) if value != "-"
        ]
        return f"round {number}: {''.join(measured)}epsilon {epsilon}, {sent} up"
