"""What a person sees in the terminal: the plan, the rounds as they come, the summary. No torch here."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from drencoder.encoders.code_sizes import bytes_text
from drencoder.privacy.plan import PrivacyPlan
from drencoder.runs.plan_overview import Overview

__all__ = ["RunDisplay", "epsilon_text", "interrupted", "observers_table", "plan_tables", "summary_table"]

_SHOWN_ROUNDS = 10


def epsilon_text(epsilon: float | str | None) -> str:
    """Epsilon with three digits; no guarantee is said in words. Files write an infinite epsilon as "inf"."""
    if epsilon is None:
        return "-"
    return "[red]none[/red]" if math.isinf(float(epsilon)) else f"{float(epsilon):.3f}"


def interrupted(command: str, folder: Path) -> str:
    """What a person reads after Ctrl-C: how to go on with `drencoder <command>`, or that nothing has begun."""
    if (folder / "ledger.jsonl").exists():
        return f"\nInterrupted. Nothing is lost: drencoder {command} --resume {escape(str(folder))}"
    return "\nInterrupted before the run began: nothing was asked or charged. Start the same command again."


def plan_tables(overview: Overview, name: str, encoder: str) -> list[Table]:
    """The plan as two tables: the run, and epsilon per observer."""
    plan = overview.privacy
    run = Table(title=f"Plan of {name!r}", show_header=False, title_justify="left")
    run.add_row("trust", _trust_words(plan))
    run.add_row(
        "clients", f"{plan.population:,}, about {plan.expected_cohort:,.0f} a round (q = {plan.sampling_rate:g})"
    )
    stage1 = f"stage 1 (about {plan.stage1_cohort:,.0f} clients), then " if plan.stage1_rate else ""
    run.add_row("schedule", f"{stage1}{plan.rounds} rounds")
    if plan.capped:
        run.add_row("participation cap", f"{plan.participation_cap} release(s) of one client in the whole run")
    if plan.noise_multiplier:
        run.add_row("noise multiplier", f"{plan.noise_multiplier:.4f} (noise std / clip_l2), delta = {plan.delta:g}")
        if plan.trust == "secure-aggregation":
            terms = plan.share_terms(1)
            run.add_row(
                "noise shares",
                f"{terms.multiplier:.4f} of each client; at least {terms.least_contributors} contributors a round or it is "
                f"void, {terms.honest} of them honest",
            )
        run.add_row("k*", f"{_few_digits(overview.k_star)} coordinates that the noise lets a round learn")
    if overview.adapter_size is None or overview.code_size is None:
        run.add_row("adapter", "size known once the model is on this machine")
    else:
        ratio = overview.adapter_size / overview.code_size
        sender = "a node and round" if plan.trust == "secure-aggregation" else "a message"
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
    return [run, observers_table({key: value.to_dict() for key, value in plan.epsilons().items()}, plan.delta)]


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _trust_words(plan: PrivacyPlan) -> str:
    if "round" in plan.non_private:
        return "non-private"
    return f"{plan.trust}, [red]but stage 1 sends real gradients un-noised[/red]" if plan.non_private else plan.trust


def observers_table(observers: Mapping[str, Mapping[str, Any]], delta: float) -> Table:
    """Epsilon (PLD) for each observer under both adjacencies; RDP, GDP and CLT under add/remove."""
    table = Table(
        title=f"Client-level epsilon at delta = {delta:g}",
        title_justify="left",
        caption="clients: the other ones; public: all who get the model; * an approximation, not a guarantee",
        caption_justify="left",
    )
    for heading in ("observer", "add/remove", "replace-one", "RDP", "GDP mu", "CLT*"):
        table.add_column(heading, justify="left" if heading == "observer" else "right")
    for key, row in observers.items():
        both = row["by_relation"]
        table.add_row(
            key,
            epsilon_text(both["add_remove"]["epsilon_pld"]),
            epsilon_text(both["replace_one"]["epsilon_pld"]),
            epsilon_text(both["add_remove"]["epsilon_rdp"]),
            epsilon_text(both["add_remove"]["mu"]),
            epsilon_text(both["add_remove"]["epsilon_clt_approx"]),
        )
    return table


def summary_table(certificate: Mapping[str, Any]) -> Table:
    """Base model, zero update and this run."""
    table = Table(title="Result (95 % confidence intervals)", title_justify="left")
    benchmarks = list(certificate["results"]["base model"]["accuracy"])
    table.add_column("model")
    table.add_column("held-out loss", justify="right")
    for name in benchmarks:
        table.add_column(f"{name} accuracy", justify="right")
    for row, result in certificate["results"].items():
        table.add_row(row, _estimate(result["loss"]), *(_estimate(result["accuracy"][name]) for name in benchmarks))
    return table


def _estimate(row: Mapping[str, float]) -> str:
    return f"{row['value']:.3f} [dim][{row['low']:.3f}, {row['high']:.3f}][/dim]".replace("[dim][", "[dim]\\[")


class RunDisplay:
    """Shows a run as it goes: a live table on a terminal, one line per event elsewhere."""

    def __init__(self, console: Console, *, rounds: int, encoder: str, name: str) -> None:
        self.console = console
        self._encoder, self._name = encoder, name
        self._rows: list[Mapping[str, Any]] = []
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("rounds", total=rounds)
        self._live: Live | None = None

    def planned(self, overview: Overview) -> None:
        for table in plan_tables(overview, self._name, self._encoder):
            self.console.print(table)
        for warning in overview.warnings():
            self.console.print(f"[yellow]Note:[/yellow] {warning}")

    def say(self, text: str) -> None:
        """One line about what is going on."""
        self.console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {text}", highlight=False)

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Takes a metrics row: round, loss, accuracy, epsilon, bytes_up."""
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
        self.close()
        self.console.print(summary_table(certificate))
        self.console.print(observers_table(certificate["observers"], certificate["delta"]))
        if not certificate["private"]:
            self.console.print(f"[bold red]NOT PRIVATE:[/bold red] {certificate['statement']}")
        sent = certificate["bytes"]
        self.console.print(
            f"Uploads: {bytes_text(sent['uploaded'])} ({sent['counted']}), plain LoRA {bytes_text(sent['plain_lora'])}: "
            f"{sent['plain_lora'] / max(1, sent['uploaded']):.1f} times more."
        )

    def _table(self) -> Table:
        table = Table(title="Stage 2", title_justify="left")
        for heading in ("round", "held-out loss", "accuracy", "epsilon spent", "bytes up"):
            table.add_column(heading, justify="right")
        for row in self._rows[-_SHOWN_ROUNDS:]:
            table.add_row(*self._cells(row))
        return table

    def _cells(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        loss = f"{row['loss']:.3f}" if row.get("loss") is not None else "-"
        accuracy = f"{row['accuracy']:.3f}" if row.get("accuracy") is not None else "-"
        return str(row["round"]), loss, accuracy, spent_text(row["epsilon"]), bytes_text(row["bytes_up"])

    def _line(self, row: Mapping[str, Any]) -> str:
        number, loss, accuracy, epsilon, sent = self._cells(row)
        return f"round {number}: held-out loss {loss}, accuracy {accuracy}, epsilon {epsilon}, {sent} up"


def spent_text(epsilon: Mapping[str, float | str]) -> str:
    """Epsilon spent against the server and the public, short."""
    if math.isinf(float(epsilon["server"])):
        return f"{epsilon_text(epsilon['public'])} (public)"
    return f"{epsilon_text(epsilon['server'])} (server) {epsilon_text(epsilon['public'])} (public)"
