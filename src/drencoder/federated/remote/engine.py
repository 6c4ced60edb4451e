"""The server's side: a cohort's question goes to the machines that host its clients.

A client that does not answer is left out and nothing is weighted up for it: the denominator stays q N. What a site sends is
believed only as far as it can be checked: the answer to this very message, for exactly the clients that were asked, each
message of the right size, encoder and round, with finite values, and under local trust no longer than noise can make it.
"""

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from drencoder.encoders.wire import unpack_rows
from drencoder.errors import CodeError, EngineError, QuorumError, RecipeError, RefusedError, VoidRoundError
from drencoder.federated.engine import RunComponents, SiteFacts
from drencoder.federated.query import Query
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.frames import Frame, Kind, pack_frame
from drencoder.federated.remote.instruction import Answer, Instruction, adapter_bytes, encoder_bytes, fingerprint
from drencoder.federated.remote.membership import Membership
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.roster import is_secure
from drencoder.federated.remote.rounds import NodeDirectory, ProtocolMessages, parse_answer
from drencoder.federated.remote.transport import Traffic, Transport
from drencoder.federated.round import SecureSum, Upload, code_values, message_wire
from drencoder.federated.secure_round import round_settings, secure_sum
from drencoder.models.identity import BaseDigests
from drencoder.privacy.accounting import PoissonGaussianEvent
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource, quantiser_for
from drencoder.secure_aggregation.messages import ProtocolStep, round_bytes

_BATCH = 32  # messages that are unpacked at once
_MEND = "Mend the sites and start them again, then go on with --resume."
_TAIL = 8.0  # standard deviations: noise that long has a chance of 1e-14


@final
@dataclass(frozen=True)
class RoundTimeouts:
    """How long the engine waits, and for how many.

    Args:
      quorum: share that must answer, else the round is given up: of the cohort (local trust), or of the whole population
        (central trust, where a rule that looked at the secret cohort would tell something about it).
      round_timeout: seconds until a round goes on without those who have not answered.
      wait: seconds to wait for enough clients before a slot is charged.
      nodes: how many nodes the first slot waits for, as long as `wait` allows; 0 = the quorum is enough.
    """

    quorum: float = 0.5
    round_timeout: float = 600.0
    wait: float = 600.0
    nodes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.quorum <= 1:
            raise RecipeError(f"--quorum {self.quorum} is not a share: give a number from 0 to 1.")
        for name, value in (("--round-timeout", self.round_timeout), ("--wait", self.wait)):
            if not 0 < value < math.inf:
                raise RecipeError(f"{name} {value} is not a time: give seconds, more than 0.")


def make_remote_engine(
    transport: Transport,
    timeouts: RoundTimeouts,
    say: Callable[[str], None] = lambda text: None,
    keys: Mapping[str, bytes] | None = None,
    listed: Mapping[str, ClientSet] | None = None,
) -> Callable[[RunComponents], "RemoteEngine"]:
    """What `runs.run.run(engine=...)` takes. `keys`: name -> public key of each node, for secure aggregation; `listed`: name -> the
    clients that the server's list of keys gives to a node."""
    return lambda components: RemoteEngine(components, transport, timeouts, say, keys, listed)


@final
class RemoteEngine:
    """An engine whose clients live behind a `Transport`. Who hosts whom is fixed by the server's list, else when a node first
    says hello.

    Raises RecipeError under secure aggregation unless there is one key for each of the recipe's nodes.
    """

    def __init__(
        self,
        components: RunComponents,
        transport: Transport,
        timeouts: RoundTimeouts,
        say: Callable[[str], None],
        keys: Mapping[str, bytes] | None = None,
        listed: Mapping[str, ClientSet] | None = None,
    ) -> None:
        self._transport, self._timeouts, self._say = transport, timeouts, say
        self._recipe = agreement(components.recipe)
        self._plan, self._population = components.plan, components.recipe.federation.population
        self._threshold, self._directory = components.recipe.threshold, None
        if is_secure(components.recipe):
            self._directory = NodeDirectory.of(keys or {})
            self._directory.roster.check(components.recipe, "the server")
        self._base = components.base_digests
        self._members = Membership(transport, self._recipe, self._base, self._population, listed or {}, say)
        self._has_encoder: dict[int, str] = {}  # node -> fingerprint
        self._started = False
        self._unasked: list[int] = []

    # --- who is there -------------------------------------------------------------------------

    def ready(self) -> None:
        """Waits until nodes that host a quorum of the population are there (at first: all expected nodes)."""
        end = time.monotonic() + self._timeouts.wait
        while True:
            online = self._members.roll_call()
            reachable = self._members.reachable(online)
            enough = len(reachable) >= max(1.0, self._timeouts.quorum * self._population)
            if self._directory is not None:
                enough = enough and len(self._directory.reachable_nodes(online)) >= self._threshold
            complete = self._started or self._members.present >= self._timeouts.nodes
            if enough and (complete or time.monotonic() > end):
                self._started = True
                return
            if self._all_refuse:
                raise EngineError(f"{self._refusals} Nothing was charged for this slot. {_MEND}")
            if time.monotonic() > end:
                reasons = f" These refuse: {self._members.reasons}." if self._members.reasons else ""
                raise EngineError(
                    f"nodes that host {len(reachable)} of {self._population} clients could be reached in "
                    f"{self._timeouts.wait:.0f} s, and the quorum is {self._timeouts.quorum:g}: nothing was charged for this "
                    f"slot.{reasons} Start more nodes, then go on with --resume."
                )
            time.sleep(0.2)

    @property
    def _all_refuse(self) -> bool:
        """Whether nobody is left to ask; not before the first slot if nobody knows how many nodes will come."""
        return bool(self._timeouts.nodes or self._started) and self._members.all_refuse(self._timeouts.nodes)

    @property
    def _refusals(self) -> str:
        return f"every site refuses, for a reason that lasts: {self._members.reasons}."

    def sites(self) -> Sequence[SiteFacts]:
        """Those that said hello in this process, by name."""
        return self._members.sites()

    # --- one question -------------------------------------------------------------------------

    def unasked(self) -> Sequence[int]:
        """Those of the last cohort whose machine could not be reached."""
        return self._unasked

    def gather(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | SecureSum]:
        """Asks the nodes of the cohort's clients at the same time and yields their messages in the order of the clients.

        Under central trust every node is asked whether it is there, so that a node learns nothing from being asked and the
        quorum does not depend on the secret cohort. Under secure aggregation there is one sum: the quorum counts who can be
        reached at its start, and the recipe's `dropout_share` who stays to the end.
        """
        if self._directory is not None:
            yield self._summed(self._directory, query, adapter_D, permit, cohort)
            return
        online = self._members.roll_call()
        hosts = self._members.reachable(online)
        asked: dict[int, list[int]] = {node: [] for node in set(hosts.values()) if permit.trust == "central"}
        for client in cohort:
            if client in hosts:
                asked.setdefault(hosts[client], []).append(client)
        self._unasked = [client for client in cohort if client not in hosts]
        before = replace(self._transport.traffic)
        uploads = self._exchange(query, adapter_D, permit, asked)
        if permit.trust == "central":
            present = sum(1 for node in hosts.values() if node in uploads)
            self._check_quorum(present, self._population, None, "of the population's clients have nodes that answered")
        else:
            present = sum(len(upload.clients) for upload in uploads.values())
            self._say_bytes(
                query, before, self._plan.denominator(query.spec.slot) * message_wire(query, permit).message_size
            )
            self._check_quorum(present, len(cohort), present, "of the cohort's clients answered")
        yield from _in_order(uploads.values())

    def _say_bytes(self, query: Query, before: Traffic, planned: float) -> None:
        """A slot's payload beside the plan's. Not under central trust, where it would tell the size of a secret cohort."""
        after = self._transport.traffic
        self._say(
            f"slot {query.spec.slot}: {after.down - before.down:,} bytes down, {after.up - before.up:,} up; the plan expects codes of "
            f"{planned:,.0f} up"
        )

    def _check_quorum(self, present: int, total: int, answered: int | None, words: str) -> None:
        self._check_somebody_answers(answered)
        if present < self._timeouts.quorum * total:
            raise QuorumError(f"{present} of {total} {words}, and the quorum is {self._timeouts.quorum:g}.", answered)

    def _check_somebody_answers(self, answered: int | None) -> None:
        if self._all_refuse:
            raise RefusedError(f"{self._refusals} {_MEND}", answered)

    def _exchange(
        self, query: Query, adapter_D: Tensor, permit: Permit, asked: Mapping[int, list[int]]
    ) -> dict[int, Upload]:
        """Node -> what it sent, for the nodes that answered well."""
        questions = {node: _instruction(query, permit, clients, self._base) for node, clients in asked.items()}
        size = message_wire(query, permit).message_size
        limits = {node: len(clients) * size for node, clients in asked.items()}
        answers = self._ask(query, adapter_D, questions, limits)
        uploads = {}
        for node, (answer, messages) in answers.items():
            try:
                uploads[node] = _checked(answer, messages, query, permit)
            except CodeError as error:
                self._say(f"node {node}: answer thrown away: {error}")
        return uploads

    def _ask(
        self, query: Query, adapter_D: Tensor, questions: Mapping[int, Instruction], limits: Mapping[int, int]
    ) -> dict[int, tuple[Answer, bytes]]:
        """Node -> its answer of at most `limits[node]` bytes. A node that lacks the encoder is asked once more."""
        shared = encoder_bytes(query) if query.spec.kind == "update" else b""
        name, adapter = fingerprint(shared), adapter_bytes(adapter_D)
        answers: dict[int, tuple[Answer, bytes]] = {}
        todo, full = dict(questions), False
        for _ in range(2):
            todo = {node: replace(one, nonce=secrets.token_hex(16), encoder=name) for node, one in todo.items()}
            frames = {}
            for node, asking in todo.items():
                second = shared if asking.asks and (full or self._has_encoder.get(node) != name) else b""
                first = adapter if asking.asks else b""
                frames[node] = pack_frame(Frame(Kind.QUERY, self._recipe, asking.head(), first, second))
            lacking = {}
            for node, data in self._transport.exchange("query", frames, self._timeouts.round_timeout).items():
                asking = todo[node]
                try:
                    got = parse_answer(data, self._recipe, asking.nonce, asking.clients, limits[node])
                except CodeError as error:
                    self._say(f"node {node}: answer thrown away: {error}")
                    continue
                if got == Refusal.ENCODER_NEEDED:
                    lacking[node] = asking
                elif isinstance(got, Refusal):
                    self._members.refuse(node, got)
                else:
                    answers[node] = got
                    if asking.asks:
                        self._has_encoder[node] = name
            todo, full = lacking, True
            if not todo:
                break
        return answers

    def _summed(
        self, directory: NodeDirectory, query: Query, adapter_D: Tensor, permit: Permit, cohort: Sequence[int]
    ) -> SecureSum:
        """Secure aggregation. Raises VoidRoundError, a QuorumError, when the sum cannot be had."""
        online = self._members.roll_call()
        reachable_nodes = directory.reachable_nodes(online)
        clients = directory.clients(reachable_nodes, self._members.reachable(online), cohort)
        counts, there = tuple(map(len, clients)), {client for own in clients for client in own}
        self._unasked = [client for client in cohort if client not in there]
        self._check_quorum(sum(counts), len(cohort), None, "of the cohort's clients can be reached")
        settings = round_settings(query, permit, counts, directory.roster.keys, self._threshold)
        plain = _instruction(query, permit, (), self._base)

        def ask_first_step(asked: Mapping[int, tuple[list[int], bytes]]) -> dict[int, tuple[str, bytes]]:
            questions = {
                node: replace(
                    plain, clients=tuple(own), counts=counts, roster=directory.roster.digest, request=request.hex()
                )
                for node, (own, request) in asked.items()
            }
            limit = settings.largest(ProtocolStep.ADVERTISE, answer=True)
            answers = self._ask(query, adapter_D, questions, dict.fromkeys(questions, limit))
            return {node: (answer.nonce, data) for node, (answer, data) in answers.items()}

        before = replace(self._transport.traffic)
        messages = ProtocolMessages(
            settings, reachable_nodes, clients, ask_first_step, self._transport, self._recipe,
            self._timeouts.round_timeout, self._say,
        )  # fmt: skip
        try:
            answers = secure_sum(settings, clients, messages.exchange)
        except VoidRoundError:
            self._check_somebody_answers(None)
            raise
        planned, _ = round_bytes(len(settings.roster), settings.values, settings.bits)
        self._say_bytes(query, before, len(settings.roster) * planned)
        return answers


def _instruction(query: Query, permit: Permit, clients: Sequence[int], base: BaseDigests) -> Instruction:
    """The question to some clients; its name and its encoder's are given when it is sent."""
    return Instruction(
        nonce="", run=permit.run_id, attempt=permit.attempt, trust=permit.trust, noise=permit.noise,
        noise_multiplier=permit.noise_multiplier, spec=query.spec, clients=tuple(clients), encoder="",
        model=base.model, tokenizer=base.tokenizer,
    )  # fmt: skip


def _checked(answer: Answer, data: bytes, query: Query, permit: Permit) -> Upload:
    """A node's messages. CodeError if one of them is bad: it spoils the whole answer of its node."""
    wire = message_wire(query, permit)
    size = wire.message_size
    if len(data) != len(answer.clients) * size:
        raise CodeError("messages of another size")
    messages = [data[start : start + size] for start in range(0, len(data), size)]
    rows = unpack_rows(messages, wire, query.spec.slot)
    if rows.rejected:
        raise CodeError("a message of another encoder or round, or one that is not finite")
    if permit.trust == "local":
        values_NK = code_values(query, permit, rows.code_NK)
        if bool((torch.linalg.vector_norm(values_NK, dim=1, dtype=torch.float64) > _longest(query, permit)).any()):
            raise CodeError("messages longer than clip and noise can make them")
    nonfinite = 0 if permit.trust == "local" else min(answer.nonfinite, len(answer.clients))
    return Upload(answer.clients, messages, nonfinite)


def _in_order(uploads: Iterable[Upload]) -> Iterator[Upload]:
    """All messages by client number, some at a time: what is trained on them (FedCG) must not depend on who hosts whom."""
    uploads = list(uploads)
    messages = {c: message for one in uploads for c, message in zip(one.clients, one.messages, strict=True)}
    order, nonfinite = sorted(messages), sum(one.nonfinite for one in uploads)
    for start in range(0, len(order), _BATCH):
        clients = tuple(order[start : start + _BATCH])
        yield Upload(clients, [messages[client] for client in clients], 0 if start else nonfinite)


def _longest(query: Query, permit: Permit) -> float:
    """The length that a message of an honest client has at most, save with a chance of 1e-14 (Hsu, Kakade and Zhang 2012,
    https://arxiv.org/abs/1110.2842, for the sub-Gaussian noise); infinite where the noise is in another space than the message, and
    of a site's sum, whose length follows the secret number of its units."""
    if query.spec.noise_in != "code" or isinstance(permit.event, PoissonGaussianEvent):
        return math.inf
    longest = query.spec.clip_l2
    if permit.terms is not None:
        quantiser = quantiser_for(permit, query.spec.wire.code_size, query.spec.clip_l2)
        longest = quantiser.bound_l2 + quantiser.noise_std * (math.sqrt(quantiser.values) + _TAIL)
    # A rotated code keeps its length, but for the float32 rounding of turning it back.
    return longest * (1 + (1e-4 if query.spec.wire.rotated else 1e-6))
