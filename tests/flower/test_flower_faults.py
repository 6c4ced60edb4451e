"""Nodes that die, hang, lie or repeat themselves: what the server makes of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deployment import small_recipe
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.errors import EngineError
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
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
