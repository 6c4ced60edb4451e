"""Nodes that die, hang, lie, repeat themselves or refuse: what the server makes of it, and what a site never says."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deployment import small_recipe
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.errors import ArtifactError, DataError, EngineError, PrivacyError
from drencoder.federated.query import QuerySpec, moment_query
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.site import Site
from drencoder.federated.round import message_wire
from drencoder.flower.client_app import open_site
from drencoder.models.client_training import CohortTrainer
from drencoder.privacy.ledger import _permit
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run
from federation import Federation

BIG = 1 << 24


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    return lambda *overrides: Federation(tmp_path, small_recipe("evaluation.every=0", *overrides))


def kinds(run: experiment.RunResult) -> list[tuple[str, Any]]:
    return [(row["kind"], row.get("slot")) for row in map(json.loads, run.ledger.read_text().splitlines())]


def adapter(run: experiment.RunResult) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(run.adapter / "adapter_model.safetensors").values()])


def changed(**head: Any) -> Callable[[bytes], bytes]:
    """An answer with other facts in its head."""

    def tamper(data: bytes) -> bytes:
        frame = unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0)
        return pack_frame(Frame(frame.kind, frame.recipe, {**frame.head, **head}, frame.first))

    return tamper


def integer_wire(message: bytes) -> WireFormat | None:
    """The format of a message of whole steps, from its header; None for floats."""
    bits = {9: 16, 10: 24, 11: 32}.get(message[5])
    tag, size = (int.from_bytes(message[start : start + 4], "little") for start in (8, 16))
    return WireFormat(size, tag, f"integer{bits}") if bits else None  # type: ignore[arg-type]


def values(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    """An answer whose messages hold other numbers: floats, or whole steps up to the largest that the wire has."""

    def tamper(data: bytes) -> bytes:
        frame = unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0)
        clients = frame.head["clients"]
        if not clients:
            return data
        size, messages = len(frame.first) // len(clients), b""
        for start in range(0, len(frame.first), size):
            message = frame.first[start : start + size]
            if wire := integer_wire(message):
                half, slot = 1 << (wire.bits - 1), int.from_bytes(message[12:16], "little")
                code_NK = change(unpack_rows([message], wire, slot).code_NK).clamp(-half, half - 1)
                messages += pack_rows(code_NK, wire, slot)[0]
            else:
                code = torch.frombuffer(bytearray(message[20:]), dtype=torch.float32)
                messages += message[:20] + change(code.clone()).numpy().tobytes()
        return pack_frame(Frame(frame.kind, frame.recipe, frame.head, messages))

    return tamper


def shortened(data: bytes) -> bytes:
    frame = unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0)
    return pack_frame(Frame(frame.kind, frame.recipe, frame.head, frame.first[:-4]))


LIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "noise": lambda data: os.urandom(len(data)),
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "version": lambda data: data[:4] + b"\x09" + data[5:],
    "late, of another question": changed(nonce="0" * 32),
    "unknown refusal": changed(refusal=99),
    "text for a number": changed(nonfinite="many"),
    "foreign clients": changed(clients=[0, 1, 2, 3, 4]),
    "wrong shape": shortened,
    "largest steps": values(lambda code: code.fill_(1 << 40)),
    "smallest steps": values(lambda code: code.fill_(-(1 << 40))),
    "too long": values(lambda code: code.mul_(1000)),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """The same run with all three nodes, and without the second."""
    made = Federation(tmp_path_factory.mktemp("federation"), small_recipe("evaluation.every=0", "privacy.noise=replay"))
    honest = made.run(quorum=1.0, name="honest")
    made.grid.mute.add(1)
    return adapter(honest), adapter(made.run(quorum=0.0, name="without"))


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_node_is_left_out_and_the_run_goes_on(
    lie: str, federation: Callable[..., Federation], adapters: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Local trust: whatever a node sends, it cannot stop the run, break the ledger or move the sum."""
    honest, without = adapters
    made = federation("privacy.noise=replay")
    made.grid.tamper[1] = LIES[lie]
    run = made.run(quorum=0.0)
    assert run.certificate["rounds"] == 2
    assert "node 2: answer thrown away" in made.lines.text
    assert verify_run(run.folder).trouble == ""
    assert torch.allclose(adapter(run), without, atol=1e-6)  # as if the node had not answered at all
    assert not torch.allclose(adapter(run), honest, atol=1e-4)


def test_an_answer_that_comes_twice_counts_once(
    federation: Callable[..., Federation], adapters: tuple[torch.Tensor, torch.Tensor]
) -> None:
    made = federation("privacy.noise=replay")
    made.grid.twice = True
    run = made.run(quorum=1.0)
    assert torch.allclose(adapter(run), adapters[0], atol=1e-6)
    counted = [
        row["contributors"] for row in map(json.loads, run.ledger.read_text().splitlines()) if "contributors" in row
    ]
    assert sum(counted) <= 30 * 3


def test_central_trust_clips_again(federation: Callable[..., Federation]) -> None:
    """A norm above the bound is no reason to throw a message away there: the server clips it before it sums."""
    # Gentle steps: along long ones the tiny model turns rounding into differences of its own.
    loud = ["privacy.clip_l2=1e3", "server.learning_rate=0.01"]
    made = federation("privacy.trust=central", "privacy.noise=replay", *loud)
    found = []
    for name, factor in (("honest", 1.0), ("long", 1e8), ("longer", 1e12)):
        made.grid.tamper[1] = values(lambda code, factor=factor: code.mul_(factor))
        found.append(adapter(made.run(quorum=0.0, name=name)))
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert torch.allclose(found[1], found[2], atol=1e-5)  # both have the bound's length


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_value_that_is_not_finite_spoils_its_nodes_answer(value: str, federation: Callable[..., Federation]) -> None:
    """Under central trust messages are floats."""
    made = federation("privacy.trust=central", "privacy.noise=replay")
    made.grid.tamper[1] = values(lambda code: code.fill_(float(value)))
    found = adapter(made.run(quorum=0.0, name="broken"))
    assert "node 2: answer thrown away" in made.lines.text
    made.grid.mute.add(1)
    assert torch.allclose(found, adapter(made.run(quorum=0.0, name="without")), atol=1e-6)


@pytest.mark.parametrize("trust", ["local", "central"])
def test_below_the_quorum_the_charge_stays_and_nothing_is_released(
    trust: str, federation: Callable[..., Federation]
) -> None:
    made = federation(f"privacy.trust={trust}")
    made.grid.tamper = {number: LIES["cut"] for number in range(3)}
    run = made.run(quorum=0.5)
    charged = [entry for entry in kinds(run) if entry[0] == "charge"]
    noted = [entry for entry in kinds(run) if entry[0] == "abandoned"]
    assert charged == [("charge", 0), ("charge", 1), ("charge", 2)]
    assert [slot for _, slot in noted] == [0, 1, 2]
    assert "abandoned" in made.lines.text
    assert run.certificate["results"]["this run"] == run.certificate["results"]["zero update"]
    assert verify_run(run.folder).trouble == ""


def test_above_the_quorum_a_dead_and_a_silent_node_are_done_without(federation: Callable[..., Federation]) -> None:
    made = federation()
    made.grid.dead, made.grid.mute = {0}, set()
    run = made.run(quorum=0.2)
    assert run.certificate["rounds"] == 2
    asked = {node for node, _ in made.grid.seen}
    assert asked == {1, 2}
    counted = [
        row["contributors"] for row in map(json.loads, run.ledger.read_text().splitlines()) if "contributors" in row
    ]
    assert len(counted) == 3


def test_too_few_nodes_stop_the_run_before_anything_is_charged(federation: Callable[..., Federation]) -> None:
    made = federation()
    made.grid.dead = {0, 1}
    with pytest.raises(EngineError, match="10 of 30 clients"):
        made.run(quorum=0.5)
    rows = [json.loads(line) for line in (made.folder / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["header"]


def test_the_quorum_of_a_secret_cohort_counts_the_population(federation: Callable[..., Federation]) -> None:
    """Central trust: every node is asked whether it is there, and who is in the cohort decides nothing."""
    made = federation("privacy.trust=central", "federation.sampling_rate=0.02", "privacy.noise=replay")
    run = made.run(quorum=1.0)
    queries = [data for _, data in made.grid.seen if data[5] == Kind.QUERY]
    heads = [unpack_frame(data, Kind.QUERY, first=BIG, second=BIG) for data in queries]
    assert len(heads) >= 9
    assert any(not frame.head["clients"] and not frame.first for frame in heads)
    assert [entry for entry in kinds(run) if entry[0] == "abandoned"] == []


def test_a_node_that_comes_back_without_the_encoder_is_sent_it_again(federation: Callable[..., Federation]) -> None:
    made = federation("privacy.noise=replay", "encoder.name=autoencoder", "privacy.noise_in=update",
                      "encoder.gate=warn", "federation.rounds=4", "privacy.participation_cap=5")  # fmt: skip
    original, fresh = made.sites[1].answer, made.site(1)
    calls = []

    class Restarting:
        def answer(self, data: bytes) -> bytes:
            second = len(unpack_frame(data, data[5], first=BIG, second=BIG).second)
            answer = fresh.answer(data) if any(calls) else original(data)
            calls.append(second)
            return answer

    made.sites[1] = Restarting()  # type: ignore[call-overload]
    run = made.run(quorum=1.0)
    assert sum(map(bool, calls)) == 2  # once at first, once for the fresh start
    assert run.certificate["rounds"] == 4


# --- what a site refuses ---------------------------------------------------------------------------


def question(site: Site, made: Federation, **head: Any) -> bytes:
    """A sound stage-1 question to the site of node 0, with some facts of its head changed."""
    live, plan = site._components, site._components.plan
    sound = Instruction(
        nonce="n", run="run-1", attempt=0, trust=plan.trust, noise=plan.noise, noise_multiplier=plan.stage1_noise_multiplier,
        spec=moment_query(live.lora.layout.segments, live.recipe).spec, clients=(0, 3), encoder="",
        **live.base_digests.to_dict(),
    )  # fmt: skip
    facts = sound.head()
    facts["spec"] |= {key: head.pop(key) for key in list(head) if key in QuerySpec.__dataclass_fields__}
    values_D = head.pop("adapter", live.lora.initial_D.float())
    recipe = head.pop("recipe", site._recipe)
    return pack_frame(Frame(Kind.QUERY, recipe, {**facts, **head}, first=values_D.numpy().tobytes()))


def refusal(data: bytes) -> Refusal:
    return Refusal(Answer.of(unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).head).refusal)


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ({}, Refusal.NONE),
        ({"recipe": bytes(32)}, Refusal.RECIPE),
        ({"noise_multiplier": 0.5}, Refusal.PLAN),
        ({"noise_multiplier": 1e9}, Refusal.PLAN),
        ({"trust": "central"}, Refusal.PLAN),
        ({"noise": "replay"}, Refusal.PLAN),
        ({"slot": 99}, Refusal.PLAN),
        ({"slot": 1}, Refusal.PLAN),
        ({"kind": "gradients"}, Refusal.PLAN),
        ({"clients": [1]}, Refusal.CLIENTS),
        ({"model": "0" * 64}, Refusal.MODEL),
        ({"tokenizer": "0" * 64}, Refusal.TOKENIZER),
        ({"clients": [], "model": "0" * 64}, Refusal.MODEL),
        ({"clients": [], "noise_multiplier": 0.5}, Refusal.PLAN),  # who is not asked answers as who is
        ({"clients": [0, 0]}, Refusal.FOREIGN),
        ({"clip_l2": 1e9}, Refusal.CLIP),
        ({"clip_l2": -1.0}, Refusal.CLIP),
        ({"wire": {"dtype": "float32", "code_size": 7, "encoder_tag": 7}}, Refusal.ENCODER),
        ({"wire": {"dtype": "int3", "code_size": 7, "encoder_tag": 7}}, Refusal.FOREIGN),
        ({"epochs": 2}, Refusal.ENCODER),
        ({"seed": 5}, Refusal.ENCODER),
        ({"adapter": torch.full((4,), 0.0)}, Refusal.ADAPTER),
        ({"adapter": None}, Refusal.ADAPTER),
        ({"more": 1}, Refusal.FOREIGN),
        ({"slot": True}, Refusal.FOREIGN),
    ],
)
def test_site_refuses(head: dict[str, Any], code: Refusal, federation: Callable[..., Federation]) -> None:
    made = federation()
    site = made.sites[0]
    if "adapter" in head and head["adapter"] is None:
        head = {"adapter": torch.full((site._components.lora.layout.size,), float("nan"))}
    assert refusal(site.answer(question(site, made, **head))) == code
    answered = [row for row in ledger_of(made, 0) if row["kind"] == "answer"]
    assert len(answered) == (code == Refusal.NONE)  # on disk exactly if something left


def ledger_of(made: Federation, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.folder / f"site{number}" / "site.jsonl").read_text().splitlines()]


def test_site_answers_once_whatever_the_server_says_also_after_a_restart(
    federation: Callable[..., Federation],
) -> None:
    made = federation("privacy.participation_cap=1")
    site = made.sites[0]
    assert refusal(site.answer(question(site, made))) == Refusal.NONE
    for again in (site, made.site(0)):
        assert refusal(again.answer(question(site, made))) == Refusal.ANSWERED
        assert refusal(again.answer(question(site, made, attempt=1, nonce="m"))) == Refusal.ANSWERED
        assert refusal(again.answer(question(site, made, clients=[3, 6]))) == Refusal.ANSWERED  # 3 has
        assert refusal(again.answer(question(site, made, run="run-2"))) == Refusal.RUN
    assert refusal(site.answer(question(site, made, clients=[6]))) == Refusal.NONE


def test_participation_cap_is_kept_across_slots(tmp_path: Path) -> None:
    plan = open_plan(small_recipe("privacy.participation_cap=1"))
    ledger = SiteLedger.open(tmp_path / "site.jsonl", "r", plan)
    ledger.charge("run", 1, 0, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        ledger.charge("run", 2, 0, [4])
    ledger.charge("run", 2, 0, [5])
    with pytest.raises(ArtifactError, match="another recipe"):
        SiteLedger.open(tmp_path / "site.jsonl", "other", plan)


def test_central_trust_answers_a_new_attempt_and_no_old_one(tmp_path: Path) -> None:
    ledger = SiteLedger.open(tmp_path / "site.jsonl", "r", open_plan(small_recipe("privacy.trust=central")))
    ledger.charge("run", 1, 0, [4])
    ledger.charge("run", 1, 1, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        ledger.charge("run", 1, 0, [4])


def open_plan(recipe: Recipe) -> Any:
    from drencoder.runs.plan_overview import privacy_plan

    return privacy_plan(recipe)


def test_two_processes_of_a_site_share_its_ledger(tmp_path: Path) -> None:
    plan = open_plan(small_recipe())
    one, two = (SiteLedger.open(tmp_path / "site.jsonl", "r", plan) for _ in range(2))
    one.charge("run", 1, 0, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        two.charge("run", 1, 0, [4])


def test_a_torn_line_is_cut_off_and_a_damaged_one_refused(tmp_path: Path) -> None:
    plan, path = open_plan(small_recipe()), tmp_path / "site.jsonl"
    SiteLedger.open(path, "r", plan).charge("run", 1, 0, [4])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "ans')
    with pytest.raises(PrivacyError, match="once too often"):
        SiteLedger.open(path, "r", plan).charge("run", 1, 0, [4])
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"answer"', b'"answer'))
    with pytest.raises(ArtifactError, match="damaged"):
        SiteLedger.open(path, "r", plan)


def test_min_noise_is_the_sites_own(federation: Callable[..., Federation]) -> None:
    made = federation()
    sigma = made.sites[0]._components.plan.noise_multiplier
    made.site(0, min_noise=0.99 * sigma)
    with pytest.raises(PrivacyError, match="below --min-noise"):
        made.site(0, min_noise=1.01 * sigma)


def test_a_full_disk_at_a_site_stops_the_answer(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = federation()
    site = made.sites[0]

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    answer = site.answer(question(site, made))
    monkeypatch.undo()
    assert refusal(answer) == Refusal.STORAGE
    assert "free the disk" in capsys.readouterr().err
    assert refusal(site.answer(question(site, made))) == Refusal.STORAGE  # until it is started again
    assert refusal(made.site(0).answer(question(site, made))) == Refusal.NONE


SECRET = "the patient in room 12"


@pytest.mark.parametrize("where", ["training", "site"])
def test_no_text_of_an_exception_reaches_the_server_or_the_sites_log(
    where: str,
    federation: Callable[..., Federation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, said = federation(), list[str]()
    site = made.site(0, "heard", say=said.append)

    def failing(*_: Any) -> Any:
        raise ValueError(SECRET)

    if where == "training":
        monkeypatch.setattr(CohortTrainer, "_train", failing)
    else:
        monkeypatch.setattr(Site, "_uploads", failing)
    answer = site.answer(question(site, made))
    assert SECRET.encode() not in answer
    assert SECRET not in "".join([*capsys.readouterr(), *said])
    assert ("failed: ValueError" in said) == (where == "site")
    assert refusal(answer) == (Refusal.NONE if where == "training" else Refusal.FAILED)


def test_a_client_whose_training_raises_takes_nobody_with_it(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one client's text would decide about others' contributions: the sum would move by more than one clip."""
    made = federation("privacy.noise=replay")
    site = made.sites[0]
    sound = site.answer(question(site, made))
    original = CohortTrainer._train

    def sometimes(self: CohortTrainer, adapter_D: torch.Tensor, clients: Sequence[int], *rest: Any) -> torch.Tensor:
        if 3 in clients:
            raise RuntimeError("CUDA out of memory")
        return original(self, adapter_D, clients, *rest)

    monkeypatch.setattr(CohortTrainer, "_train", sometimes)
    broken = site.answer(question(site, made))
    first, second = (unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).first for data in (sound, broken))
    half = len(first) // 2
    assert first[:half] == second[:half]
    assert first[half:] != second[half:]
    live = site._components
    query = moment_query(live.lora.layout.segments, live.recipe)
    wire = message_wire(query, _permit(live.plan, 0, 0, (0, 3), "run-1"))
    read = unpack_rows([second[half:]], wire, 0)
    assert read.rejected == 0
    assert read.code_NK.double().norm() > 0  # still noised


def test_random_bytes_never_raise(federation: Callable[..., Federation]) -> None:
    made = federation()
    site, chance = made.sites[0], torch.Generator().manual_seed(0)
    sound = question(site, made)
    for size in range(1, 400, 7):
        noise = bytes(torch.randint(256, (size,), generator=chance).tolist())
        place = int(torch.randint(len(sound), (), generator=chance))
        for data in (noise, b"DRFL\x01\x03" + noise, sound[:place], sound[:place] + noise + sound[place:]):
            refusal(site.answer(data))
    assert [row["kind"] for row in ledger_of(made, 0)] == ["header"]


def test_a_sites_own_file_belongs_to_its_clients_alone(tmp_path: Path) -> None:
    """All records are used, each by one hosted client under its number in the population; nothing is set aside."""
    recipe, file = small_recipe("data.examples_per_client=12"), tmp_path / "ward.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{i}", "response": f"a{i}"}) + "\n" for i in range(12)))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    site = open_site(str(tmp_path / "recipe.toml"), "4,17", data=str(file), state=tmp_path / "state")
    source = site._components.texts.source
    held = [record["instruction"] for client in (4, 17) for record in source.client(client)]
    assert sorted(held) == sorted(f"q{i}" for i in range(12))
    assert site._components.held_out == []
    with pytest.raises(DataError, match="none of this site's"):
        source.client(5)
