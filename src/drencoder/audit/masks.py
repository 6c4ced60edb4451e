"""Secure aggregation: does a node's masked vector hide what is in it, from a server that keeps every message?

Legend: n nodes, V values of b bits.

The real protocol runs twice between n nodes in memory, with the same long-term keys, the same round and the same vectors. What the server
receives is kept, and the server does what it can: it takes off the masks whose seeds the nodes reveal in the last step. What is
left of each vector must be uniform modulo 2^b; so must be the difference between the two runs, in which the vectors cancel; and no key
and no seed may come twice. Each test has a chance of a false alarm of one in a million.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from drencoder.audit.noise_checks import Check
from drencoder.federated.secure_round import secure_node, secure_sum
from drencoder.secure_aggregation.client import SEED_SHARE, derive_own_mask_key
from drencoder.secure_aggregation.crypto import SECRET_BYTES, NodeKey, apply_mask
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings, unpack_rows, unpack_values
from drencoder.secure_aggregation.shamir import SHARE_BYTES, combine

Residues = npt.NDArray[np.uint32]

_ALARM = 1e-6
_CELLS = 16


class _Server:
    """What the server holds of one round at its end."""

    def __init__(self, settings: RoundSettings, keys: Sequence[NodeKey], vectors: Sequence[Residues]) -> None:
        self.keys: list[bytes] = []  # two of each node
        self.masked: dict[int, Residues] = {}
        self._revealed: dict[int, dict[int, bytes]] = defaultdict(dict)
        self._settings = settings
        on_nodes = [range(count) for count in settings.clients]
        parties = [secure_node(settings, node, key, on_nodes[node], vectors[node]) for node, key in enumerate(keys)]

        def exchange(step: ProtocolStep, requests: Mapping[int, bytes]) -> dict[int, bytes]:
            answers = {node: parties[node].answer(step, request) for node, request in requests.items()}
            for node, answer in answers.items():
                self._keep(step, node, settings.parse_answer(answer, step, node))
            return answers

        secure_sum(settings, on_nodes, exchange)
        self.seeds = {
            owner: combine(dict(list(shares.items())[: settings.threshold])) for owner, shares in self._revealed.items()
        }

    def _keep(self, step: ProtocolStep, node: int, body: bytes) -> None:
        if step == ProtocolStep.ADVERTISE:
            self.keys += [body[:SECRET_BYTES], body[SECRET_BYTES : 2 * SECRET_BYTES]]
        elif step == ProtocolStep.MASK:
            self.masked[node] = unpack_values(body, self._settings.values, self._settings.bits)
        elif step == ProtocolStep.UNMASK:
            for owner, row in unpack_rows(body, 1 + SHARE_BYTES, self._settings.nodes).items():
                if row[:1] == SEED_SHARE:
                    self._revealed[owner][node + 1] = row[1:]

    def under_pair_masks(self, node: int) -> Residues:
        """A node's vector without the mask whose seed the server learns."""
        total_V = self.masked[node].copy()
        apply_mask(total_V, derive_own_mask_key(self._settings, node, self.seeds[node]), -1)
        return total_V


def check_masks(settings: RoundSettings, keys: Sequence[NodeKey], vectors: Sequence[Residues]) -> list[Check]:
    """Runs the round of `settings` twice. `vectors[node]` is what a node adds up, (V,) uint32 modulo 2^b."""
    first, second = (_Server(settings, keys, vectors) for _ in range(2))
    secrets = [*first.keys, *second.keys, *first.seeds.values(), *second.seeds.values()]
    fresh = len(set(secrets)) == len(secrets)
    alike = (
        "every key and seed of two rounds is another"
        if fresh
        else "a key or a seed of two rounds is the same, so that masks can be computed"
    )
    checks = [Check("keys and seeds of masks are fresh", fresh, f"Of {len(secrets)} secrets {alike}.")]
    modulus = np.uint32((1 << settings.bits) - 1)
    hidden = {
        "a masked vector is uniform": [(first.masked[node] - vectors[node]) & modulus for node in settings.nodes],
        "it is uniform without the masks that the server learns": [
            (first.under_pair_masks(node) - vectors[node]) & modulus for node in settings.nodes
        ],
        "its masks are others in another round": [
            (first.under_pair_masks(node) - second.under_pair_masks(node)) & modulus for node in settings.nodes
        ],
    }
    for name, masks in hidden.items():
        least = min(_chance_of_uniform(mask_V, settings.bits) for mask_V in masks)
        passed = least > _ALARM / (len(hidden) * len(masks))
        found = "uniform" if passed else "not uniform: whoever sees it learns something of what a node added up"
        checks.append(
            Check(
                name, passed, f"What hides a node's vector is {found} ({settings.values:,} values, {len(masks)} nodes)."
            )
        )
    return checks


def _chance_of_uniform(mask_V: Residues, bits: int) -> float:
    """Pearson's chi-square of the highest and of the lowest four bits; the smaller chance."""
    from scipy.stats import chisquare

    parts = (mask_V >> np.uint32(bits - 4)) & np.uint32(_CELLS - 1), mask_V & np.uint32(_CELLS - 1)
    return min(float(chisquare(np.bincount(part, minlength=_CELLS)).pvalue) for part in parts)
