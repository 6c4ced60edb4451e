"""A finished run is signed by whom it was signed, and every change of file, line or key shows."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from typer.testing import CliRunner

from conftest import tiny_overrides
from drencoder.cli.main import app
from drencoder.errors import ArtifactError
from drencoder.flower.keys import make_certificates
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.signatures import read_signers, sign_run
from drencoder.runs.verify import verify_run
from tampering import Forgery, reaccount

FIRST = '{"key": "ssh-ed25519 AAAA", "signature": "AAAA"}'


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "run"
    experiment.run(load_recipe("quickstart", [*tiny_overrides(tiny_folder), "evaluation.examples=4"]), folder)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "certs"
    make_certificates(folder, 2, [])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def verify(*arguments: Path | str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_server_and_sites_sign_and_the_auditor_asks_for_all_of_them(run: Path, keys: Path) -> None:
    signers = keys / "signers"
    code, output = verify(run, "--signed-by", signers)
    assert code == 1
    assert "server's key has not signed this ledger." in output
    for key in (keys / "signing.key", keys / "node0" / "signing.key"):
        assert verify(run, "--sign", key)[0] == 0
    code, output = verify(run, "--signed-by", signers)
    assert code == 1
    assert "node1's key has not signed" in output
    assert "node0's key" not in output
    assert reaccount(run, *signers.glob("*.pub")) == 1
    assert verify(run, "--sign", keys / "node1" / "signing.key")[0] == 0
    code, output = verify(run, "--signed-by", signers)
    assert code == 0
    assert output.count("Signed: SHA256:") == 3
    assert "(node1)" in output
    assert reaccount(run, *signers.glob("*.pub")) == 0


def test_who_signs_twice_has_one_line_and_lines_of_copies_may_be_joined(run: Path, keys: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for _ in range(2):
        assert verify(run, "--sign", keys / "signing.key")[0] == 0
    assert len((run / "signatures.jsonl").read_text().splitlines()) == 1
    assert verify(copy, "--sign", keys / "node0" / "signing.key")[0] == 0
    with (run / "signatures.jsonl").open("a") as file:
        file.write((copy / "signatures.jsonl").read_text())
    demanded = read_signers(keys / "signers" / "server.pub") | read_signers(keys / "signers" / "node0.pub")
    report = verify_run(run, demanded)
    assert report.troubles == ()
    assert set(report.signers) == set(demanded)


def test_whoever_changes_the_run_and_mends_every_hash_cannot_mend_the_signature(
    run: Path, keys: Path, tmp_path: Path
) -> None:
    assert verify(run, "--sign", keys / "signing.key")[0] == 0
    forged = Forgery(run, tmp_path / "forged")
    for record in forged.records:
        if record["kind"] == "header":
            record["drencoder"] = "0.0.0"
    forged.mend()
    report = verify_run(forged.path)
    assert report.troubles == (
        "line 1 of signatures.jsonl is no signature of this ledger's last line: remove it, or sign again.",
    )
    assert reaccount(forged.path) == 1
    (forged.path / "signatures.jsonl").unlink()
    assert verify_run(forged.path).troubles == ()
    assert verify(forged.path, "--signed-by", keys / "signers" / "server.pub")[0] == 1


@pytest.mark.parametrize(
    "line",
    ["", "{", "null", "[" * 900, '{"key": 3, "signature": ""}', FIRST, '{"signature": "AAAA"}', "x" * 5000, "\xff"],
    ids=range(9),
)
def test_a_line_that_is_no_signature_is_a_sentence(run: Path, line: str) -> None:
    (run / "signatures.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    assert verify_run(run).troubles[0].startswith("line 1 of signatures.jsonl is no signature")
    assert reaccount(run) == 1


def test_a_signature_of_another_run_or_another_key_is_none(run: Path, keys: Path) -> None:
    assert verify(run, "--sign", keys / "signing.key")[0] == 0
    record = json.loads((run / "signatures.jsonl").read_text())
    other = (keys / "signers" / "node0.pub").read_text().strip()
    (run / "signatures.jsonl").write_text(json.dumps({"key": other, "signature": record["signature"]}) + "\n")
    assert verify_run(run).signers == ()
    stranger = ed25519.Ed25519PrivateKey.generate()
    line = stranger.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    signature = base64.b64encode(stranger.sign(b"drencoder ledger 1\nanother run\n0 00\n")).decode()
    (run / "signatures.jsonl").write_text(json.dumps({"key": line.decode(), "signature": signature}) + "\n")
    assert verify_run(run).signers == ()


def test_a_run_that_does_not_hold_is_not_signed_and_a_new_report_needs_a_new_signature(run: Path, keys: Path) -> None:
    report = run / "report.html"
    whole = report.read_bytes()
    assert verify(run, "--sign", keys / "signing.key")[0] == 0
    report.write_bytes(whole + b" ")
    code, _ = verify(run, "--sign", keys / "node0" / "signing.key")
    assert code == 1
    assert len((run / "signatures.jsonl").read_text().splitlines()) == 1
    report.write_bytes(whole)
    with Ledger.open(RunFolder(run).ledger) as ledger:  # as a report does that is drawn otherwise
        ledger.record_closed(ledger.records[-1]["rounds"], ledger.records[-1]["files"])
    assert "is no signature of this ledger's last line" in verify_run(run).trouble
    (run / "signatures.jsonl").unlink()
    assert verify(run, "--sign", keys / "signing.key")[0] == 0


def test_a_key_that_is_none_is_one_sentence(run: Path, keys: Path, tmp_path: Path) -> None:
    wrong = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (tmp_path / "ec").write_bytes(wrong)
    (tmp_path / "long").write_bytes(b"x" * 100_000)
    (tmp_path / "noise").write_bytes(b"\x00\xff")
    (tmp_path / "none").mkdir()
    for key, words in (
        ("ec", "not an Ed25519 one"),
        ("long", "has more than 4096 bytes"),
        ("noise", "is not an OpenSSH private key"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(ArtifactError, match=words):
            sign_run(RunFolder.open(run), tmp_path / key)
        assert not (run / "signatures.jsonl").exists()
    for place, words in (
        (tmp_path / "none", "holds no .pub file"),
        (tmp_path / "noise", "is not an OpenSSH public key"),
        (keys / "nodes" / "node0.pub", "not an Ed25519 one"),
    ):
        with pytest.raises(ArtifactError, match=words):
            read_signers(place)
