"""The server's side of secure aggregation over a transport: which node is which, and each step's messages there and back.

The protocol is `secure_aggregation`'s; this only carries its bytes. A node that does not answer a step, or answers anything but
that step, is left out from there on, and the protocol's own bounds say whether the round can be finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

from drencoder.errors import CodeError
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.roster import Roster
from drencoder.federated.remote.transport import Transport
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings

# Carries the first stage inside the query: {node: (clients, request)} -> {node: (name of its round, answer)}.
FirstStepAsker: TypeAlias = Callable[[Mapping[int, tuple[list[int], bytes]]], Mapping[int, tuple[str, bytes]]]


@final
@dataclass(frozen=True)
class NodeDirectory:
    """The roster and the names that its nodes are registered by."""

    roster: Roster
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, keys: Mapping[str, bytes]) -> "NodeDirectory":
        roster = Roster.of(keys.values())
        return cls(roster, {name: roster.keys.index(key) for name, key in keys.items()})

    def reachable_nodes(self, online: Mapping[int, str]) -> dict[int, int]:
        """Number in the roster -> node, of the nodes that can be reached now."""
        return {self.numbers[name]: node for node, name in online.items() if name in self.numbers}

    def clients(
        self, reachable_nodes: Mapping[int, int], hosts: Mapping[int, int], cohort: Sequence[int]
    ) -> list[list[int]]:
        """The cohort's clients on each node of the roster; none on one that cannot be reached. `hosts`: client -> node."""
        numbers = {node: number for number, node in reachable_nodes.items()}
        on_nodes: list[list[int]] = [[] for _ in self.roster.keys]
        for client in cohort:
            if client in hosts and hosts[client] in numbers:
                on_nodes[numbers[hosts[client]]].append(client)
        return on_nodes


@final
@dataclass
class ProtocolMessages:
    """Carries one round's stages; `exchange` is what `secure_round.secure_sum` asks for. `clients[i]` are node i's."""

    settings: RoundSettings
    reachable_nodes: Mapping[int, int]
    clients: Sequence[list[int]]
    ask_first_step: FirstStepAsker
    transport: Transport
    recipe: bytes
    timeout: float
    say: Callable[[str], None]
    _rounds: dict[int, str] = field(default_factory=dict)  # node -> what it calls this round

    def exchange(self, stage: ProtocolStep, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        """By number in the roster, who did not answer well left out."""
        numbers = {self.reachable_nodes[number]: number for number in requests if number in self.reachable_nodes}
        if stage == ProtocolStep.ADVERTISE:
            asked = {node: (self.clients[number], requests[number]) for node, number in numbers.items()}
            begun = self.ask_first_step(asked)
            self._rounds = {node: name for node, (name, _) in begun.items()}
            return {numbers[node]: answer for node, (_, answer) in begun.items()}
        frames = {
            node: pack_frame(
                Frame(Kind.STAGE, self.recipe, {"nonce": self._rounds[node], "stage": int(stage)}, requests[number])
            )
            for node, number in numbers.items()
        }
        answers = {}
        limit = self.settings.largest(stage, answer=True)
        for node, data in self.transport.exchange(stage.name.lower(), frames, self.timeout).items():
            try:
                answer = parse_answer(data, self.recipe, self._rounds[node], (), limit)
            except CodeError as error:
                self.say(f"node {node}: {stage.name} thrown away: {error}")
                continue
            if isinstance(answer, Refusal):
                self.say(f"node {node}: {stage.name}: {answer.words}")
            else:
                answers[numbers[node]] = answer[1]
        return answers


def parse_answer(
    data: bytes, recipe: bytes, nonce: str, clients: tuple[int, ...], limit: int
) -> tuple[Answer, bytes] | Refusal:
    """A node's answer to the question `nonce` to `clients`, or why it gave none.

    Raises CodeError for anything else; its first part has at most `limit` bytes.
    """
    frame = unpack_frame(data, Kind.QUERY_ANSWER, first=limit, second=0)
    answer = Answer.of(frame.head)
    if answer.refusal != Refusal.NONE:
        try:
            return Refusal(answer.refusal)
        except ValueError:
            raise CodeError(f"an unknown refusal, {answer.refusal}") from None
    if frame.recipe != recipe or answer.nonce != nonce or answer.clients != clients:
        raise CodeError("an answer to another question")
    return answer, frame.first
