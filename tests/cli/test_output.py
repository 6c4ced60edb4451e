"""What reaches a screen: no record's text, no markup from outside, and the right exit code when nobody reads on."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from conftest import tiny_overrides
from drencoder.cli import main as cli
from drencoder.errors import hide_crash_messages
from drencoder.reading import printable
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.display import RunDisplay, make_console, make_table, plan_tables
from drencoder.runs.plan_overview import survey

SECRET = "the patient Erika Mustermann has a rare disease"
PACKAGE = Path(cli.__file__).parents[1]


def drencoder(*arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drencoder", *arguments]
    environment = {**os.environ, **more}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=600)


# --- crashes -----------------------------------------------------------------------------------------


def crash(*_arguments: object, **_options: object) -> None:
    """Fails as a library does: the text is in a local variable, in the message and in the message of the cause."""
    record = {"instruction": SECRET}
    try:
        int(record["instruction"])
    except ValueError as error:
        raise KeyError(f"no tensor for {record}") from error


def warn(*_: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(SECRET, stacklevel=1)
    raise RuntimeError


def log(*_: object) -> None:
    logging.getLogger("a library").error(SECRET)
    logging.getLogger("a library").error("%d records", SECRET)
    raise RuntimeError


def crash_beside(*_: object) -> None:
    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    raise RuntimeError


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError(SECRET)


def noted() -> Exception:
    error = ValueError("of a record")
    error.add_note(SECRET)
    return error


FAILURES: list[Callable[..., object] | BaseException] = [
    crash, warn, log, crash_beside, UnspeakableError(SECRET), noted(), ValueError(SECRET), TypeError(SECRET), RuntimeError(SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 5, SECRET), UnicodeEncodeError("ascii", SECRET, 0, 5, SECRET),
    json.JSONDecodeError(SECRET, SECRET, 0), OSError(SECRET), OSError(errno.ENOENT, SECRET, SECRET), OSError(errno.ENOSPC, SECRET),
    ConnectionError(SECRET), AssertionError(SECRET), MemoryError(SECRET), RecursionError(SECRET), ImportError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]), subprocess.CalledProcessError(1, [SECRET], SECRET, SECRET), SystemExit(SECRET),
    SafetensorError(SECRET), torch.OutOfMemoryError(SECRET), StopIteration(SECRET), EOFError(SECRET), KeyboardInterrupt(SECRET),
]  # fmt: skip
"""What a library may do with a record: all of it ends without a word of it."""


COMMANDS = {
    "run": (["run"], "drencoder.cli.options.load_checked_recipe"),
    "run, training": (["run"], "drencoder.runs.run.run"),
    "plan": (["plan"], "drencoder.runs.plan_overview.survey"),
    "plan --curve": (["plan", "--curve"], "drencoder.privacy.budget_table.budget_table"),
    "compare": (["compare"], "drencoder.study.compare.compare"),
    "evaluate": (["evaluate", "embedded"], "drencoder.runs.assess.assess"),
    "audit": (["audit"], "drencoder.audit.audit.audit_recipe"),
    "verify": (["verify", "x"], "drencoder.runs.verify.verify_run"),
    "report": (["report", "x"], "drencoder.runs.report.remake_report"),
    "knobs": (["knobs"], "drencoder.recipe.recipe.describe_knobs"),
    "certs": (["certs", "x", "--nodes", "1"], "drencoder.flower.keys.make_certificates"),
    "server": (["server", "--certs", "certs"], "drencoder.flower.deploy.run_server"),
    "client": (["client", "--server", "127.0.0.1:9", "--key", "certs/node0/key"], "drencoder.flower.client_app.open_site"),
    "simulate": (["simulate"], "drencoder.cli.flower.choose_run"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_a_record_however_it_fails(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from drencoder.flower.keys import make_certificates

    make_certificates(tmp_path / "certs", 1, [])
    arguments, target = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRENCODER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
    for failure in FAILURES:

        def fail(*_: object, **__: object) -> None:
            raise failure  # type: ignore[misc]  # noqa: B023

        monkeypatch.setattr(target, failure if callable(failure) else fail)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capfd.readouterr()
        assert ended.value.code in ((130,) if isinstance(failure, KeyboardInterrupt) else (2, 70)), (failure, shown)
        for word in ("Mustermann", "Traceback", "no tensor"):
            assert word not in shown.out + shown.err, repr(failure)
        if failure is crash:
            assert ended.value.code == 70
            assert "unforeseen KeyError at " in shown.err
            assert re.search(r"test_output\.py:\d+ \(crash\)", shown.err)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"Mustermann" in data for data in written)


def test_the_traceback_is_shown_on_demand_and_warns(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRENCODER_TRACEBACK", "1")
    monkeypatch.setattr("drencoder.recipe.recipe.describe_knobs", crash)
    monkeypatch.setattr(sys, "argv", ["drencoder", "knobs"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capfd.readouterr().err
    assert ended.value.code == 70
    assert shown.index("may hold text of records") < shown.index("Traceback") < shown.index(SECRET)


def test_a_crash_of_a_thread_shows_no_message_either(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.excepthook, threading.excepthook
    with hide_crash_messages():
        thread = threading.Thread(target=crash)
        thread.start()
        thread.join()
    shown = capfd.readouterr().err
    assert "unforeseen KeyError" in shown
    assert "Mustermann" not in shown
    assert (sys.excepthook, threading.excepthook) == before


def test_a_crash_in_the_middle_of_a_run_shows_no_message(tiny_folder: Path, tmp_path: Path) -> None:
    """A process of its own, and an error where clients' updates are clipped: the ledger has been charged by then."""
    script = (
        "import drencoder.privacy.mechanism as mechanism\n"
        "def crash(*_arguments, **_options):\n"
        f"    raise RuntimeError({SECRET!r} + ' cannot be multiplied')\n"
        "mechanism.clip_rows = crash\n"
        "from drencoder.cli.main import main\n"
        "main()\n"
    )
    sets = [f"--set={text}" for text in tiny_overrides(tiny_folder)]
    command = [sys.executable, "-c", script, "run", "quickstart", *sets, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 70, done.stdout + done.stderr
    assert "unforeseen RuntimeError at drencoder/" in done.stderr
    assert "Mustermann" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "ledger.jsonl").exists()


def test_an_adapted_output_layer_prints_no_record(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Answers of several lengths under an adapted lm_head once ended in a traceback with 1.8 MB of local variables."""
    records = [
        {"instruction": f"Say number {i} to Mustermann", "response": "red " * (1 + i % 5), "who": f"p{i % 60}"}
        for i in range(240)
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    own = [f"data.source={file}", "data.client_field=who", "adapter.targets=['lm_head']", "evaluation.benchmarks=[]"]
    sets = [f"--set={text}" for text in [*tiny_overrides(tiny_folder), *own]]
    monkeypatch.setattr(sys, "argv", ["drencoder", "run", "quickstart", *sets, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert "Mustermann" not in out + err
    assert "Traceback" not in out + err
    assert ended.value.code in (0, 2, 70)
    assert len(err) < 2000


# --- text from outside -------------------------------------------------------------------------------

OUTSIDE = "[/x] [bold]site[/bold] [red] :smile:"


def shown_by(display_or_table: Table | str, console: Console) -> str:
    console.print(display_or_table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_name_from_another_machine_is_shown_letter_for_letter(terminal: bool) -> None:
    file = io.StringIO()
    display = RunDisplay(
        make_console(file=file, width=200, force_terminal=terminal), rounds=1, encoder="random", name=OUTSIDE
    )
    display.say(f"node {OUTSIDE}: hosts 3 clients")
    display.planned(survey(load_recipe()))
    display.close()
    assert file.getvalue().count("[/x]") == 2  # the line, and the plan's title
    assert "[bold]site[/bold] [red] :smile:: hosts" in file.getvalue()


def test_a_plain_console_survives_it_too() -> None:
    """Whoever hands the display a console of their own loses nothing."""
    file = io.StringIO()
    RunDisplay(Console(file=file, width=200), rounds=1, encoder="random", name="x").say(f"node {OUTSIDE}: no answer")
    assert OUTSIDE in file.getvalue()


def test_tables_and_notes_show_markup_as_text() -> None:
    table = make_table(OUTSIDE, OUTSIDE, caption=OUTSIDE)
    table.add_row(OUTSIDE)
    assert shown_by(table, make_console(file=io.StringIO(), width=200)).count(OUTSIDE) == 4
    title = plan_tables(survey(load_recipe()), OUTSIDE, "random")[0]
    assert OUTSIDE in shown_by(title, make_console(file=io.StringIO(), width=200))


@pytest.mark.parametrize("letters", ["\x1b[2J", "\x07", "\r", "\u202e", "\udcff", "\x9b31m"])
def test_control_characters_do_not_reach_the_terminal(letters: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), "utf-8")
    RunDisplay(make_console(file=file), rounds=1, encoder="random", name="x").say(f"node a{letters}b")
    file.flush()
    raw = file.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    assert letters not in raw
    assert printable(f"a{letters}b").isprintable()
    assert re.search(r"a\\[xru]", raw)


def test_ordinary_text_is_left_alone() -> None:
    assert printable("ε = 8, 中文\nsecond line, naïve") == "ε = 8, 中文\nsecond line, naïve"


def test_paths_are_shown_letter_for_letter(tmp_path: Path) -> None:
    made = drencoder("certs", "[/x]", "--nodes", "1", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "files in [/x]." in made.stdout
    for command in (["verify", "[/x]"], ["run", "--resume", "[/x]"], ["plan", "[/x]"], ["plan", "--set", "[/x]=1"]):
        done = drencoder(*command, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "[/x]" in done.stderr
        assert "Traceback" not in done.stderr


def test_consoles_are_made_in_one_place() -> None:
    """A console made elsewhere would read names from outside as markup."""
    makers = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bConsole\(|from_markup|\bimport print\b", path.read_text("utf-8"))
    ]
    assert makers == ["runs/display.py"]


# --- an output that nobody reads ---------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["knobs"], ["plan"], ["plan", "--json"], ["--help"], ["--version"]])
def test_a_closed_pipe_is_no_failed_check(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "drencoder", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before it writes: it has to be imported first
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("arguments", [["knobs"], ["plan"], ["plan", "--json"]])
def test_a_full_disk_behind_the_output_is_one_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "drencoder", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
