"""What a remote engine needs of a network: bytes to nodes and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Traffic:
    """Payload bytes and messages so far, as the server sees them: down to nodes, up from them."""

    down: int = 0
    up: int = 0
    asked: int = 0
    answered: int = 0


class Transport(Protocol):
    """What the engine needs of a network."""

    traffic: Traffic

    def nodes(self) -> dict[int, str]:
        """The nodes that can be reached now, each with a name that survives its restart."""
        ...

    def exchange(self, stage: str, payloads: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
        """Sends to each node and returns what came back within `timeout` seconds. Who failed or is late is missing; an
        answer that comes later than that is never seen."""
        ...
