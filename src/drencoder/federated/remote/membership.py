"""Which sites can be reached, which clients each of them hosts, and which of them refuse for a reason that lasts.

A site says hello once, and again after it was stopped and started. What it says is believed as far as the server's own list
goes: clients that the list gives to another site are left to that one. Clients that the list gives to nobody are the first
site's that names them.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import final

from drencoder.data.evaluation_text import OWNER_KINDS
from drencoder.errors import CodeError, RecipeError
from drencoder.federated.engine import SiteFacts
from drencoder.federated.remote.agreement import ClientSet
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.refusal import Refusal, refusal_of
from drencoder.federated.remote.transport import Transport
from drencoder.models.identity import BaseDigests

_HELLO_TIMEOUT = 30.0
_HELLO_PAUSE = 20.0  # s until a node that did not say who it is is asked again


@final
class Membership:
    """The sites of one run, by the names that survive their restarts.

    Args:
      transport: reaches them.
      recipe: digest of what both sides must have alike; `base` the same of model and tokenizer.
      population: clients of the recipe.
      listed: name -> the clients that the server's list of keys gives to this site.
      say: gets a line for each site that comes, or refuses.
    """

    def __init__(
        self,
        transport: Transport,
        recipe: bytes,
        base: BaseDigests,
        population: int,
        listed: Mapping[str, ClientSet],
        say: Callable[[str], None],
    ) -> None:
        self._transport, self._recipe, self._base = transport, recipe, base
        self._population, self._say = population, say
        self._listed = {client: name for name, given in listed.items() for client in given.clients}
        self._hosts: dict[int, str] = {}  # client -> node's name
        self._known: set[str] = set()
        self._ask_again: dict[str, float] = {}
        self._refusing: dict[str, str] = {}  # name -> why, for good
        self._online: dict[int, str] = {}
        self._facts: dict[str, SiteFacts] = {}

    def roll_call(self) -> dict[int, str]:
        """The nodes that can be reached now and do not refuse (node -> name); new ones are asked which clients they host."""
        self._online = online = self._transport.nodes()
        for name in self._refusing.keys() - set(online.values()):  # it was stopped: it may be mended when it comes back
            del self._refusing[name]
            self._known.discard(name)
        now = time.monotonic()
        unknown = [(name, node) for node, name in online.items() if name not in self._known]
        fresh = {node: name for name, node in sorted(unknown) if now >= self._ask_again.get(name, 0.0)}
        nonces = {node: secrets.token_hex(16) for node in fresh}
        asked = {
            node: pack_frame(Frame(Kind.HELLO, self._recipe, {"nonce": nonces[node], **self._base.to_dict()}))
            for node in fresh
        }
        answers = self._transport.exchange("hello", asked, _HELLO_TIMEOUT) if asked else {}
        for node, name in fresh.items():
            if node not in answers or not self._enter(name, answers[node], nonces[node]):
                self._ask_again[name] = time.monotonic() + _HELLO_PAUSE
        return {node: name for node, name in online.items() if name not in self._refusing}

    @property
    def present(self) -> int:
        """How many nodes could be reached at the last roll call, those that refuse among them."""
        return len(self._online)

    def reachable(self, online: Mapping[int, str]) -> dict[int, int]:
        """client -> the node that hosts it, of the nodes in `online`."""
        nodes = {name: node for node, name in online.items()}
        return {client: nodes[name] for client, name in self._hosts.items() if name in nodes}

    def refuse(self, node: int, refusal: Refusal) -> None:
        """Takes down that a node refused to answer; one with a reason that lasts is asked no more."""
        name = self._online.get(node, str(node))
        self._say(f"node {name}: {refusal.words}")
        if refusal.lasting:
            self._refusing[name] = refusal.words

    def all_refuse(self, expected: int) -> bool:
        """Whether all nodes that can be reached, and at least `expected` of them, refuse for a reason that lasts."""
        return self.present >= max(1, expected) and set(self._online.values()) <= self._refusing.keys()

    @property
    def reasons(self) -> str:
        """Who refuses and why, as a part of a sentence; "" if nobody does."""
        names: dict[str, list[str]] = {}
        for name, why in sorted(self._refusing.items()):
            names.setdefault(why, []).append(name)
        return "; ".join(f"{', '.join(those)}: {why}" for why, those in names.items())

    def sites(self) -> list[SiteFacts]:
        """What the sites that were let in said about themselves, by name."""
        return [self._facts[name] for name in sorted(self._facts)]

    def _enter(self, name: str, data: bytes, nonce: str) -> bool:
        """Takes in a node's answer to hello; whether it need not be asked again."""
        try:
            frame = unpack_frame(data, Kind.HELLO_ANSWER, first=0, second=0)
            if frame.recipe != self._recipe or frame.head.get("nonce") != nonce:
                raise CodeError("of another recipe")
            own = ClientSet.parse(str(frame.head.get("clients")), self._population)
        except CodeError:
            return self._turn_away(name, refusal_of(data))
        except RecipeError as error:
            self._say(f"node {name}: {error} It is not asked until it is started again.")
            self._refusing[name] = "names clients that the recipe does not have"
            self._known.add(name)
            return True
        given = [client for client in own.clients if self._listed.get(client, name) == name]
        accepted = [client for client in given if self._hosts.setdefault(client, name) == name]
        self._say(f"node {name}: hosts {len(accepted)} clients")
        if accepted:
            owners = frame.head.get("owners")
            kind = owners if isinstance(owners, str) and owners in OWNER_KINDS else "unknown"
            text = _printable(frame.head.get("data"))
            self._facts[name] = SiteFacts(name, str(ClientSet(tuple(accepted))), text, kind)
        if left := sorted(set(own.clients) - set(accepted)):
            by = "are another's already"
            if len(given) < len(own.clients):
                by = f"the server's list of keys gives to another ({name}.clients has this node's)"
            self._say(f"node {name}: client {left[0]} and {len(left) - 1} more {by}: left there")
        self._known.add(name)
        return True

    def _turn_away(self, name: str, refusal: Refusal | None) -> bool:
        why = refusal.words if refusal else Refusal.FOREIGN.words
        # A hello that cannot be read is of another version.
        lasting = refusal in (None, Refusal.FOREIGN) or refusal.lasting
        self._say(f"node {name}: {why}" + ("; it is not asked until it is started again" if lasting else ""))
        if lasting:
            self._refusing[name] = why
            self._known.add(name)
        return lasting


def _printable(name: object) -> str:
    """What a site calls its text, as far as it can be shown: at most 80 characters."""
    text = "".join(letter for letter in name if letter.isprintable()) if isinstance(name, str) else ""
    return text[:80] or "undeclared"
