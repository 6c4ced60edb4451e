"""Canaries: clients whose update the auditor writes, which are in or out by a coin, on the run's own way from update to bytes.

Legend: N canaries, D adapter values, E epochs, K values of a message, V statistics of stage 1.

A canary takes the place of training and of nothing else. Its update goes through the engine, the encoder, the clip, the noise, the
wire and the release of the run that is audited. The worst case of the promise is an update whose code points along one
direction and fills the clip: such canaries are made here, one direction each, so that many of them fit into one release without
meeting each other. Out means the zero update, which is what a client without text sends; or, where a client is replaced, the same
direction with the other sign.

Where a record or an owner inside a site is protected, canaries are units of sites: the site's own curator draws, clips, adds up and adds noise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from drencoder.audit.overheard import Overheard
from drencoder.federated.in_process import AlwaysThere, InProcessEngine
from drencoder.federated.query import Query
from drencoder.federated.query_encoders import MomentsEncoder
from drencoder.federated.round import SecureSum, Upload
from drencoder.federated.site_round import SiteCurator
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource, clip_rows, quantiser_for
from drencoder.privacy.plan import PrivacyPlan
from drencoder.rng import derive_seed

_LONGER = 1e3  # times the clip: an encoder may shorten what it decoded, and the code must fill the clip all the same
_BATCH_VALUES = 1 << 24  # 64 MiB of float32


def draw_coins(seed: int, count: int, *indices: int) -> npt.NDArray[np.bool_]:
    """Independent fair coins (count,): who is in."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, "audit-coins", *indices))).random(count) < 0.5


def num_directions(query: Query) -> int:
    """How many crafted canaries fit into one release without meeting each other."""
    return query.spec.wire.code_size - (query.spec.adaptive_clip is not None)


def crafted_updates(query: Query, directions: Sequence[int]) -> Tensor:
    """Updates (N, E * D) whose message points along one direction each, and is longer than the clip before it is clipped.

    For a round: what the encoder decodes a unit code to. For stage 1, direction j is one LoRA tensor of one epoch with all
    its values equal, positive (even j) or negative: their statistics (sum, norm) are orthogonal.
    """
    if isinstance(query.encoder, MomentsEncoder):
        return _stage1_updates(query.encoder, directions, _LONGER * query.spec.clip_l2)
    unit_NK = torch.zeros(len(directions), query.spec.wire.code_size)
    unit_NK[torch.arange(len(directions)), torch.tensor(directions, dtype=torch.long)] = 1.0
    update_ND = functional.normalize(query.decode(unit_NK), dim=1)
    return update_ND * (_LONGER * query.spec.clip_l2)


def _stage1_updates(encoder: MomentsEncoder, directions: Sequence[int], length: float) -> Tensor:
    segments, size = encoder.segments, encoder.segments[-1].stop
    update_NX = torch.zeros(len(directions), encoder.update_size)
    for row, direction in enumerate(directions):
        epoch, place = divmod(direction // 2, len(segments))
        one, sign = segments[place], 1.0 if direction % 2 == 0 else -1.0
        update_NX[row, epoch * size + one.start : epoch * size + one.stop] = sign * length / one.size**0.5
    return update_NX


def contributions(query: Query, update_ND: Tensor) -> Tensor:
    """What these updates add to a sum of messages, without noise (N, K): anybody can compute it with the query's encoder and clip."""
    if query.spec.noise_in == "update":
        return query.encode(clip_rows(update_ND, query.spec.clip_l2).values_NV)
    return clip_rows(query.encode(update_ND), query.spec.clip_l2).values_NV


@final
@dataclass(frozen=True, eq=False)
class Planted:
    """The canaries of one release.

    Args:
      clients: their numbers; place i of every other field is about client i of these.
      coin_N: who is in.
      own_updates: (query, places) -> the updates (len(places), E * D) that these canaries send when they are in.
      answering: all clients that answer. Those that are no canaries send the zero update.
      replace_one: whether a canary that is out sends its update with the other sign, and not the zero update.
      site_of: the site of each canary, where sites curate units; the canaries' numbers are those of units then.
      secret: whether the attacker is not told whom a site drew. Then a canary that is out is no unit of its site; else those that
        were not drawn are none of the canaries of the release.
      offered: how many units the draw was among, once it was made.
    """

    clients: Sequence[int]
    coin_N: npt.NDArray[np.bool_]
    own_updates: Callable[[Query, Sequence[int]], Tensor]
    answering: Sequence[int]
    replace_one: bool = False
    site_of: Sequence[int] = ()
    secret: bool = False
    offered: int = 0

    @property
    def senders(self) -> Sequence[int]:
        """Who sends the message that each canary is in."""
        return self.site_of or self.clients

    def drawn(self, units: Sequence[int]) -> "Planted":
        """Those of the canaries that a draw put into the release."""
        joined = set(units)
        kept = [place for place, unit in enumerate(self.clients) if unit in joined]
        return replace(
            self,
            clients=[self.clients[place] for place in kept],
            coin_N=self.coin_N[kept],
            own_updates=lambda query, places: self.own_updates(query, [kept[place] for place in places]),
            site_of=[self.site_of[place] for place in kept],
            offered=len(self.clients),
        )

    def signs(self, places: Sequence[int]) -> Tensor:
        """By what each canary's own update is multiplied (n,): 1 in, 0 or -1 out."""
        out = -1.0 if self.replace_one else 0.0
        return torch.tensor([1.0 if self.coin_N[place] else out for place in places])


def crafted(
    clients: Sequence[int],
    coin_N: npt.NDArray[np.bool_],
    answering: Sequence[int],
    *,
    replace_one: bool = False,
    directions: Sequence[int] = (),
    site_of: Sequence[int] = (),
    secret: bool = False,
) -> Planted:
    """Worst-case canaries: client i has direction i, or `directions[i]`."""
    along = directions or range(len(clients))

    def own_updates(query: Query, places: Sequence[int]) -> Tensor:
        return crafted_updates(query, [along[place] for place in places])

    return Planted(clients, coin_N, own_updates, answering, replace_one, site_of, secret)


def spread_over_sites(count: int, sites: Sequence[int]) -> list[int]:
    """The site of each of `count` canaries: 1 at the first site, 3 at the second, 5 at the third, and so on, again from the first.

    Sites of many sizes show whether a size decides about anything.
    """
    return [sites[math.isqrt(place) % len(sites)] for place in range(count)]


def record_canaries(
    plan: PrivacyPlan,
    cohort: Sequence[int],
    update_ND: Tensor,
    coin_N: npt.NDArray[np.bool_],
    *,
    everybody_answers: bool,
    alone: bool = True,
) -> Planted:
    """Updates (N, D) of real records as canaries: as many as the cohort has clients for.

    Where sites curate, a canary is a unit, and its number is its row; `alone`: each is the only one of its site.
    """
    rows = list(range(len(update_ND)))
    if plan.curated:
        rows = rows[: len(cohort)] if alone else rows
        homes = [cohort[row % len(cohort)] for row in rows]
        return Planted(rows, coin_N[rows], lambda _query, places: update_ND[list(places)], cohort, site_of=homes)
    clients = cohort[: len(rows)]
    answering = cohort if everybody_answers else clients
    return Planted(clients, coin_N[: len(clients)], lambda _query, places: update_ND[list(places)], answering)


Plant = Callable[[Query, Sequence[int], Permit], Planted]
"""(query, cohort, permit) -> who of the cohort is a canary, and what it sends."""


@final
@dataclass(frozen=True, eq=False)
class _CanaryTrainer:
    """A `ClientTrainer` that gives canaries their update and everybody else zero."""

    planted: Planted
    query: Query
    update_size: int
    asked: list[int] = field(default_factory=list)

    @property
    def batch_clients(self) -> int:
        return max(1, min(256, _BATCH_VALUES // max(1, self.update_size)))

    def train_clients(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        self.asked.extend(clients)
        place_of = {client: place for place, client in enumerate(self.planted.clients)}
        rows = [row for row, client in enumerate(clients) if client in place_of]
        update_NX = torch.zeros(len(clients), epochs * self.update_size)
        if rows:
            places = [place_of[clients[row]] for row in rows]
            update_NX[rows] = self.planted.own_updates(self.query, places) * self.planted.signs(places)[:, None]
        return update_NX


@final
@dataclass(frozen=True)
class _CanaryUnits:
    """Sites (a `SiteUnits`) whose units are the canaries."""

    planted: Planted
    provenance: str = "canaries"

    def client(self, client: int) -> list[dict[str, Any]]:
        """Their updates are written, so they need no records."""
        return []

    def units(self, site: int) -> Sequence[int]:
        there_N = self.planted.coin_N | (not self.planted.secret)
        places = zip(self.planted.clients, self.planted.site_of, there_N, strict=True)
        return sorted(unit for unit, home, there in places if home == site and there)


@final
@dataclass
class CanaryEngine(AlwaysThere):
    """The in-process engine with canaries in the place of training; keeps what passed it, which is what the server sees.

    `curated`: whether sites draw among their units. Then `planted` has those of the canaries that were drawn, unless the draw is secret;
    `joined` has them in any case. Under secure aggregation `heard` has what the last site added to the sum, which is another site's
    own share of noise; or, where nobody was planted, the shares of all contributors.
    """

    plant: Plant
    nodes: int
    threshold: int
    curated: bool = False
    planted: Planted | None = None
    seen: list[Upload | SecureSum] = field(default_factory=list)
    joined: Sequence[int] = ()
    heard: Overheard | None = None

    def gather(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | SecureSum]:
        """See `Engine.gather`."""
        self.planted, self.seen = self.plant(query, cohort, permit), []
        trainer = _CanaryTrainer(self.planted, query, adapter_D.numel())
        curator = SiteCurator(_CanaryUnits(self.planted), trainer, 0) if self.curated else None
        engine = InProcessEngine(trainer, self.nodes, self.threshold, curator=curator)
        nobody = not self.planted.clients
        self.heard = None
        if permit.shares is not None and (self.curated or nobody):
            quantiser = quantiser_for(permit, query.spec.wire.code_size, query.spec.clip_l2)
            self.heard = Overheard(noise, quantiser, None if nobody else cohort[-1])
        for answer in engine.gather(query, adapter_D, self.planted.answering, permit, self.heard or noise):
            self.seen.append(answer)
            if self.heard is not None:
                self.heard.finish()
            yield answer
        self.joined = tuple(trainer.asked)
        if self.curated and not self.planted.secret:
            self.planted = self.planted.drawn(trainer.asked)
