"""Secure aggregation between sites behind Flower's messages: drop-outs, servers that die, lies, and what frames show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from secure_federation import BIG, EVERY_NODE, NODES, Federation, secure_recipe, site_rows, stage_of

from deployment import deployed, wait_for
from drencoder.federated import client_side
from drencoder.federated.query import Query
from drencoder.federated.remote.frames import Kind, unpack_frame
from drencoder.federated.round import modulus_bits
from drencoder.privacy.ledger import Ledger
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run
from drencoder.secure_aggregation import client as secagg_client
from drencoder.secure_aggregation.messages import ProtocolStep, pack_values


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    return lambda *overrides: Federation(tmp_path, secure_recipe(*overrides))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def adapter(run: experiment.RunResult) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(run.adapter / "adapter_model.safetensors").values()])


@pytest.mark.parametrize("stage", ProtocolStep)
def test_a_node_that_is_lost_at_any_stage_is_done_without(
    stage: ProtocolStep, federation: Callable[..., Federation]
) -> None:
    """In round 1; in round 2 it is back. The sum has its clients exactly if its masked vector had come."""
    made = federation(EVERY_NODE)
    slots: list[int] = []

    def lost(number: int, data: bytes) -> bool:
        if stage_of(data) == 1:
            slots.append(unpack_frame(data, Kind.QUERY, first=BIG, second=BIG).head["spec"]["slot"])
        return number == 1 and slots[-1:] == [1] and stage_of(data) >= stage

    made.lost = lost
    run = made.run()
    counts = {row["slot"]: row["contributors"] for row in rows_of(run.folder) if row["kind"] == "contributors"}
    with Ledger.open(run.ledger, read_only=True) as ledger:
        cohorts = {slot: ledger.sampler().cohort(slot) for slot in (0, 1, 2)}
    in_sum = [c for c in cohorts[1] if stage > ProtocolStep.MASK or c % NODES != 1]
    assert counts == {0: len(cohorts[0]), 1: len(in_sum), 2: len(cohorts[2])}
    assert any(client % NODES == 1 for client in cohorts[1])
    assert verify_run(run.folder).trouble == ""


def test_idle_nodes_take_part_in_the_sum(federation: Callable[..., Federation]) -> None:
    """Few clients, the same in every run of this test: some nodes have nobody in a cohort, and the masks cancel all the same."""
    run = federation("federation.sampling_rate=0.05", "privacy.noise=replay").run()
    counts = {row["slot"]: row["contributors"] for row in rows_of(run.folder) if row["kind"] == "contributors"}
    with Ledger.open(run.ledger, read_only=True) as ledger:
        cohorts = {slot: ledger.sampler().cohort(slot) for slot in (0, 1, 2)}
    assert counts == {slot: len(cohort) for slot, cohort in cohorts.items() if cohort}
    assert any(0 < len({client % NODES for client in cohort}) < NODES for cohort in cohorts.values())
    assert verify_run(run.folder).trouble == ""


@pytest.mark.parametrize("stage", ProtocolStep)
def test_two_lost_nodes_make_the_round_void_and_its_charge_stays(
    stage: ProtocolStep, federation: Callable[..., Federation]
) -> None:
    made = federation()
    made.lost = lambda number, data: number in (0, 3) and stage_of(data) >= stage
    run = made.run()
    rows = [(row["kind"], row["slot"]) for row in rows_of(run.folder) if "slot" in row and row["kind"] != "abandoned"]
    assert rows == [("charge", 0), ("charge", 1), ("charge", 2)]
    assert [row["slot"] for row in rows_of(run.folder) if row["kind"] == "abandoned"] == [0, 1, 2]
    assert "the round is void" in "\n".join(made.said)
    assert run.certificate["results"]["this run"] == run.certificate["results"]["zero update"]
    assert verify_run(run.folder).trouble == ""


def test_a_site_that_is_started_again_in_mid_round_has_dropped_out(federation: Callable[..., Federation]) -> None:
    made = federation()
    original = made.sites[2].answer

    def restarting(data: bytes) -> bytes:
        if stage_of(data) == ProtocolStep.CONFIRM and made.sites[2] is not fresh:
            made.sites[2] = fresh
            return fresh.answer(data)
        return original(data)

    fresh = made.site(2)
    made.sites[2] = type("Restarting", (), {"answer": staticmethod(restarting)})()  # type: ignore[call-overload]
    run = made.run()
    assert any("CONFIRM: is not in this round" in line for line in made.said), made.said
    assert [row["slot"] for row in rows_of(run.folder) if row["kind"] == "contributors"] == [0, 1, 2]


class Killed(BaseException):
    """The server's process ends."""


@pytest.mark.parametrize("stage", [ProtocolStep.MASK, ProtocolStep.UNMASK])
def test_a_server_that_is_killed_in_mid_round_skips_that_round(
    stage: ProtocolStep, federation: Callable[..., Federation]
) -> None:
    """Its round was charged and its answers are gone; nobody answers a second time for it, and the next round is whole."""
    made = federation()
    questions: list[int] = []

    def killed(number: int, data: bytes) -> bool:
        if stage_of(data) == 1:
            questions.append(unpack_frame(data, Kind.QUERY, first=BIG, second=BIG).head["spec"]["slot"])
        if questions[-1:] == [1] and stage_of(data) == stage:
            raise Killed
        return False

    made.lost = killed
    with pytest.raises(Killed):
        made.run()
    made.lost = lambda number, data: False
    run = made.run(resume=True)
    assert "round 1 was charged but its result was lost: skipped" in "\n".join(made.said)
    rows = [(row["kind"], row["slot"]) for row in rows_of(run.folder) if row["kind"] in ("charge", "contributors")]
    assert rows == [("charge", 0), ("contributors", 0), ("charge", 1), ("charge", 2), ("contributors", 2)]
    assert [[row["slot"] for row in site_rows(made, number)] for number in range(NODES)] == [[0, 1, 2]] * NODES
    assert verify_run(run.folder).trouble == ""


LIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "other bytes": lambda data: data[:70] + bytes(byte ^ 1 for byte in data[70:90]) + data[90:],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_node_is_left_out(lie: str, federation: Callable[..., Federation]) -> None:
    made = federation()
    made.grid.tamper[3] = LIES[lie]
    run = made.run()
    counts = {row["slot"]: row["contributors"] for row in rows_of(run.folder) if row["kind"] == "contributors"}
    with Ledger.open(run.ledger, read_only=True) as ledger:
        for slot in (0, 1, 2):
            assert counts[slot] == sum(client % NODES != 3 for client in ledger.sampler().cohort(slot))


# What frames show


@pytest.fixture
def unmasked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every node's and every client's share of a sum as it must never travel, in pieces of 32 bytes.

    An idle node's are zeros, which an adapter that has learned nothing shows as well: tests have clients on every node.
    """
    pieces: list[bytes] = []
    share = client_side.client_share

    def keep(total_V: Any, bits: int) -> None:
        packed = pack_values(total_V, bits)
        pieces.extend(packed[start : start + 32] for start in range(0, len(packed) - 31, 4096))

    def shared(query: Query, update_ND: Any, clients: Any, permit: Any, noise: Any) -> Any:
        total_V = share(query, update_ND, clients, permit, noise)
        keep(total_V, modulus_bits(query, permit))
        return total_V

    original = secagg_client.SecAggClient.__init__

    def made(self: Any, settings: Any, node: int, key: Any, vector: Any) -> None:
        def kept() -> Any:
            total_V = vector()
            keep(total_V, settings.bits)
            return total_V

        original(self, settings, node, key, kept)

    monkeypatch.setattr(client_side, "client_share", shared)
    monkeypatch.setattr(secagg_client.SecAggClient, "__init__", made)
    return pieces


def shown(pieces: list[bytes], frames: list[bytes]) -> int:
    return sum(piece in frame for piece in set(pieces) for frame in frames)


def test_nothing_unmasked_is_in_any_frame(federation: Callable[..., Federation], unmasked: list[bytes]) -> None:
    made = federation("federation.rounds=1", EVERY_NODE)
    made.run()
    assert len(set(unmasked)) >= 2 * NODES
    assert shown(unmasked, made.frames) == 0


def test_the_search_would_find_an_unmasked_vector(
    federation: Callable[..., Federation], unmasked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secagg_client.crypto, "apply_mask", lambda total_V, key, sign: None)
    made = federation("federation.rounds=1", EVERY_NODE)
    made.run()
    assert shown(unmasked, made.frames) >= 2 * NODES


# Processes


@pytest.mark.slow
def test_loopback_deployment_with_a_killed_node(tmp_path: Path) -> None:
    """TLS, node keys, rosters, the documented commands; a node is killed after round 1, and the run goes on with three."""
    recipe = secure_recipe("federation.rounds=4", "privacy.participation_cap=5", EVERY_NODE)
    with deployed(tmp_path / "place", recipe, NODES) as place:
        server = place.server("--round-timeout", "20")
        nodes = [place.node(number) for number in range(NODES)]
        wait_for(place.log("server"), "round 1:", 150)
        nodes[3].kill()
        nodes[3].wait()
        assert server.wait(600) == 0, place.log("server").read_text()
    run = place.folder / "run"
    counts = {row["slot"]: row["contributors"] for row in rows_of(run) if row["kind"] == "contributors"}
    assert list(counts) == [0, 1, 2, 3, 4]
    with Ledger.open(run / "ledger.jsonl", read_only=True) as ledger:
        last = ledger.sampler().cohort(4)
    assert counts[4] == sum(client % NODES != 3 for client in last) < len(last)
    assert verify_run(run).trouble == ""
    assert "secure-aggregation" in (run / "certificate.json").read_text()


@pytest.mark.slow
def test_loopback_deployment_sums_like_this_process(tmp_path: Path) -> None:
    recipe = secure_recipe("privacy.noise=replay")
    expected = adapter(experiment.run(recipe, tmp_path / "expected"))
    with deployed(tmp_path / "place", recipe, NODES) as place:
        server = place.server("--quorum", "1")
        for number in range(NODES):
            place.node(number)
        assert server.wait(600) == 0, place.log("server").read_text()
    found = load_file(place.folder / "run" / "adapter" / "adapter_model.safetensors")
    assert torch.allclose(torch.cat([tensor.flatten() for tensor in found.values()]), expected, atol=1e-5)
