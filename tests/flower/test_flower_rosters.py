"""Secure aggregation behind Flower's messages: rosters, rounds begun twice, and what a site refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from secure_federation import NODES, Federation, refusal, secure_recipe, site_rows

from deployment import small_recipe
from drencoder.errors import ArtifactError, EngineError, RecipeError, RefusedError, SecureError
from drencoder.federated.query import moment_query
from drencoder.federated.remote.frames import Frame, Kind, pack_frame
from drencoder.federated.remote.instruction import Instruction, adapter_bytes
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.roster import Roster, named_keys
from drencoder.federated.remote.site import Site
from drencoder.federated.secure_round import round_settings
from drencoder.flower.client_app import open_site
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.server_app import ServerOptions
from drencoder.flower.simulation import simulate_run
from drencoder.privacy.ledger import _permit
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.secure_aggregation.messages import ProtocolStep


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    return lambda *overrides: Federation(tmp_path, secure_recipe(*overrides))


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
