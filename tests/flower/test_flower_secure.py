"""Secure aggregation between sites behind Flower's messages: drop-outs, rosters, rounds begun twice, and what frames show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deployment import deployed, small_recipe, wait_for
from drencoder.errors import ArtifactError, EngineError, RecipeError, RefusedError, SecureError
from drencoder.federated import secure_round
from drencoder.federated.query import Query, moment_query
from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction, adapter_bytes
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.roster import Roster, named_keys
from drencoder.federated.remote.site import Site
from drencoder.federated.round import modulus_bits
from drencoder.federated.secure_round import round_settings
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.server_app import ServerOptions
from drencoder.flower.simulation import simulate_run
from drencoder.flower.transport import GridTransport
from drencoder.privacy.ledger import Ledger, _permit
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run
from drencoder.secure_aggregation import client as secagg_client
from drencoder.secure_aggregation.messages import ProtocolStep, pack_values
from flower_grid import InProcessGrid

BIG = 1 << 24
NODES = 4  # of which three must stay to the end
EVERY_NODE = "federation.sampling_rate=0.9"  # 15 clients on each: a cohort misses a node once in 10^15 draws


def secure_recipe(*overrides: str) -> Recipe:
    return small_recipe(
        "privacy.trust=secure-aggregation", f"federation.nodes={NODES}", "evaluation.every=0", "federation.population=60",
        *overrides,
    )  # fmt: skip


def stage_of(data: bytes) -> int:
    """Of a frame on its way to a site: 1 for a question, 2 to 5 for a later stage, 0 for anything else."""
    if data[5] == Kind.STAGE:
        return int(unpack_frame(data, Kind.STAGE, first=BIG, second=0).head["stage"])
    return int(data[5] == Kind.QUERY)


class Federation:
    """Four sites in this process, with keys and rosters from files. `lost(number, data)`: the site never sees this frame."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.said = folder, recipe, list[str]()
        self.frames: list[bytes] = []  # all that travelled, both ways
        self.lost: Callable[[int, bytes], bool] = lambda number, data: False
        (folder / "recipe.toml").write_text(recipe.to_toml())
        make_certificates(folder / "certs", NODES, [])
        self.keys = named_keys(recipe, read_public_keys(folder / "certs" / "nodes"))
        self.sites = [self.site(number) for number in range(NODES)]
        self.grid = InProcessGrid([self._app(number) for number in range(NODES)])

    def site(self, number: int, **more: Any) -> Site:
        key = self.folder / "certs" / f"node{number}" / "key"
        settings: dict[str, Any] = {"data": None, "state": self.folder / f"site{number}", "key": key, **more}
        return open_site(str(self.folder / "recipe.toml"), f"{number}/{NODES}", **settings)

    def _app(self, number: int) -> Any:
        class Recorded:
            def answer(_, data: bytes) -> bytes:  # noqa: N805
                self.frames.append(data)
                if self.lost(number, data):
                    raise ConnectionError
                answer = self.sites[number].answer(data)
                self.frames.append(answer)
                return answer

        app = make_client_app(lambda context: Recorded())  # type: ignore[arg-type,return-value]
        return app

    def run(self, name: str = "run", **more: Any) -> experiment.RunResult:
        patience = RoundTimeouts(quorum=0.5, round_timeout=30, wait=0.5)
        keys = more.get("keys", self.keys)
        engine = make_remote_engine(GridTransport(self.grid, self.said.append), patience, self.said.append, keys)
        if more.get("resume"):
            return experiment.resume(self.folder / name, Lines(self.said), engine)
        return experiment.run(self.recipe, self.folder / name, Lines(self.said), engine)


class Lines:
    """A listener that keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        self.say = said.append

    def planned(self, overview: Any) -> None: ...
    def round_done(self, row: Any) -> None: ...
    def finished(self, certificate: Any) -> None: ...


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
    share = secure_round.client_share

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

    monkeypatch.setattr(secure_round, "client_share", shared)
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
    monkeypatch.setattr(secagg_client, "apply_mask", lambda total_V, key, sign: None)
    made = federation("federation.rounds=1", EVERY_NODE)
    made.run()
    assert shown(unmasked, made.frames) >= 2 * NODES


# Rosters and rounds begun twice


def question(made: Federation, number: int, **head: Any) -> bytes:
    """A sound first stage of slot 0, five clients on each node, some facts of its head changed."""
    live = made.sites[number]._components
    plan, query = live.plan, moment_query(live.lora.layout.segments, live.recipe)
    roster = Roster.of(made.keys.values())
    place = made.sites[number]._session.number  # type: ignore[union-attr]
    own = tuple(range(number, 20, NODES))
    counts = (len(own),) * NODES
    permit = _permit(plan, 0, 0, (), "run-1")  # of the server, which asks after its charge
    settings = round_settings(query, permit, counts, roster.keys, live.recipe.threshold)
    sound = Instruction(
        nonce="n", run="run-1", attempt=0, trust=plan.trust, noise=plan.noise, noise_multiplier=plan.stage1_noise_multiplier,
        spec=query.spec, clients=own, encoder="", **live.base_digests.to_dict(), counts=counts, roster=roster.digest,
        request=settings.frame_request(ProtocolStep.ADVERTISE, place, b"").hex(),
    )  # fmt: skip
    first = adapter_bytes(live.lora.initial_D)
    return pack_frame(Frame(Kind.QUERY, made.sites[number]._recipe, {**sound.head(), **head}, first=first))


def refusal(data: bytes) -> Refusal:
    return Refusal(Answer.of(unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).head).refusal)


def site_rows(made: Federation, number: int) -> list[dict[str, Any]]:
    lines = (made.folder / f"site{number}" / "site.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "answer"]


@pytest.mark.parametrize(
    ("head", "code", "charged"),
    [
        ({}, Refusal.NONE, 1),
        ({"roster": "0" * 64}, Refusal.ROSTER, 0),
        ({"counts": []}, Refusal.PLAN, 0),
        ({"counts": [5, 5, 5]}, Refusal.CLIENTS, 0),
        ({"counts": [4, 4, 4, 4]}, Refusal.CLIENTS, 0),
        ({"clients": [0]}, Refusal.CLIENTS, 0),
        ({"clients": [1]}, Refusal.CLIENTS, 0),
        ({"request": "not hex"}, Refusal.FOREIGN, 0),
        ({"trust": "local"}, Refusal.PLAN, 0),
        ({"counts": [True, 5, 5, 5]}, Refusal.FOREIGN, 0),
        ({"request": "00"}, Refusal.SECURE, 1),  # of no round that this site knows: charged, and nothing leaves
        ({"run": "run-2"}, Refusal.SECURE, 1),
    ],
)
def test_site_refuses(head: dict[str, Any], code: Refusal, charged: int, federation: Callable[..., Federation]) -> None:
    made = federation()
    assert refusal(made.sites[0].answer(question(made, 0, **head))) == code
    assert len(site_rows(made, 0)) == charged


def test_a_lie_about_others_counts_makes_another_round(federation: Callable[..., Federation]) -> None:
    """The counts are part of what every message is bound to, so sites that were told different ones cannot be summed."""
    made = federation()
    place = made.sites[0]._session.number  # type: ignore[union-attr]
    counts = [5] * NODES
    counts[place - 1] = 4
    assert refusal(made.sites[0].answer(question(made, 0, counts=counts))) == Refusal.SECURE


def test_a_round_is_begun_once_with_or_without_clients_also_after_a_restart(
    federation: Callable[..., Federation],
) -> None:
    made = federation()
    sound = question(made, 0)
    assert refusal(made.sites[0].answer(sound)) == Refusal.NONE
    for site in (made.sites[0], made.site(0)):
        assert refusal(site.answer(sound)) == Refusal.ANSWERED
        assert refusal(site.answer(question(made, 0, attempt=1, nonce="m"))) == Refusal.ANSWERED
    ledger = SiteLedger.open(made.folder / "other" / "site.jsonl", "r", made.sites[0]._components.plan)
    ledger.charge("run", 1, 0, [])  # a node without clients signs lists, too
    for clients in ([], [4]):
        with pytest.raises(Exception, match="once too often"):
            ledger.charge("run", 1, 0, clients)
    assert ledger.charge("run", 2, 0, [4]).cohort == (4,)


def test_later_stages_need_the_round_that_is_open(federation: Callable[..., Federation]) -> None:
    made = federation()
    site = made.sites[0]

    def staged(**head: Any) -> bytes:
        return site.answer(pack_frame(Frame(Kind.STAGE, site._recipe, {"nonce": "n", "stage": 2, **head}, b"")))

    assert refusal(staged()) == Refusal.ROUND
    assert refusal(site.answer(question(made, 0))) == Refusal.NONE
    assert refusal(staged(nonce="m")) == Refusal.ROUND
    assert refusal(staged(nonce=7)) == Refusal.ROUND
    assert refusal(staged(stage="2")) == Refusal.FOREIGN
    assert refusal(staged(stage=9)) == Refusal.FOREIGN
    assert refusal(staged(stage=2)) == Refusal.SECURE  # no body: the round is over for this site
    assert refusal(staged(stage=2)) == Refusal.ROUND


def test_a_server_with_another_key_in_its_roster_is_refused_by_every_honest_site(
    federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """A server that puts in a key of its own to be a node of the round: nobody answers, nothing is charged at a site."""
    made = federation()
    make_certificates(tmp_path / "evil", 1, [])
    evil = named_keys(small_recipe(), {}) | made.keys
    evil["node3"] = Roster.read(tmp_path / "evil" / "node0" / "roster").keys[0]
    with pytest.raises(RefusedError, match="node0, node1, node2, node3: has pinned other node keys"):
        made.run(keys=evil)
    assert sum("has pinned other node keys" in line for line in made.said) >= 4
    assert all(site_rows(made, number) == [] for number in range(NODES))


def test_rosters_are_files_of_keys_in_any_order(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", NODES, [])
    own = tmp_path / "certs" / "node2" / "roster"
    roster, recipe = Roster.read(own), secure_recipe()
    assert roster == Roster.of(named_keys(recipe, read_public_keys(tmp_path / "certs" / "nodes")).values())
    lines = own.read_bytes().splitlines()
    other = tmp_path / "roster"
    other.write_bytes(b"\n\n".join(reversed(lines)))
    assert Roster.read(other) == roster
    other.write_bytes(b"\n".join([*lines, lines[0]]))
    with pytest.raises(ArtifactError, match="line 5 is the key of another line"):
        Roster.read(other)
    other.write_bytes(b"ssh-rsa AAAA\n")
    with pytest.raises(ArtifactError, match="line 1 is not a P-384 public key"):
        Roster.read(other)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Roster.read(tmp_path / "nowhere")


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", 3, [])
    make_certificates(tmp_path / "more", NODES, [])
    recipe, path = secure_recipe(), tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    with pytest.raises(RecipeError, match=r"federation.nodes = 4 in the recipe and --nodes has 3 keys"):
        named_keys(recipe, read_public_keys(tmp_path / "certs" / "nodes"))
    assert named_keys(small_recipe(), read_public_keys(tmp_path / "certs" / "nodes")) == {}

    def opened(**files: Path) -> Site:
        return open_site(str(path), "0/4", data=None, state=tmp_path / "state", **files)

    with pytest.raises(EngineError, match="start it with drencoder client"):
        opened()
    with pytest.raises(RecipeError, match=r"federation.nodes = 4 in the recipe and .*roster has 3 keys"):
        opened(key=tmp_path / "certs" / "node0" / "key")
    with pytest.raises(SecureError, match="this site's key is not in"):
        opened(key=tmp_path / "certs" / "node0" / "key", roster=tmp_path / "more" / "node0" / "roster")
    (tmp_path / "more" / "node0" / "roster").unlink()
    with pytest.raises(ArtifactError, match="needs the public keys of all nodes"):
        opened(key=tmp_path / "more" / "node0" / "key")
    with pytest.raises(EngineError, match="Ray's workers do not"):
        simulate_run(ServerOptions(recipe, tmp_path / "run"), NODES)


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
