"""Readers of messages: a site's, the server's, and those of secure aggregation."""

import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from drencoder.federated.query import moment_query
from drencoder.federated.remote.agreement import agreement
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction, encoder_bytes, encoder_of, fingerprint
from drencoder.federated.remote.membership import Membership
from drencoder.federated.remote.rounds import parse_answer
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings
from drencoder.secure_aggregation.server import SecAggServer
from fuzz_documents import in_header
from fuzz_world import Reader, World
from mutations import as_json, mutations_of, restructured


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
