"""Who may answer for whom: the server's list of keys, other base models, and what happens when nobody will answer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deployment import small_recipe
from drencoder.errors import DataError, EngineError, RecipeError, RefusedError
from drencoder.federated.remote.agreement import ClientSet
from drencoder.federated.remote.frames import Kind, pack_frame, unpack_frame
from drencoder.federated.remote.refusal import Refusal
from drencoder.flower.client_app import open_site
from drencoder.flower.keys import make_certificates, read_client_sets
from drencoder.models.identity import BaseDigests
from drencoder.runs.verify import verify_run
from federation import Federation
from tampering import reaccount

OTHER = "f" * 64


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return Federation(tmp_path, small_recipe("evaluation.every=0"))


def kinds(made: Federation) -> list[str]:
    return [json.loads(line)["kind"] for line in (made.folder / "run" / "ledger.jsonl").read_text().splitlines()]


def asked_clients(made: Federation, node: int) -> set[int]:
    frames = [
        unpack_frame(data, Kind.QUERY, first=1 << 24, second=1 << 24)
        for n, data in made.grid.seen
        if n == node and data[5] == Kind.QUERY
    ]
    return {client for frame in frames for client in frame.head["clients"]}


def with_base(made: Federation, number: int, **change: str) -> None:
    site = made.sites[number]
    site._components = replace(site._components, digests=replace(site._components.base_digests, **change))


# --- the server's list -----------------------------------------------------------------------------


def test_a_hello_does_not_own_clients_that_the_list_gives_to_another(made: Federation) -> None:
    """Node 0 is asked first and names all 30 clients; the list gives 20 of them to the other two."""
    greedy = open_site(str(made.folder / "recipe.toml"), "0-29", data=None, state=made.folder / "greedy")
    made.sites[0] = greedy
    listed = {"node1": ClientSet.parse("1/3", 30), "node2": ClientSet.parse("2/3", 30)}
    made.run(listed=listed, quorum=1.0)
    assert "node node0: hosts 10 clients" in made.lines.said
    assert "node node2: hosts 10 clients" in made.lines.said
    assert "client 1 and 19 more the server's list of keys gives to another" in made.lines.text
    for node in range(3):
        assert asked_clients(made, node)
        assert {client % 3 for client in asked_clients(made, node)} == {node}


def test_without_a_list_the_first_hello_owns_a_client(made: Federation) -> None:
    made.sites[1] = open_site(str(made.folder / "recipe.toml"), "0-29", data=None, state=made.folder / "greedy")
    made.run(quorum=1.0)
    assert "node node1: hosts 20 clients" in made.lines.said
    assert "are another's already" in made.lines.text


def test_certs_write_the_list_and_a_client_has_one_place(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", 3, [])
    listed = read_client_sets(tmp_path / "certs" / "nodes", 7)
    assert {name: given.clients for name, given in listed.items()} == {
        "node0": (0, 3, 6),
        "node1": (1, 4),
        "node2": (2, 5),
    }
    (tmp_path / "certs" / "nodes" / "node1.clients").write_text("1,3")
    with pytest.raises(RecipeError, match=r"gives client 3 to node1, and node0\.clients has it too"):
        read_client_sets(tmp_path / "certs" / "nodes", 7)
    (tmp_path / "certs" / "nodes" / "node1.clients").write_text("1-9")
    with pytest.raises(RecipeError, match=r"node1\.clients: .* not inside 0-6"):
        read_client_sets(tmp_path / "certs" / "nodes", 7)
    (tmp_path / "certs" / "nodes" / "node1.clients").unlink()
    assert set(read_client_sets(tmp_path / "certs" / "nodes", 7)) == {"node0", "node2"}


# --- base model and tokenizer ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_site_with_another_base_is_left_out_by_name(part: str, made: Federation) -> None:
    with_base(made, 1, **{part: OTHER})
    made.run(quorum=0.5)
    wanted = Refusal.MODEL if part == "model" else Refusal.TOKENIZER
    assert f"node node1: {wanted.words}" in made.lines.text
    assert not asked_clients(made, 1)
    assert asked_clients(made, 0)


def test_a_site_that_comes_back_with_another_base_refuses_the_next_question(made: Federation) -> None:
    """The server says hello once; the site compares at every question."""
    original = made.sites[1].answer

    def restarted(data: bytes) -> bytes:
        if data[5] == Kind.QUERY:
            with_base(made, 1, model=OTHER)
        return original(data)

    made.sites[1].answer = restarted  # type: ignore[method-assign]
    made.run(quorum=0.5)
    assert f"node node1: {Refusal.MODEL.words}" in made.lines.text
    assert not (made.folder / "site1" / "site.jsonl").read_text().count('"answer"')


def test_digests_follow_contents_and_nothing_else(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drencoder.models.place import embedded_folder

    def digests(folder: Path) -> BaseDigests:
        return BaseDigests.of(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    first = digests(embedded_folder())
    model, tokenizer = (kind.from_pretrained(embedded_folder()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=4)  # a call leaves its settings in the tokenizer
    copy = tmp_path / "another name"
    model.save_pretrained(copy, max_shard_size="1MB")  # in other files
    tokenizer.save_pretrained(copy)
    assert len(list(copy.glob("*.safetensors"))) > 1
    assert digests(copy) == first
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    assert BaseDigests.of(model, tokenizer) == replace(first, model=BaseDigests.of(model, tokenizer).model) != first
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (copy / "config.json").write_text(json.dumps(config))
    assert digests(copy).model != first.model
    assert digests(copy).tokenizer == first.tokenizer
    tokenizer.add_tokens(["<new>"])
    assert BaseDigests.of(model, tokenizer).tokenizer != first.tokenizer


# --- nobody will answer ----------------------------------------------------------------------------


def test_a_run_that_every_site_refuses_at_hello_ends_before_any_charge(made: Federation) -> None:
    for number in range(3):
        with_base(made, number, model=OTHER)
    with pytest.raises(
        EngineError, match="every site refuses, for a reason that lasts: node0, node1, node2: has another base model"
    ):
        made.run(nodes=3)
    assert kinds(made) == ["header"]


def test_a_run_that_every_site_refuses_ends_with_the_slot_that_found_out(made: Federation) -> None:
    """The sites' ledgers are of another run: they say so to a question only. Two rounds are left, and not charged."""
    for number, site in enumerate(made.sites):
        site._ledger.charge("another run", 0, 0, (number,))
    with pytest.raises(RefusedError, match="node0, node1, node2: belongs to another run"):
        made.run(nodes=3)
    assert kinds(made) == ["header", "site", "site", "site", "charge", "contributors", "abandoned"]


def test_refusals_in_a_round_end_the_run_after_it(made: Federation) -> None:
    """Stage 1 is answered; then somebody puts other recipes in place everywhere."""
    for site in made.sites:
        original = site.answer

        def changed(data: bytes, original=original, site=site):  # type: ignore[no-untyped-def]
            answer = original(data)
            if data[5] == Kind.QUERY:
                site._recipe = bytes(32)
            return answer

        site.answer = changed  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="node0, node1, node2: has another recipe"):
        made.run(nodes=3)
    rows = [json.loads(line) for line in (made.folder / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [row["slot"] for row in rows if row["kind"] == "charge"] == [0, 1]
    assert rows[-1]["kind"] == "abandoned"


def test_a_site_that_refused_is_asked_again_after_it_was_started_again(made: Federation) -> None:
    good = made.sites[1]._components
    with_base(made, 1, model=OTHER)
    nodes = made.grid.get_node_ids
    looks: list[int] = []

    def online() -> object:
        looks.append(0)
        if len(looks) == 3:  # stopped, and started with the right files
            made.sites[1]._components = good
            return [node for node in nodes() if node != 2]
        return nodes()

    made.grid.get_node_ids = online  # type: ignore[method-assign,assignment]
    made.run(quorum=0.5)
    assert f"node node1: {Refusal.MODEL.words}" in made.lines.text
    assert "node node1: hosts 10 clients" in made.lines.said


def test_real_gradients_wait_for_their_nodes_before_they_are_charged(tmp_path: Path) -> None:
    """FedCG's first stage asks nobody, and charges nothing, until a quorum is there."""
    made = Federation(tmp_path, small_recipe("evaluation.every=0", *FEDCG))
    made.grid.dead = {1}
    with pytest.raises(EngineError, match="20 of 30 clients could be reached"):
        made.run(quorum=1.0)
    assert kinds(made) == ["header"]


FEDCG = ("encoder.name=autoencoder", "prior.source=gradients", "encoder.gate=warn")


def test_the_certificate_and_the_report_list_abandoned_rounds(made: Federation) -> None:
    """Two of three sites are lost for round 1 alone; the round is given up, and everybody can read so."""
    original = made.grid.push_messages

    def losing(messages):  # type: ignore[no-untyped-def]
        messages = list(messages)
        made.grid.mute = (
            {1, 2} if any(message.metadata.group_id == "query" for message in messages) and rounds[0] == 1 else set()
        )
        if any(message.metadata.group_id == "query" for message in messages):
            rounds[0] += 1
        return original(messages)

    rounds = [0]
    made.grid.push_messages = losing  # type: ignore[method-assign]
    result = made.run(quorum=0.9)
    assert result.certificate["slots_without_result"] == {"abandoned": [1], "lost": []}
    words = "Charged without a result (given up, since too few clients answered; the charge stays): round 1."
    assert words in (result.folder / "report.html").read_text()
    assert verify_run(result.folder).trouble == ""


# --- what the certificate says about the sites -----------------------------------------------------


def ward(folder: Path, name: str, owners: int) -> str:
    path = folder / "a private folder" / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"instruction": f"q{n}", "response": "a", "patient": f"Anna {n % owners}"} for n in range(4 * owners)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_certificate_names_the_data_of_the_sites(tmp_path: Path) -> None:
    """Two sites have files with owners, one a file without: the statement then speaks of no people. Nothing of a record, and no
    folder, leaves a site."""
    made = Federation(tmp_path, small_recipe("evaluation.every=0"))
    recipe = str(tmp_path / "recipe.toml")
    named = tmp_path / "named.toml"
    named.write_text(made.recipe.changed({"data.source": "ward.jsonl", "data.client_field": "patient"}).to_toml())
    for number, wanted in enumerate((str(named), str(named), recipe)):
        made.sites[number] = open_site(
            wanted, f"{number}/3", data=ward(tmp_path, f"ward{number}.jsonl", 10), state=tmp_path / f"own{number}"
        )
    result = made.run(quorum=1.0)
    assert result.certificate["sites"] == [
        {
            "name": f"node{number}",
            "clients": ",".join(map(str, range(number, 30, 3))),
            "data": f"ward{number}.jsonl",
            "owners": "simulated" if number == 2 else "named",
        }
        for number in range(3)
    ]
    assert result.certificate["owners"] == "owners whom the sites' own files name; simulated owners"
    assert result.certificate["data"] == "the clients' own text, which stays at 3 sites"
    assert "The owners of this run are simulated" in result.certificate["statement"]
    assert verify_run(result.folder).trouble == ""
    assert reaccount(result.folder) == 0
    everything = "".join(path.read_text(errors="ignore") for path in result.folder.rglob("*") if path.is_file())
    assert "ward1.jsonl" in everything
    for private in ("Anna", "a private folder"):
        assert private not in everything
        assert private not in made.lines.text
    forged = json.loads((result.folder / "certificate.json").read_text())
    forged["sites"][2]["owners"] = "named"
    (result.folder / "certificate.json").write_text(json.dumps(forged))
    assert "sites" in verify_run(result.folder).trouble


def test_what_a_site_calls_its_text_is_cut_and_made_printable(made: Federation) -> None:
    original = made.sites[0].answer

    def loud(data: bytes) -> bytes:
        answer = original(data)
        if data[5] != Kind.HELLO:
            return answer
        frame = unpack_frame(answer, Kind.HELLO_ANSWER, first=0, second=0)
        return pack_frame(replace(frame, head={**frame.head, "data": "\x1b[2J" + "x" * 500, "owners": ["named"]}))

    made.sites[0].answer = loud  # type: ignore[method-assign]
    site = made.run().certificate["sites"][0]
    assert site["data"] == "[2J" + "x" * 77
    assert site["owners"] == "unknown"


def test_a_site_with_another_number_of_owners_is_told_of_its_clients(tmp_path: Path) -> None:
    """Not of the population, which is not this site's to set."""
    recipe = small_recipe("data.source=ward.jsonl", "data.client_field=patient")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(
        DataError, match="names 4 owners in 'patient', and this site answers for 10 clients: give --clients"
    ):
        open_site(str(tmp_path / "recipe.toml"), "0/3", data=ward(tmp_path, "w.jsonl", 4), state=tmp_path / "state")
