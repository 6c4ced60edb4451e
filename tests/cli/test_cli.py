"""The command line as a user meets it: real processes, exit codes, one sentence and no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from conftest import tiny_overrides
from drencoder.cli import main as cli
from drencoder.reading import printable
from lm_eval_by_hand import write_original_folder

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def drencoder(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drencoder", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, in `tmp_path`: a process of its own spends five seconds on importing torch."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(arguments, ended.value.code, *capfd.readouterr())

    return call


def sets(folder: Path, *more: str) -> list[str]:
    return [f"--set={text}" for text in [*tiny_overrides(folder), *more]]


def test_plan_needs_no_torch_and_prints_every_observer() -> None:
    code = (
        "import sys; sys.argv = ['drencoder', 'plan']\n"
        "from drencoder.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("server", "clients", "public", "noise multiplier", "bytes a message", "training takes about"):
        assert word in done.stdout


def test_plan_json_is_the_plan() -> None:
    done = drencoder("plan", "--json", "--set", "privacy.epsilon=2", "--set", "privacy.trust=central")
    overview = json.loads(done.stdout)
    assert overview["privacy"]["target_epsilon"] == 2.0
    assert 1.99 < overview["observers"]["public"]["epsilon_pld"] <= 2.0
    assert overview["observers"]["server"]["epsilon_pld"] == "inf"
    assert overview["weight_bytes"] == 4 * 1_007_104  # the embedded model in float32
    usual, most = overview["training_bytes"]
    assert overview["weight_bytes"] < usual <= most < 2e9


def test_plan_reads_the_data(tmp_path: Path, command: Command) -> None:
    records = [{"question": f"secret {i}", "answer": "b", "who": f"p{i % 30}"} for i in range(90)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "mine.toml").write_text(
        'data = { source = "text.jsonl", client_field = "who" }\n'
        "federation = { rounds = 2, sampling_rate = 0.33 }\nprivacy.epsilon = 2"
    )
    done = command("plan", "mine.toml")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.replace("│", " ").split())
    for words in (
        "question and answer",
        "90, about",
        "30 (owners in 'who'); how many",
        "30 owners under local trust",
        "nothing can be learned",
        "Central trust would",
    ):
        assert words in shown
    assert "secret" not in done.stdout
    found = json.loads(command("plan", "mine.toml", "--json").stdout)
    assert (found["data"]["records"], found["data"]["clients"], found["privacy"]["population"]) == (90, 30, 30)
    elsewhere = command(
        "plan", "mine.toml", "--set", "data.source=elsewhere.jsonl", "--set", "federation.population=30"
    )
    assert elsewhere.returncode == 0
    assert "not on this machine" in " ".join(elsewhere.stdout.split())
    missing = command("plan", "mine.toml", "--set", "data.source=elsewhere.jsonl")
    assert missing.returncode == 2
    assert "does not exist" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--set", "data.fields={body='x'}"], "'body' is not known: choose one of instruction"),
        (["plan", "--set", "data.fields=3"], "not a table of texts"),
        (["plan", "--set", "data.fields={text=3}"], "data.fields.text = 3 is not a text"),
        (["plan", "nowhere.toml"], "does not exist"),
        (["plan", "--set", "privacy.epsilo=2"], "did you mean 'epsilon'"),
        (["plan", "--set", "privacy.epsilon=0"], "must be above 0"),
        (["plan", "--set", "privacy.delta=0.01"], "below 1 / population"),
        (["plan", "--set", "federation.rounds=200"], "raise the participation cap"),
        (["run", "--set", "model.device=cuda"], "sees no GPU"),
        (["run", "--set", "model.source=./nowhere"], "is not there"),
        (["run", "--set", "data.source=nowhere.jsonl"], "does not exist"),
        (["run", "--set", "adapter.targets=['nothing']"], "names no linear layer"),
        (["run", "--resume", "nowhere"], "not a run folder"),
        (["run", "--resume", "x", "--set", "seed=1"], "with its own recipe"),
        (["verify", "nowhere"], "not a run folder"),
        (["report", "nowhere"], "not a run folder"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path: Path, command: Command, arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_process_of_its_own_says_no_more(tmp_path: Path) -> None:
    done = drencoder("run", "--set", "model.source=./nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("Traceback")) == (2, 0)
    assert "is not there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_verify_report(tiny_folder: Path, tmp_path: Path, command: Command) -> None:
    done = drencoder("run", "quickstart", *sets(tiny_folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Plan of", "stage 1", "gate", "round 4", "base model", "zero update", "this run", "Uploads"):
        assert words in done.stdout
    run = tmp_path / "runs" / "quickstart"
    assert command("verify", str(run)).returncode == 0
    quiet = command("verify", str(run), "-q")
    assert (quiet.returncode, quiet.stdout) == (0, "")
    found = json.loads(command("verify", str(run), "--json").stdout)
    assert (found["holds"], found["troubles"], found["charges"]) == (True, [], 5)
    assert {row["observer"] for row in found["epsilon"]} == {"server", "clients", "public"}
    (run / "report.html").unlink()
    assert command("report", str(run)).returncode == 0
    page = (run / "report.html").read_text()
    assert "<svg" in page
    for outside in ("<script", "src=", "url(http", "<link", "@import"):
        assert outside not in page  # nothing is fetched when the page is opened

    again = command("run", "quickstart", *sets(tiny_folder))
    assert again.returncode == 0
    assert (tmp_path / "runs" / "quickstart-2").is_dir()

    certificate = json.loads((run / "certificate.json").read_text())
    certificate["observers"]["server"]["by_relation"]["add_remove"]["epsilon_pld"] = 1.0
    (run / "certificate.json").write_text(json.dumps(certificate))
    caught = command("verify", str(run))
    assert caught.returncode == 1
    assert "Does not hold" in caught.stdout
    as_json = command("verify", str(run), "--json")
    found = json.loads(as_json.stdout)
    assert (as_json.returncode, found["holds"]) == (1, False)
    assert any("observers" in trouble for trouble in found["troubles"])


def test_ctrl_c_says_how_to_go_on(tiny_folder: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    start = [
        sys.executable,
        "-m",
        "drencoder",
        "run",
        "quickstart",
        *sets(tiny_folder, "federation.rounds=9"),
        "--out",
        str(run),
    ]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (run / "ledger.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "--resume" in out
    assert "Traceback" not in err
    done = command("run", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert (run / "certificate.json").exists()


def test_ctrl_c_before_the_ledger_promises_nothing_to_resume(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "drencoder", "run", "quickstart", *sets(tiny_folder), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "loading" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert not run.exists()
    assert "nothing was asked or charged" in out
    assert "--resume" not in out
    assert "Traceback" not in err


# --- plan --curve, compare, evaluate, audit -------------------------------------------------------------------

REFERENCE = [
    "--set=privacy.trust=central", "--set=federation.population=100", "--set=federation.sampling_rate=0.05",
    "--set=federation.rounds=20", "--set=prior.source=none",
]  # fmt: skip


def test_curve_shows_and_draws_the_budget_per_round(tmp_path: Path, command: Command) -> None:
    done = command("plan", "--curve", "--sigmas", "0.997,2", *REFERENCE, "--plot", "budget.png")
    assert done.returncode == 0, done.stderr
    assert "guarantees: PLD, RDP" in done.stdout
    for number in ("1.999", "2.498"):  # PLD and RDP of the reference setting after round 20
        assert number in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"budget.png"}
    as_json = json.loads(command("plan", "--curve", "--json", "--sigmas", "0.997", *REFERENCE).stdout)
    assert round(as_json["budgets"][0]["points"][-1]["epsilon_pld"], 3) == 1.999


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--curve", "--sigmas", "one"], "not a list of numbers"),
        (["plan", "--curve", "--sigmas", "-1"], "-1"),
        (["plan", "--sigmas", "1"], "belong to --curve"),
        (["plan", "--curve", "--observer", "judge"], "'judge'"),
        (["plan", "--curve", "--plot", "budget.gif"], "budget.gif"),
        (["compare", "--set", "compare.methods=['dp-laura']"], "'dp-laura'"),
        (["compare", "--set", "compare.epsilons=[0]"], "above 0"),
        (["compare", "--out", "."], "already there"),
        (["evaluate", "nowhere/at/all"], "nowhere/at/all"),
        (["evaluate", "embedded", "--tasks", "mmlu", "--from", "mmlu"], "TASK=FOLDER"),
        (["evaluate", "embedded", "--tasks", "mmlu", "--from", "mmlu=nofolder"], "nofolder"),
        (["evaluate", "embedded", "--tasks", "mmlu", "--limit", "0"], "--limit 0"),
        (["audit", "nowhere.toml"], "does not exist"),
        (["audit", "--canaries", "3"], "--canaries"),
        (["audit", "--set", "privacy.trust=non-private"], "no promise to audit"),
    ],
)
def test_wrong_input_of_the_newer_commands_is_one_sentence(
    tmp_path: Path, command: Command, arguments: list[str], words: str
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    done = command(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_evaluate_prints_base_and_categories_as_json(command: Command, tmp_path: Path) -> None:
    folder = write_original_folder("mmlu", tmp_path / "mmlu")
    arguments = ["evaluate", "embedded", "--tasks", "mmlu", "--from", f"mmlu={folder}", "--limit", "5"]
    done = command(*arguments, "--subjects", "anatomy, philosophy", "--shots", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "mmlu, base model" in done.stderr  # the progress
    benchmark = json.loads(done.stdout)["benchmarks"]["mmlu"]
    counts = {row["name"]: row["base"]["count"] for row in benchmark["rows"]}
    assert counts == {"overall": 10, "humanities": 5, "other": 5, "anatomy": 5, "philosophy": 5}
    assert benchmark["prompt"] == "asked by lm-eval, 1 worked examples"
    assert all(row["adapter"] is None for row in benchmark["rows"])
    quiet = command(*arguments, "-q")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "virology" in quiet.stdout


def test_generate_asks_a_finished_run(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    assert command("run", "quickstart", *sets(tiny_folder, "federation.rounds=1"), "--out", "run").returncode == 0
    alone = command("generate", "run", "Say A", "--max-tokens", "3", "-q")
    assert (alone.returncode, alone.stderr) == (0, "")
    shown = json.loads(command("generate", "run", "Say A", "--max-tokens", "3", "--json").stdout)
    assert (shown["run"], printable(shown["text"])) == ("run", alone.stdout.strip())  # noise decides what it says
    assert shown["tokens"] <= 3
    for arguments, sentence in (
        (["generate", "run", " "], "nothing to ask"),
        (["generate", "nowhere", "Say A"], "not a run folder"),
        (["generate", "run", "Say A", "--temperature", "inf"], "not finite"),
        (["generate", "run", "Say A", "--device", "tpu"], "choose one of auto, cpu, cuda"),
        (["generate", "run", "Say A", "--seed", str(1 << 70)], "out of range"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 or done.stderr.startswith("loading torch")


def certificate_of(run: Path) -> Any:
    return json.loads((run / "certificate.json").read_text())


def test_an_interrupted_quiet_run_says_so_beside_its_output(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drencoder.runs.run.run", interrupted)
    for option in ("-q", "--json"):
        done = command("run", option, "--out", "mine")
        assert (done.returncode, done.stdout) == (130, "")
        assert "nothing was asked or charged" in done.stderr


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))  # type: ignore[attr-defined]
def test_every_command_can_be_read_by_a_program(name: str) -> None:
    """Those without --json print one path, or run until they are stopped."""
    options = {option for parameter in get_command(cli.app).commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert "--json" in options or name in {"report", "certs", "client"}
    assert "--quiet" in options or name in {"report", "certs", "plan", "knobs"}


def test_run_shows_answers_and_the_twin_and_is_silent_on_demand(
    tiny_folder: Path, tmp_path: Path, command: Command
) -> None:
    few = sets(tiny_folder, "federation.rounds=1")
    done = command("run", "quickstart", *few, "--twin", "--out", "loud")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert shown.count("Prompt: ") == 3
    assert "no client's text is among them" in shown
    assert "Twin without noise (NOT private)" in shown
    assert "must not be shared" in shown
    quiet = command("run", "quickstart", *few, "-q", "--out", "quiet")
    assert (quiet.returncode, quiet.stdout.strip()) == (0, "quiet")
    assert not (tmp_path / "quiet" / "samples.json").exists()
    found = command("run", "quickstart", *few, "--json", "--out", "json")
    assert json.loads(found.stdout) == {
        "folder": "json",
        "certificate": certificate_of(tmp_path / "json"),
        "twin": None,
    }
    refused = command("run", "quickstart", *few, "--set=privacy.trust=non-private", "--twin", "--out", "none")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "leave --twin out" in refused.stderr
    assert not (tmp_path / "none").exists()
