"""No text of a client on a screen or in a log: broken files of private text, and what happens in the rounds of a run."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_overrides
from drencoder.cli import main as cli
from drencoder.data.tokenization import Example
from drencoder.errors import ArtifactError
from drencoder.flower.keys import make_certificates
from drencoder.models.client_training import CohortTrainer
from drencoder.runs.run_folder import storing

CANARY = "Mustermann"
PERSON = f"Erika {CANARY} has a rare disease"
RECORD = {
    "instruction": f"What has {PERSON}?",
    "context": PERSON,
    "response": f"{PERSON}.",
    "category": PERSON,
    "who": PERSON,
}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def without(key: str) -> dict[str, str]:
    return {name: value for name, value in RECORD.items() if name != key}


GOOD = lines(*[{**RECORD, "who": f"{PERSON} {i}"} for i in range(4)])
BROKEN: dict[str, tuple[str, bytes]] = {
    "no file": ("x.jsonl", b""),
    "no instruction": ("x.jsonl", GOOD + lines(without("instruction"))),
    "no response": ("x.jsonl", GOOD + lines(without("response"))),
    "response is a list": ("x.jsonl", GOOD + lines({**RECORD, "response": [PERSON]})),
    "response is null": ("x.jsonl", GOOD + lines({**RECORD, "response": None})),
    "all responses empty": ("x.jsonl", lines({**RECORD, "response": " "}, {**RECORD, "response": ""})),
    "cut in a record": ("x.jsonl", GOOD[:-40]),
    "cut in a letter": ("x.jsonl", GOOD + PERSON.encode() + b"\xc3"),
    "not UTF-8": ("x.jsonl", GOOD + json.dumps({**RECORD, "response": "é"}, ensure_ascii=False).encode("latin-1")),
    "UTF-16": ("x.jsonl", GOOD.decode().encode("utf-16")),
    "quotes": ("x.jsonl", GOOD + b'{"instruction": "' + PERSON.encode() + b'" and more"}\n'),
    "text instead of records": ("x.jsonl", PERSON.encode()),
    "a text": ("x.jsonl", lines(PERSON)),
    "a list": ("x.jsonl", lines([PERSON])),
    "a number of 5,000 digits": ("x.jsonl", GOOD + b'{"instruction": "' + PERSON.encode() + b'", "response": ' + b"9" * 5000 + b"}\n"),
    "900 brackets": ("x.jsonl", GOOD + b'{"instruction": "' + PERSON.encode() + b'", "response": ' + b"[" * 900 + b"\n"),
    "owners differ": ("x.jsonl", GOOD + lines(without("who"))),
    "null": ("x.json", b"null"),
    "a table of records": ("x.json", json.dumps({PERSON: RECORD}).encode()),
    "a list of texts": ("x.json", json.dumps([PERSON, PERSON]).encode()),
    "a cut list": ("x.json", json.dumps([RECORD, RECORD]).encode()[:-30]),
    "zeros": ("x.jsonl", GOOD + bytes(64)),
}  # fmt: skip
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "--out", "run"],
    "audit": ["audit"],
    "client": ["client", "--server", "127.0.0.1:9", "--key", "certs/node0/key", "--data", "FILE", "--clients", "0-3", "--recipe", "r.toml"],
    "evaluate": ["evaluate", "embedded", "--tasks", "mmlu", "--from", "mmlu=FILE"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_broken_file_of_private_text_is_quoted(
    command: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_certificates(tmp_path / "certs", 1, [])
    own = [
        "data.source=FILE",
        "data.client_field=who",
        "federation.population=4",
        "federation.sampling_rate=0.5",
        "privacy.delta=0.01",
        "privacy.participation_cap=9",
    ]
    sets = [f"--set={text}" for text in [*tiny_overrides(tiny_folder), *own]] if command in ("run", "audit") else []
    (tmp_path / "r.toml").write_text(
        "[data]\nclient_field = 'who'\n[federation]\npopulation = 4\n[privacy]\ndelta = 0.01\n"
    )
    named = 0
    for way, (name, data) in BROKEN.items():
        if data:
            (tmp_path / name).write_bytes(data)
        arguments = [word.replace("FILE", name) for word in [*COMMANDS[command], *sets]]
        monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capfd.readouterr()
        assert ended.value.code == 2, (way, shown)
        named += name in shown.err
        assert CANARY not in shown.out + shown.err, way
        assert "Traceback" not in shown.err, way
        (tmp_path / name).unlink(missing_ok=True)
    assert named > 15  # the file was read, and the message names it
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in data for data in written)


def shape_of(shown: str) -> str:
    """An output without its numbers, without the adapted model's answers, which depend on its noise, and without spaces and line ends."""
    shown = re.sub(r"  this run: .*?\n(?=Prompt|The prompts)", "", shown, flags=re.DOTALL)
    return re.sub(r"\s+", "", re.sub(r"[-+]?[\d.,]+(e[-+]\d+)?", "#", shown))


def test_a_console_under_central_trust_does_not_tell_how_many_clients_failed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the clients raise or send NaN, and stdout and stderr have the same lines as those of a run of sound clients."""
    monkeypatch.chdir(tmp_path)
    sets = [
        f"--set={text}"
        for text in [
            *tiny_overrides(tiny_folder),
            "privacy.trust=central",
            "federation.sampling_rate=0.5",
            "evaluation.data=none",
            "evaluation.benchmarks=[]",  # whether it learned is a matter of chance
        ]
    ]
    monkeypatch.setattr(sys, "argv", ["drencoder", "run", "quickstart", *sets])
    ended: list[Any] = []

    def shown_by_a_run() -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main()
        ended.append(stop.value.code)
        shown = capfd.readouterr()
        assert CANARY not in shown.out + shown.err
        return shape_of(f"{shown.out}\n{shown.err}").replace("quickstart#", "quickstart")

    sound, train = shown_by_a_run(), CohortTrainer._train
    failed = 0

    def fail(
        trainer: CohortTrainer, adapter_D: torch.Tensor, clients: Sequence[int], slot: int, epochs: int
    ) -> torch.Tensor:
        nonlocal failed
        if any(client % 4 == 0 for client in clients):
            failed += 1
            raise ValueError(PERSON)
        updates = train(trainer, adapter_D, clients, slot, epochs)
        updates[[client % 4 == 1 for client in clients]] = torch.nan
        return updates

    monkeypatch.setattr(CohortTrainer, "_train", fail)
    broken = shown_by_a_run()
    assert ended == [0, 0]
    assert failed > 10
    assert broken == sound


def test_under_local_trust_it_is_said_and_counted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object) -> list[Example]:
        raise ValueError(PERSON)

    monkeypatch.setattr(CohortTrainer, "_train", fail)
    monkeypatch.setattr(
        sys, "argv", ["drencoder", "run", "quickstart", *(f"--set={text}" for text in tiny_overrides(tiny_folder))]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capfd.readouterr()
    assert stop.value.code == 0
    assert "a client's training failed (ValueError)" in shown.err
    assert CANARY not in shown.out + shown.err


# --- full disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_a_full_disk_under_a_library_is_one_sentence(library: str, tmp_path: Path) -> None:
    """A process of its own may write files of 1,000 bytes at most."""
    write: dict[str, Callable[[], str]] = {
        "safetensors": lambda: (
            "from safetensors.numpy import save_file\nsave_file({'a': __import__('numpy').zeros(9999)}, path)\n"
        ),
        "tokenizers": lambda: (
            "from tokenizers import Tokenizer, models\n"
            "Tokenizer(models.BPE({str(i): i for i in range(999)}, [])).save(path)\n"
        ),
    }
    script = (
        "import sys\nfrom pathlib import Path\nfrom drencoder.runs.run_folder import storing\npath = sys.argv[1]\n"
        "from drencoder.errors import ArtifactError\n"
        "try:\n    with storing(Path(path)):\n        exec(sys.argv[2])\nexcept ArtifactError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file"), write[library]()], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert (
        done.stdout
        == f"{tmp_path / 'file'} cannot be written (File too large): make room or permission and start again; a run goes on with --resume.\n"
    )
    assert done.stderr == ""


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of ours"), storing(tmp_path):
        raise ValueError("of ours")
    with pytest.raises(ArtifactError, match="No space left on device"), storing(tmp_path):
        raise Exception("I/O error: No space left on device (os error 28)")
