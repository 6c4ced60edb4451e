"""A Flower grid inside this process: every message goes through Flower's own wire form both ways, no sockets and no Ray."""

import secrets
import time
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from drencoder.flower.transport import read_payload, wrap_payload

Tamper = Callable[[bytes], bytes]


class InProcessGrid(Grid):
    """`tamper[i]` changes what node i sends back; a node in `dead` is offline, one in `mute` says hello and no more."""

    def __init__(self, apps: list[ClientApp]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else no Message outside a run
        self.apps = apps
        self.tamper: dict[int, Tamper] = {}
        self.dead: set[int] = set()
        self.mute: set[int] = set()
        self.twice = False  # whether every answer is delivered two times
        self.seen: list[tuple[int, bytes]] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *arguments: object, **named: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [index + 1 for index in range(len(self.apps)) if index not in self.dead]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=f"node{node - 1}") for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier, index = secrets.token_hex(8), message.metadata.dst_node_id - 1
            message.metadata.__dict__.update(_message_id=identifier, _run_id=1, _src_node_id=1)
            identifiers.append(identifier)
            arrived = message_from_proto(message_to_proto(message))
            if index in self.mute and read_payload(arrived.content)[5] != 1:
                continue
            self.seen.append((index, read_payload(arrived.content)))
            context = Context(run_id=1, node_id=index + 1, node_config={}, state=RecordDict(), run_config={})
            try:
                if index in self.dead:
                    raise ConnectionError
                reply = self.apps[index](message=arrived, context=context)
                reply = message_from_proto(message_to_proto(reply))
                if index in self.tamper and read_payload(arrived.content)[5] != 1:  # not the hello
                    reply.content = wrap_payload(self.tamper[index](read_payload(reply.content)))
            except ConnectionError:
                reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=arrived)
            except Exception:
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "raised"), reply_to=arrived)
            self._replies[identifier] = reply
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._replies.pop(name) for name in list(message_ids) if name in self._replies]
        return found * 2 if self.twice else found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        time.sleep(0)
        return self.pull_messages(self.push_messages(messages))
