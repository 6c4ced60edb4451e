"""Every reader of what comes from outside, with seeded damage: a sentence or a sound result, never another exception.

`DRENCODER_MUTATIONS=5000 pytest tests/test_fuzz.py` tries thousands on each reader. The readers have bounds on what they parse, so
no document of this size can keep one busy. Names of private people stand in the documents' texts, and no message may have one.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import tiny_overrides
from drencoder.errors import DrencoderError
from drencoder.federated.remote.roster import Roster, node_key
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.build import build_site
from drencoder.runs.report import write_report
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.signatures import read_signers
from fuzz_documents import (
    RECORDS,
    benchmark,
    in_header,
    key_file,
    model_weights,
    override,
    read_adapter,
    read_authority,
    read_checkpoint,
    read_clients,
    read_ledger,
    read_scores,
    recipe_file,
    records,
    run_file,
    signatures,
    site_ledger,
    study,
)
from fuzz_messages import encoder_part, hello, question, secure_messages, to_server, to_site
from fuzz_world import CANARY, Reader, World, ZeroTrainer
from mutations import as_json, mutations_of, number_of_mutations, restructured
from tampering import Forgery, reaccount, verdict


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    own = ["federation.rounds=1", "evaluation.examples=4", "privacy.noise=replay"]
    recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), *own])
    place = tmp_path_factory.mktemp("fuzz")
    run = experiment.run(recipe, place / "run").folder
    components = build_site(recipe, None)
    trainer = ZeroTrainer(components.lora.layout.size)
    make_certificates(place / "certs", 3, [])
    return World(run, replace(components, trainer=trainer), place / "certs")


@pytest.fixture
def world(finished: World, tmp_path: Path) -> World:
    shutil.copytree(finished.run, tmp_path / "run")
    return replace(finished, folder=tmp_path)


READERS: dict[str, Callable[[World], Reader]] = {
    "recipe": recipe_file,
    "override": override,
    "records, a line each": records("r.jsonl", b"".join(as_json(record) + b"\n" for record in RECORDS)),
    "records, a list": records("r.json", as_json(RECORDS)),
    "mmlu": benchmark("mmlu", "test", "anatomy", ""),
    "ceval": benchmark("ceval", "val", "law", "id,question,A,B,C,D,answer\n"),
    "cells of a study": study("cells.jsonl"),
    "study": study("study.json"),
    "weights' header": model_weights,
    "checkpoint": run_file("checkpoints/latest.safetensors", read_checkpoint, in_header),
    "adapter": run_file("adapter/adapter_model.safetensors", read_adapter, in_header),
    "ledger": run_file("ledger.jsonl", read_ledger),
    "metrics": run_file("metrics.jsonl", lambda _, run: RunFolder(run).read_metrics()),
    "metrics in a report": run_file("metrics.jsonl", lambda _, run: write_report(run), share=0.1),
    "certificate": run_file("certificate.json", lambda _, run: write_report(run), share=0.2),
    "outcomes": run_file("outcomes.json", read_scores),
    "a run's recipe": run_file("recipe.resolved.toml", lambda _, run: load_recipe(RunFolder.open(run).recipe)),
    "site's ledger": site_ledger,
    "signatures": signatures,
    "signer": key_file("signers/node0.pub", read_signers),
    "public key": key_file("nodes/node0.pub", read_public_keys),
    "roster": key_file("node0/roster", Roster.read),
    "private key": key_file("node0/key", node_key),
    "authority": key_file("ca.crt", read_authority),
    "clients of a site": key_file("node0/clients", read_clients),
    "hello": to_site(hello),
    "question of stage 1": to_site(lambda world: question(world, 0)),
    "question of a round": to_site(lambda world: question(world, 1)),
    "answers": to_server,
    "encoder": encoder_part,
    "secure aggregation": secure_messages,
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise httpx.ConnectError("nobody is there")

    monkeypatch.setattr(httpx, "get", nobody)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_document_ends_in_a_sentence_or_a_result(
    name: str, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = READERS[name](world)
    if reader.seed:
        reader.path.write_bytes(reader.seed)
        reader.read(reader.path)  # the whole document is sound
    for number in range(int(number_of_mutations(200) * reader.share)):
        data = reader.mutate(reader.seed, random.Random(f"{name} {number}"))
        reader.path.write_bytes(data)
        try:
            reader.read(reader.path)
        except DrencoderError as error:
            said = str(error)
            assert said.isprintable(), (number, said)
            assert len(said) < 1000, (number, said)
            assert CANARY not in said, (number, said)
        except Exception as error:
            raise AssertionError(f"mutation {number}: {data[:300]!r}") from error
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize("kind", ["ledger", "certificate", "metrics", "checkpoint"])
def test_damage_under_hashes_that_fit_is_a_sentence(kind: str, world: World, tmp_path: Path) -> None:
    """Whoever edits a value can mend all digests: then verify and the independent script see the value itself."""
    for number in range(number_of_mutations(200) // 20):
        chance, path = random.Random(f"{kind} {number}"), tmp_path / "forged"
        shutil.rmtree(path, ignore_errors=True)
        forged = Forgery(world.run, path)
        if kind == "ledger":
            place = chance.randrange(len(forged.records))
            forged.records[place] = {**forged.records[place], **as_table(restructured(forged.records[place], chance))}
        elif kind == "certificate":
            forged.certificate = as_table(restructured(forged.certificate, chance))
        elif kind == "metrics":
            forged.folder.metrics.write_bytes(mutations_of(forged.folder.metrics.read_bytes(), chance))
        else:
            tensors, facts = forged.checkpoint()
            forged.write_checkpoint(tensors, as_table(restructured(facts, chance)))
        try:
            forged.mend()
        except ValueError:  # not a number that a ledger or certificate can hold
            continue
        found = verdict(path)
        assert found.isprintable(), (number, found)
        assert reaccount(path) in (0, 1)


def as_table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
