"""The arms of an audit: one method each, run through the package's own protocol.

Legend: N clients, D adapter values, K values of a message.

An arm (as in a trial) is an encoder, a place for the noise and a noise multiplier. `Channel` asks the real query for its messages or its
release, against a permit of a real ledger in a temporary folder; noise is replayable, so that an audit can be repeated.
Nothing here clips, noises or encodes by itself: what is audited is what runs.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.encoders.wire import unpack_rows
from drencoder.federated.query import Query, update_query
from drencoder.federated.round import client_message, code_values, message_wire, server_release
from drencoder.privacy.accounting import NonPrivateEvent, Relation, gdp_mu
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import NoiseSource, Release, clip_rows
from drencoder.privacy.noise_source import ReplayNoise
from drencoder.privacy.plan import PrivacyPlan, Trust
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe
from drencoder.rng import derive_seed

_UNCLIPPED = 1e6  # an un-protected update travels as it is


@final
@dataclass(frozen=True)
class Arm:
    """One method in the audit.

    Args:
      name: what the table calls it.
      sees: what the attacker has, in words.
      encoder: the map from updates to codes.
      noise_in: `code` or `update` (as published).
      noise_multiplier: noise std / clip that runs; 0 = no clip and no noise.
      promised: the multiplier that the accounting was told; another one only where the audit sabotages itself.
      trust: who adds the noise.
    """

    name: str
    sees: str
    encoder: Encoder
    noise_in: str = "code"
    noise_multiplier: float = 0.0
    promised: float | None = None
    trust: Trust = "local"

    @property
    def fresh(self) -> bool:
        """Whether every round has a map of its own."""
        return isinstance(self.encoder, RandomSketch)

    @property
    def sabotaged(self) -> bool:
        """Whether the audit runs this arm with other noise than the accounting was told."""
        return self.promised is not None and self.promised != self.noise_multiplier

    def query(self, recipe: Recipe, slot: int) -> Query:
        """Returns stage 2's own query of round `slot`, with this arm's encoder and clip."""
        privacy = config.Privacy(
            trust=self.trust,
            noise_in=self.noise_in,
            noise="replay",
            clip_l2=recipe.privacy.clip_l2 if self._noisy else _UNCLIPPED,
        )
        return update_query(self.encoder, Recipe(seed=recipe.seed, privacy=privacy), slot)

    def plan(self, clients: int, rounds: int) -> PrivacyPlan:
        """Returns a plan that asks all of `clients` in each of `rounds`, with this arm's noise."""
        return audit_plan(
            self.trust, clients, rounds, self.noise_multiplier and (self.promised or self.noise_multiplier)
        )

    @property
    def noise_share(self) -> float:
        """What share of the noise that its plan charges this arm really adds; below 1 where the audit sabotages itself."""
        return self.noise_multiplier / self.promised if self.promised and self.noise_multiplier else 1.0

    def max_mu(self, relation: Relation, contributors: int = 1) -> float | None:
        """Returns the mu that the accounting promises for one release; None without a promise.

        Local trust: a sum hides each client behind the noise of `contributors` clients.
        """
        sigma = self.noise_multiplier if self.promised is None else self.promised
        if not sigma:
            return None
        plan = audit_plan(self.trust, 1, 1, sigma * (contributors**0.5 if self.trust == "local" else 1.0))
        return bound_mu(plan, relation)

    @property
    def _noisy(self) -> bool:
        # A sabotaged arm without noise still clips: the fault is in the noise alone.
        return bool(self.noise_multiplier) or self.sabotaged


def audit_plan(trust: Trust, clients: int, rounds: int, sigma: float | None, *, stage1: bool = False) -> PrivacyPlan:
    """Returns a plan with all clients in every slot and exact Gaussian accounting. `sigma` None is a plan without noise."""
    return make_plan(
        trust=trust,
        population=clients,
        sampling_rate=1.0,
        rounds=rounds,
        stage1_rate=1.0 if stage1 else 0.0,
        delta=0.1 / clients,
        noise_multiplier=sigma or None,
        participation_cap=rounds + stage1,
        noise="replay",
        non_private=() if sigma else ("stage1", "round"),
    )


def bound_mu(plan: PrivacyPlan, relation: Relation, slot: int = 1) -> float | None:
    """Returns the exact mu of one release of `slot`; None where the plan promises nothing."""
    event = plan.event(slot)
    return None if isinstance(event, NonPrivateEvent) else gdp_mu((event,), relation)


def expected_messages(query: Query, update_ND: Tensor) -> Tensor:
    """Returns what clients would send without the noise, (N, K). Anybody can compute it with the query's encoder and clip."""
    if query.spec.noise_in == "update":
        return query.encode(clip_rows(update_ND, query.spec.clip_l2).values_NV)
    return clip_rows(query.encode(update_ND), query.spec.clip_l2).values_NV


@final
@dataclass(frozen=True)
class Channel:
    """An open ledger and its noise, which turn updates into messages and releases, slot by slot."""

    ledger: Ledger
    noise: NoiseSource
    noise_share: float = 1.0

    def charge(self, slot: int) -> Permit:
        """Returns the permit of a slot; with a `noise_share` below 1, one for too little noise."""
        permit = self.ledger.charge(slot)
        if permit.terms is not None and self.noise_share != 1:
            permit.terms = replace(permit.terms, multiplier=permit.terms.multiplier * self.noise_share)
        return permit

    def messages(self, query: Query, update_ND: Tensor) -> Tensor:
        """Returns what the server sees under local trust, (N, K): the messages of clients 0..N-1, unpacked from their bytes."""
        permit = self.charge(query.spec.slot)
        upload = client_message(query, update_ND, range(len(update_ND)), permit, self.noise)
        rows = unpack_rows(upload.messages, message_wire(query, permit), query.spec.slot)
        return code_values(query, permit, rows.code_NK)

    def release(self, query: Query, update_ND: Tensor, cohort: list[int]) -> tuple[Release, Permit]:
        """Returns what leaves the server: the released sum over `cohort`; row i of `update_ND` is client i's."""
        permit = self.charge(query.spec.slot)
        upload = client_message(query, update_ND[cohort], cohort, permit, self.noise)
        return server_release(query, [upload], permit, self.noise).release, permit


@contextlib.contextmanager
def open_channel(plan: PrivacyPlan, seed: int, noise_share: float = 1.0) -> Iterator[Channel]:
    """Opens a ledger of this plan in a temporary folder, with the replayable noise of `seed`."""
    key = hashlib.sha256(f"audit/{seed}".encode()).digest()
    with (
        tempfile.TemporaryDirectory(prefix="drencoder-audit-") as folder,
        Ledger.create(Path(folder) / "ledger.jsonl", plan, key=key) as ledger,
    ):
        yield Channel(ledger, ReplayNoise(derive_seed(seed, "audit-noise")), noise_share)
