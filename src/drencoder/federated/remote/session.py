"""A site's part of secure aggregation: its key, the keys it believes, and the one round that is open.

Nothing here is on disk. A site that is started again in mid-round has lost its secrets of that round and is a node that dropped
out; the site's ledger, which was charged before the round began here, keeps it from beginning a second time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from drencoder.errors import EngineError, SecureError
from drencoder.federated.remote.roster import Roster, node_key
from drencoder.federated.secure_round import secure_node
from drencoder.recipe.recipe import Recipe
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings

_REQUEST_BYTES = 256  # of a later stage's request, per node and once more; see the table in secure.messages


@final
class SecAggSession:
    """A node of the roster. `number` is its place there, `threshold` how many nodes must stay to the end.

    Raises:
      RecipeError: the roster has another number of keys than the recipe has nodes.
      SecureError: the key is none of the roster's.
    """

    def __init__(self, key: NodeKey, roster: Roster, recipe: Recipe, where: str = "the roster") -> None:
        roster.check(recipe, where)
        if key.public not in roster.keys:
            raise SecureError(f"this site's key is not in {where}: give the key or the roster of this federation.")
        self._key, self.roster, self.threshold = key, roster, recipe.threshold
        self.number = roster.keys.index(key.public)
        self._round = ""
        self._node: SecAggClient | None = None

    @classmethod
    def open(cls, recipe: Recipe, key: Path | None, roster: Path | None) -> "SecAggSession":
        """From files; `roster` None = the file `roster` beside the key. Raises as the class, and ArtifactError."""
        if key is None:
            raise EngineError(
                "secure aggregation needs a site that remembers a round from one message to the next and signs with its key: "
                "start it with drencoder client."
            )
        where = roster or key.parent / "roster"
        return cls(node_key(key), Roster.read(where), recipe, str(where))

    @property
    def longest_request(self) -> int:
        """Bytes that a request of a later stage has at most."""
        return _REQUEST_BYTES * (1 + len(self.roster.keys))

    def begin(
        self,
        name: str,
        settings: RoundSettings,
        clients: Sequence[int],
        share_V: npt.NDArray[np.uint32],
        request: bytes,
    ) -> bytes:
        """Starts the round called `name`, in place of any other, with the sum of its clients' shares; answers its first stage.

        The round must have been charged. Raises SecureError or VoidRoundError; then there is no round.
        """
        self._node = None
        node = secure_node(settings, self.number, self._key, clients, share_V)
        answer = node.answer(ProtocolStep.ADVERTISE, request)
        self._round, self._node = name, node
        return answer

    def knows(self, name: str) -> bool:
        """Whether this is the round that is open."""
        return self._node is not None and name == self._round

    def answer(self, stage: ProtocolStep, request: bytes) -> bytes:
        """A later stage of the open round. After a SecureError or VoidRoundError, and after the last stage, it is closed."""
        assert self._node is not None
        node, self._node = self._node, None
        answer = node.answer(stage, request)
        if stage != ProtocolStep.UNMASK:
            self._node = node
        return answer
