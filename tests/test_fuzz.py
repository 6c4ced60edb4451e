"""Every reader of what comes from outside, with seeded damage: a sentence or a sound result, never another exception.

`DRENCODER_MUTATIONS=5000 pytest tests/test_fuzz.py` tries thousands on each reader. The readers have bounds on what they parse, so
no document of this size can keep one busy. Names of private people stand in the documents' texts, and no message may have one.
"""

import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from conftest import tiny_overrides
from drencoder.data.benchmarks.files import read_questions
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.places import read_records
from drencoder.encoders.planning import load_checked_recipe
from drencoder.errors import DrencoderError
from drencoder.federated.query import moment_query, update_query
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction, encoder_bytes, encoder_of, fingerprint
from drencoder.federated.remote.membership import Membership
from drencoder.federated.remote.roster import Roster, node_key
from drencoder.federated.remote.rounds import parse_answer
from drencoder.federated.remote.site import Site
from drencoder.flower.deploy import SiteEndpoint
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.models.place import ModelPlace
from drencoder.models.planned_layers import adapted_matrices
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.assess import assess
from drencoder.runs.build import Components, build_site
from drencoder.runs.checkpoint import load_checkpoint
from drencoder.runs.report import write_report
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.signatures import check_signatures, read_signers, sign_run
from drencoder.runs.tensor_files import adapter_digest, read_tensors
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings
from drencoder.secure_aggregation.server import SecAggServer
from drencoder.study.cells import CellStore, loss_of
from drencoder.study.settings import load_comparison
from mutations import as_json, mutations_of, number_of_mutations, restructured
from tampering import Forgery, reaccount, verdict

CANARY = "Mustermann"
PERSON = f"Erika {CANARY} has a rare disease"
Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """A reader, the document that it is tried with, and the place where the document lies. `share`: of the mutations."""

    seed: bytes
    read: Callable[[Path], object]
    path: Path
    mutate: Mutate = mutations_of
    share: float = 1.0


class ZeroTrainer:
    """Trains nobody: what a reader lets through need not cost a training."""

    batch_clients = 8

    def __init__(self, size: int) -> None:
        self._size = size

    def train_clients(self, adapter_D: torch.Tensor, clients: Any, slot: int, epochs: int) -> torch.Tensor:
        return torch.zeros(len(clients), epochs * self._size)


@dataclass(frozen=True)
class World:
    """A finished run, what it is made of, and keys; `folder` is a test's own copy of the run."""

    run: Path
    components: Components
    certificates: Path
    folder: Path = Path()

    def site(self, said: list[str]) -> Site:
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        clients = ClientSet.parse("0-29", self.components.recipe.federation.population)
        ledger = SiteLedger.open(
            self.folder / "state" / "site.jsonl", agreement(self.components.recipe).hex(), self.components.plan
        )
        return Site(self.components, clients, ledger, say=said.append)

    def query(self) -> Any:
        """The question of the first round."""
        folder = RunFolder(self.run)
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            lora = self.components.lora
            progress = load_checkpoint(folder, ledger, lora.initial_D, lora.layout.segments)
        encoder = self.components.encoder(progress.prior, dict(progress.encoder_state or {}))
        return update_query(encoder, self.components.recipe, 1, None, progress.prior)


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


# --- documents -----------------------------------------------------------------------------------------


def recipe_file(world: World) -> Reader:
    text = load_recipe().to_toml() + '\n[compare]\nmethods = ["lora"]\nepsilons = [2.0]\n'
    return Reader(
        text.encode(), lambda path: (load_checked_recipe(path), load_comparison(path)), world.folder / "r.toml"
    )


def override(world: World) -> Reader:
    sets = [
        "privacy.epsilon=2",
        "name=run-1",
        "adapter.targets=['q_proj']",
        "evaluation.benchmarks=[]",
        "data.source=a.jsonl",
    ]

    def mutate(data: bytes, chance: random.Random) -> bytes:
        return mutations_of(chance.choice(sets).encode(), chance)

    def read(path: Path) -> object:
        return load_checked_recipe("quickstart", [path.read_bytes().decode("utf-8", "surrogateescape")])

    return Reader(sets[0].encode(), read, world.folder / "set", mutate, share=0.5)


RECORDS = [
    {"instruction": f"What has {PERSON}?", "context": "", "response": f"{PERSON} {i}", "category": "qa", "who": f"p{i}", "age": i}
    for i in range(4)
]  # fmt: skip


def records(name: str, data: bytes) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        return Reader(data, lambda path: read_records(str(path), knob="data.source"), world.folder / name)

    return made


def benchmark(name: str, split: str, subject: str, header: str) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        rows = "".join(
            f'{i if header else ""}{"," if header else ""}"{PERSON}, {i}?",yes,no,"per{chr(10)}haps",{CANARY},B\n'
            for i in range(4)
        )
        path = world.folder / name / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True)
        taxonomy = TAXONOMIES[name]
        return Reader(
            (header + rows).encode(), lambda _: read_questions(taxonomy, str(world.folder / name), split, ()), path
        )

    return made


def study(name: str) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        folder = world.folder / "study"
        with CellStore(folder, {"recipe": {"name": "x"}}) as store:
            for i in range(3):
                store.add(
                    {
                        "key": f"lora/seed{i}",
                        "seed": i,
                        "loss": {"value": 1.5, "low": 1.0, "high": 2.0},
                        "accuracy": {"mmlu": 0.5},
                    }
                )

        def read(_: Path) -> object:
            with CellStore(folder, {"recipe": {"name": "x"}}) as store:
                return [loss_of(row) for row in store.rows.values()]

        return Reader((folder / name).read_bytes(), read, folder / name)

    return made


def model_weights(world: World) -> Reader:
    source = Path(world.components.recipe.model.source) / "model.safetensors"
    folder = world.folder / "model"
    folder.mkdir()
    return Reader(
        source.read_bytes(),
        lambda _: adapted_matrices(ModelPlace(folder), ["q_proj"]),
        folder / "model.safetensors",
        in_header,
    )


# --- a run's folder --------------------------------------------------------------------------------------


def in_header(data: bytes, chance: random.Random) -> bytes:
    """Damage to a safetensors file: to the JSON of its header and what drencoder keeps in it, as often as to its bytes."""
    import json

    if chance.random() < 0.4:
        return mutations_of(data, chance)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = header.get("__metadata__", {})
    name = next(iter(facts), None)
    if name in ("drencoder", "prior") and chance.random() < 0.7:
        facts[name] = mutations_of(facts[name].encode(), chance).decode("utf-8", "replace")
        changed = json.dumps(header).encode()
    else:
        changed = mutations_of(data[8 : 8 + length], chance)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def run_file(
    name: str, read: Callable[[World, Path], object], mutate: Mutate = mutations_of, share: float = 1.0
) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        run = world.folder / "run"
        return Reader((run / name).read_bytes(), lambda _: read(world, run), run / name, mutate, share)

    return made


def read_checkpoint(world: World, run: Path) -> object:
    folder, lora = RunFolder(run), world.components.lora
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        progress = load_checkpoint(folder, ledger, lora.initial_D, lora.layout.segments)
    read_tensors(folder.checkpoints / "latest.safetensors")
    return world.components.encoder(progress.prior, dict(progress.encoder_state or {}))


def read_ledger(world: World, run: Path) -> object:
    with Ledger.open(run / "ledger.jsonl", read_only=True) as ledger:
        return ledger.charges()


def read_adapter(world: World, run: Path) -> object:
    return adapter_digest(run / "adapter" / "adapter_model.safetensors"), experiment.RunFolder(run)


def read_scores(world: World, run: Path) -> object:
    return assess(run)


# --- sites and keys ----------------------------------------------------------------------------------------


def site_ledger(world: World) -> Reader:
    path = world.folder / "state" / "site.jsonl"
    plan, digest = world.components.plan, agreement(world.components.recipe).hex()
    world.site([])
    ledger = SiteLedger.open(path, digest, plan)
    ledger.charge("run-1", 0, 0, [1, 2])
    ledger.charge("run-1", 1, 0, [3])
    ledger.close()

    def read(path: Path) -> object:
        ledger = SiteLedger.open(path, digest, plan)
        try:
            return ledger.charge("run-1", 1, 0, [4])
        finally:
            ledger.close()

    return Reader(path.read_bytes(), read, path)


def signatures(world: World) -> Reader:
    folder = RunFolder(world.folder / "run")
    sign_run(folder, world.certificates / "signing.key")

    def read(_: Path) -> object:
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            good, troubles = check_signatures(folder, ledger, {})
        assert all(line.isprintable() and len(line) < 1000 for line in troubles)
        return good

    return Reader(folder.signatures.read_bytes(), read, folder.signatures)


def key_file(name: str, read: Callable[[Path], object]) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        return Reader((world.certificates / name).read_bytes(), read, world.folder / Path(name).name)

    return made


def read_authority(path: Path) -> object:
    key = path.with_name("key")
    key.touch()
    return SiteEndpoint("localhost:9", path, key, path.parent).check()


def read_clients(path: Path) -> object:
    return ClientSet.parse(path.read_bytes().decode("utf-8", "surrogateescape"), 10_000)


# --- messages ------------------------------------------------------------------------------------------------


def in_head(data: bytes, chance: random.Random) -> bytes:
    """Damage to a frame: to a fact of its head with all sizes put right, as often as to its bytes."""
    import json

    if chance.random() < 0.3:
        return mutations_of(data, chance)
    frame = unpack_frame(data, data[5], first=1 << 30, second=1 << 30)
    head = restructured(dict(frame.head), chance)
    body = as_json(head)
    sound = bytearray(pack_frame(replace(frame, head={})))
    sound[40:44] = len(body).to_bytes(4, "little")
    assert json.loads(bytes(sound[-2:])) == {}
    return bytes(sound[:-2]) + body


def question(world: World, slot: int) -> bytes:
    live, plan = world.components, world.components.plan
    query = world.query() if slot else moment_query(live.lora.layout.segments, live.recipe)
    encoder = encoder_bytes(query) if slot else b""
    asked = Instruction(
        "n", "run-1", 0, plan.trust, plan.noise, plan.noise_multiplier, query.spec, (0, 3), fingerprint(encoder),
        **live.base_digests.to_dict(),
    )  # fmt: skip
    adapter = live.lora.initial_D.float().numpy().tobytes()
    return pack_frame(Frame(Kind.QUERY, agreement(live.recipe), asked.head(), adapter, encoder))


def to_site(make: Callable[[World], bytes]) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        said: list[str] = []
        site = world.site(said)

        def read(path: Path) -> object:
            answer = site.answer(path.read_bytes())
            assert not any(line.startswith("failed") for line in said), said  # by an exception that nobody foresaw
            said.clear()
            return unpack_frame(answer, answer[5], first=1 << 30, second=0)

        return Reader(make(world), read, world.folder / "frame", in_head)

    return made


def hello(world: World) -> bytes:
    return pack_frame(
        Frame(Kind.HELLO, agreement(world.components.recipe), {"nonce": "n", **world.components.base_digests.to_dict()})
    )


def to_server(world: World) -> Reader:
    """The answers of a site: to hello and to a question."""
    recipe = agreement(world.components.recipe)
    said: list[str] = []
    base, population = world.components.base_digests, world.components.recipe.federation.population
    query = world.query()
    message = query.spec.wire.header(1) + bytes(query.spec.wire.message_size - 20)

    def read(path: Path) -> object:
        data = path.read_bytes()
        members = Membership(None, recipe, base, population, {}, said.append)  # type: ignore[arg-type]
        members._enter("node0", data, "n")
        members.sites()
        assert all(map(str.isprintable, said)), said
        assert all(len(line) < 1000 for line in said)
        said.clear()
        return parse_answer(data, recipe, "n", (0, 3), 1 << 20)

    def mutate(data: bytes, chance: random.Random) -> bytes:
        answer = Frame(Kind.QUERY_ANSWER, recipe, Answer("n", 0, (0, 3)).head(), first=message * 2)
        hosts = Frame(
            Kind.HELLO_ANSWER, recipe, {"nonce": "n", "clients": "0-9,12", "data": "a.jsonl", "owners": "named"}
        )
        return in_head(pack_frame(chance.choice([answer, hosts])), chance)

    return Reader(b"", read, world.folder / "frame", mutate)


def encoder_part(world: World) -> Reader:
    segments = world.components.lora.layout.segments

    def read(path: Path) -> object:
        prior, state = encoder_of(path.read_bytes(), segments)
        return world.components.encoder(prior, state)

    return Reader(encoder_bytes(world.query()), read, world.folder / "encoder", in_header)


def secure_messages(world: World) -> Reader:
    """Every request of a round to a node, and every answer to the server."""
    keys = [NodeKey.generate() for _ in range(3)]
    settings = RoundSettings("run", 1, 0, 9, 16, 2, 1, (2, 2, 2), tuple(key.public for key in keys))

    def read(path: Path) -> object:
        chance = random.Random(zlib.crc32(path.read_bytes()))
        spoiled, server = chance.choice(list(ProtocolStep)), SecAggServer(settings)
        nodes = [SecAggClient(settings, i, key, lambda: np.zeros(9, dtype=np.uint32)) for i, key in enumerate(keys)]
        for step in ProtocolStep:
            answers = {}
            for node, request in server.make_requests(step).items():
                ask = step == spoiled and chance.random() < 0.5
                answers[node] = nodes[node].answer(step, mutations_of(request, chance) if ask else request)
                if step == spoiled and not ask:
                    answers[node] = mutations_of(answers[node], chance)
            server.accept(step, answers)
        return server.unmask_sum()

    return Reader(b"", read, world.folder / "seed", lambda _, chance: chance.randbytes(8), share=0.5)


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
