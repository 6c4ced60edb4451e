"""Names, numbers, bytes and brackets that nobody means: one short sentence each, exit code 2, nothing left behind."""

import sys
from pathlib import Path

import pytest

from drencoder.cli import main as cli

LONG, NINES, BRACKETS = "a" * 300, "9" * 5000, "[" * 900
FILES: dict[str, bytes] = {
    "latin.toml": b"name = 'caf\xe9'",
    "utf16.toml": "name = 'run'".encode("utf-16"),
    "nul.toml": b'name = "a\\u0000b"',
    "nul_path.toml": b'[data]\nsource = "a\\u0000b.jsonl"',
    "nul_model.toml": b'[model]\nsource = "a\\u0000b"',
    "escape.toml": b'[data]\nsource = "\\u001b[2J.jsonl"',
    "long_name.toml": f"name = '{LONG}'".encode(),
    "long_text.toml": f"[data]\nsource = '{'a' * 100_000}'".encode(),
    "digits400.toml": f"seed = {'9' * 400}".encode(),
    "digits5000.toml": f"seed = {NINES}".encode(),
    "hex.toml": b"seed = 0x" + b"f" * 9000,
    "brackets.toml": f"name = {BRACKETS}{']' * 900}".encode(),
    "open.toml": f"name = {BRACKETS}".encode(),
    "tables.toml": b"name = " + b"{a = " * 300 + b"1" + b"}" * 300,
    "long_key.toml": b"a." * 50_000 + b"a = 1",
    "long_table.toml": b"[" + b"a . " * 25_000 + b"a]",
    "key.toml": b"a" * 100_000 + b" = 1",
    "quoted_key.toml": b'"' + b"a" * 100_000 + b'" = 1',
    "null.json": b"null",
    "text.json": b'"text"',
    "brackets.json": f"{BRACKETS}{']' * 900}".encode(),
    "digits.json": NINES.encode(),
    "latin.jsonl": b'{"instruction": "caf\xe9", "response": "x"}\n',
    "brackets.jsonl": b'{"instruction": ' + BRACKETS.encode() + b"\n",
    "digits.jsonl": b'{"instruction": "x", "response": "y", "n": ' + NINES.encode() + b"}\n",
}
COMMANDS: list[list[str]] = [
    *(["plan", name] for name in FILES if name.endswith(".toml")),
    *(["run", f"--set=data.source={name}", "--out", "made"] for name in FILES if not name.endswith(".toml")),
    *(["audit", f"--set=data.source={name}"] for name in ("null.json", "latin.jsonl")),
    *(["run", "--set", f"data.source={where}"] for where in ("hub:..", "hub:.", "hub:", "hub:../..", "..", LONG, "mmlu:" + LONG, "mmlu:..")),
    *(["plan", "--set", f"model.source={where}"] for where in (LONG, f"/{LONG}", f"{LONG}.gguf", "..", "null.json", "x" * 300)),
    ["generate", LONG, "text"], ["generate", "..", "text"], ["generate", "..", " "], ["generate", "..", "text", "--max-tokens", NINES],
    ["generate", "..", "text", "--temperature", "nan"], ["generate", "..", "text", "--seed", NINES],
    ["plan", LONG], ["plan", "--set", f"seed={NINES}"], ["plan", "--set", f"privacy.epsilon={NINES}"], ["plan", "--set", f"seed={'9' * 400}"],
    ["plan", "--set", f"name={BRACKETS}"], ["plan", "--set", f"{'a' * 100_000}=1"], ["plan", "--set", f"privacy.{LONG}=1"],
    ["plan", "--set", f"name={LONG}"], ["plan", "--set", "name=\udcff"], ["plan", "--set", "data.source=\udcff"], ["plan", "--set", LONG],
    ["plan", "--curve", "--sigmas", NINES], ["plan", "--curve", "--sigmas", "1e-300"], ["plan", "--curve", "--sigmas", "1e300"],
    ["plan", "--set", "privacy.noise_multiplier=1e-300"], ["plan", "--set", "privacy.noise_multiplier=1e300"],
    ["plan", "--set", "privacy.epsilon=1e300"], ["plan", "--set", "federation.rounds=999999999"], [LONG], ["plan", f"--{LONG}"],
    ["run", "--out", LONG], ["run", "--resume", LONG], ["verify", LONG], ["report", LONG], ["evaluate", LONG], ["compare", "--out", LONG],
    ["evaluate", "embedded", "--tasks", "mmlu", "--from", LONG], ["compare", "--processes", NINES], ["audit", "--canaries", "9" * 19],
    ["certs", LONG, "--nodes", "1"], ["certs", "made", "--nodes", NINES], ["certs", "made", "--nodes", "1", "--days", "9999999"],
    ["certs", "made", "--nodes", "1", "--host", LONG], ["certs", "made", "--nodes", "1", "--host", "münchen.de"],
    ["client", "--server", LONG, "--key", LONG, "--clients", "0"], ["client", "--server", "x:1", "--key", "null.json", "--root", "null.json"],
    ["server", "--nodes", "null.json"], ["server", "--nodes", LONG], ["server", "--port", NINES], ["simulate", "--nodes", NINES],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", COMMANDS, ids=lambda words: " ".join(words)[:60].encode("ascii", "replace").decode()
)
def test_what_nobody_means_is_one_short_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES.keys() & {word.rpartition("=")[2] for word in arguments}:
        (tmp_path / name).write_bytes(FILES[name])
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    last = said.splitlines()[-1]
    assert last.startswith("drencoder: ")
    assert last.isprintable()
    assert len(last) < 1000
    assert max(map(len, last.split())) <= 200
    assert "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before
