"""This module carries bytes to nodes and back over a Flower grid: one message to each, as often as a protocol asks."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from drencoder.federated.remote.refusal import refusal_frame
from drencoder.federated.remote.transport import Traffic

_RECORD, _ARRAY, _STYPE = "drencoder", "frame", "drencoder.frame"
REFUSED = 1000  # Flower's error codes above it are a site's refusals
_POLL = 0.1  # s between two looks for answers
_GRACE = 5.0  # s that an answer of the last moment may still be on its way
_SMALL = 1 << 18  # bytes that travel in one piece


def wrap_payload(data: bytes) -> RecordDict:
    """Returns a message's content: raw bytes that only `federated.remote.frames` parses.

    Flower uploads and fetches every part of a message by itself, three times on its way. A small payload therefore is one
    setting (three parts a message); a large one is an array, which Flower cuts into chunks (five parts and more).
    """
    if len(data) <= _SMALL:
        return RecordDict({_RECORD: ConfigRecord({_ARRAY: data})})
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def read_payload(content: RecordDict) -> bytes:
    """Returns the bytes that `wrap_payload` was given; b"" if the content is anything else."""
    small = content.config_records.get(_RECORD)
    if small is not None:
        data = small.get(_ARRAY)
        return data if isinstance(data, bytes) else b""
    record = content.array_records.get(_RECORD)
    array = record.get(_ARRAY) if record is not None else None
    if array is None or array.stype != _STYPE:
        return b""
    return array.data


@final
@dataclass
class GridTransport:
    """Over any Flower grid: a deployment's, a simulation's, or one in this process.

    A message lives `timeout` seconds (its ttl), so that a node which comes back later does not start on an old question.
    `say` gets a line for each node that did not answer.
    """

    grid: Grid
    say: Callable[[str], None] = lambda text: None
    traffic: Traffic = field(default_factory=Traffic)

    def nodes(self) -> dict[int, str]:
        return {node.node_id: _node_name(node.public_key, node.name, node.node_id) for node in self.grid.get_nodes()}

    def exchange(self, stage: str, payloads: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
        order = list(payloads)
        messages = [Message(wrap_payload(payloads[node]), node, "query", ttl=timeout, group_id=stage) for node in order]
        self.traffic.down += sum(map(len, payloads.values()))
        self.traffic.asked += len(order)
        identifiers = list(self.grid.push_messages(messages))
        waiting = {name: node for name, node in zip(identifiers, order, strict=True) if name}
        answers: dict[int, bytes] = {}
        end = time.monotonic() + timeout + min(_GRACE, timeout)  # from here: handing over big messages takes its time
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                # Not by the reply's sender: an error made on a node's behalf is the SuperLink's.
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                if reply.has_error() and reply.error.code > REFUSED:
                    answers[node] = refusal_frame(reply.error.code - REFUSED)
                elif reply.has_error():
                    self.say(f"node {node}: Flower's error {reply.error.code}")  # its text may quote a client's
                else:
                    answers[node] = read_payload(reply.content)
            if waiting:
                time.sleep(_POLL)
        for node in waiting.values():
            self.say(f"node {node}: no answer within {timeout:.0f} s")
        self.traffic.up += sum(map(len, answers.values()))
        self.traffic.answered += len(answers)
        return answers


def _node_name(public_key: bytes, name: str, node: int) -> str:
    """Returns the name that a node was registered by, else the end of its key, else (in a simulation) its number."""
    return name or (public_key.hex()[-16:] if public_key else str(node))
