"""Whose keys count under secure aggregation: the roster, as the server has it and as each site has pinned it. No torch.

A roster file has one public key a line in OpenSSH's format, as `drencoder certs` writes it; `cat nodes/*.pub > roster` makes one by
hand. A node's number is the place of its key among all keys in ascending order: neither names nor the order of lines matter.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from drencoder.errors import ArtifactError, EngineError, RecipeError, SecureError
from drencoder.reading import read_bytes, reason
from drencoder.recipe.recipe import Recipe
from drencoder.secure_aggregation.crypto import NodeKey, public_key_bytes

_MOST_BYTES = 1 << 24  # of a file of keys


def is_secure(recipe: Recipe) -> bool:
    """Whether its rounds need a roster."""
    return recipe.privacy.trust == "secure-aggregation"


@final
@dataclass(frozen=True)
class Roster:
    """All nodes' public keys, 49 bytes each, ascending."""

    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> "Roster":
        return cls(tuple(sorted(keys)))

    @classmethod
    def read(cls, path: Path) -> "Roster":
        """Raises ArtifactError for a file that is not there, or a line that is not a P-384 public key, or comes twice."""
        try:
            lines = read_bytes(path, _MOST_BYTES).splitlines()
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"secure aggregation needs the public keys of all nodes, and {path} cannot be read ({reason(error)}): give "
                "--roster the file that drencoder certs wrote, by a way that the server cannot change."
            ) from None
        keys = set()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                key = public_key_bytes(line)
            except SecureError:
                raise ArtifactError(
                    f"{path}, line {number} is not a P-384 public key: make the file with cat nodes/*.pub."
                ) from None
            if key in keys:
                raise ArtifactError(f"{path}, line {number} is the key of another line too: every node has its own.")
            keys.add(key)
        return cls.of(keys)

    def check(self, recipe: Recipe, where: str) -> None:
        """Raises RecipeError unless the recipe counts as many nodes as there are keys."""
        if len(self.keys) != recipe.federation.nodes:
            raise RecipeError(
                f"federation.nodes = {recipe.federation.nodes} in the recipe and {where} has {len(self.keys)} keys: under secure "
                "aggregation every node has one, so make the two numbers the same."
            )

    @property
    def digest(self) -> str:
        """SHA-256 in hex: what server and site compare before a round."""
        return hashlib.sha256(b"".join(self.keys)).hexdigest()


def named_keys(recipe: Recipe, nodes: Mapping[str, bytes]) -> dict[str, bytes]:
    """The server's roster by node name, from public key files' contents; empty where the recipe needs none.

    Raises:
      RecipeError: there are more or fewer keys than the recipe has nodes.
      EngineError: a key is on another curve.
    """
    if not is_secure(recipe):
        return {}
    try:
        keys = {name: public_key_bytes(data) for name, data in nodes.items()}
    except SecureError as error:
        raise EngineError(f"{error} Secure aggregation signs with the nodes' keys.") from None
    Roster.of(keys.values()).check(recipe, "--nodes")
    return keys


def node_key(path: Path) -> NodeKey:
    """A node's private key file. Raises ArtifactError where there is none, SecureError where it holds something else."""
    try:
        return NodeKey.load(read_bytes(path, _MOST_BYTES))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({reason(error)}): give this site's private key.") from None
