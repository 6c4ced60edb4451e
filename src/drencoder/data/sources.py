"""Who owns which text: the clients' records.

Whatever their file's schema, records have `instruction`, `context`, `response` and `category` (`schemas`). A source answers for
one client at a time, so that ten thousand embedded clients cost nothing until they are asked.
"""

import hashlib
import heapq
import json
import math
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Protocol, final

from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import World
from drencoder.data.owners import check_spellings, owner_of
from drencoder.data.places import Place, read_data
from drencoder.data.schemas import Record
from drencoder.errors import DataError
from drencoder.reading import shown
from drencoder.recipe import sections
from drencoder.rng import derive_seed

CONCENTRATION = 0.5
"""Of the Dirichlet draw that spreads categories over simulated clients: these differ much, as in the published experiments."""


class Source(Protocol):
    """Where text comes from. Nothing here leaves a client: the engine hands records to local training only."""

    @property
    def provenance(self) -> str:
        """One line for the certificate: which data, and who made it."""
        ...

    def client(self, client: int) -> list[Record]:
        """The records that one client owns."""
        ...


def open_source(
    knobs: sections.Data, *, population: int, seed: int, set_aside: float = 0.0, at_site: bool = False
) -> Source:
    """Opens the recipe's data, which `population` clients own; 0 = as many as the data have.

    `set_aside` is the share of the owners (or of the records, where owners are simulated) that no client gets. `at_site`: the
    population is that of one site.

    Raises:
      DataError: a file is missing, unreadable, empty or ill-shaped, or some client would own nothing.
    """
    kind = knobs.source.partition(":")[0]
    if kind == "embedded":
        return EmbeddedSource(knobs, seed, embedded_task(knobs.source, "data.source"))
    read = read_source(knobs)
    source = FileSource.split(
        read.records, knobs, population=population, seed=seed, set_aside=set_aside, at_site=at_site
    )
    return replace(source, provenance=read.provenance, schema=read.schema, changed=read.changed)


@dataclass(frozen=True)
class ReadSource:
    """What `data.source` holds, before anybody owns it; `schema` and `changed` are what `Records` says."""

    records: Sequence[Record]
    provenance: str
    schema: str
    changed: int


def read_source(knobs: sections.Data, *, one_site: bool = False) -> ReadSource:
    """Reads `data.source`, which is no embedded world. Of a file of `one_site`, `client_field` is not looked at.

    Raises:
      DataError: it is missing, unreadable, empty or ill-shaped, or a record names nobody in `owner_field`, whatever the unit of privacy: all
        commands read a file alike, and a plan counts the owners.
    """
    owners = {knobs.owner_field: "data.owner_field"}
    if not one_site:
        owners[knobs.client_field] = "data.client_field"
    owners.pop("", None)
    read = read_data(knobs.source, knob="data.source", fields=dict(knobs.fields), owners=owners)
    if knobs.owner_field:
        for number, record in enumerate(read.records, start=1):
            owner_of(record, number, knobs.owner_field, "data.owner_field", knobs.source)
    return ReadSource(read.records, provenance_of(knobs), read.schema, read.changed)


def provenance_of(knobs: sections.Data) -> str:
    """One line for the certificate: which data, and who made it."""
    if knobs.is_embedded:
        return EmbeddedSource.provenance
    place = Place.parse(knobs.source)
    return f"{place.kind}:{place.name}, split {place.clients_split}" if place.kind in TAXONOMIES else knobs.source


def check_usable(records: Sequence[Record], where: str) -> None:
    """Raises DataError unless some record has a response."""
    if not any(record["response"].strip() for record in records):
        raise DataError(
            f"{where} has no usable text: all {len(records)} responses are empty. Fill them, or give another file."
        )


def embedded_task(source: str, knob: str) -> str:
    """What embedded clients teach, after the colon of `embedded:TASK`; `knob` is named in the DataError for any other task."""
    name = source.partition(":")[2]
    if name not in ("", "letters", "next", "facts"):
        raise DataError(f"{knob} = {shown(source)} is not there: write embedded, embedded:next or embedded:facts.")
    return name or "letters"


@final
@dataclass(frozen=True)
class EmbeddedSource:
    """The generated world of this package; each client is made from its number when asked for."""

    knobs: sections.Data
    seed: int
    task: str = "letters"

    provenance = "embedded world, generated by drencoder"

    @cached_property
    def _world(self) -> World:
        return World(1 if self.task == "facts" else 0)  # the base model knows the facts of world 0

    def client(self, client: int) -> list[Record]:
        return self._world.client_records(
            client,
            count=self.knobs.examples_per_client,
            alpha=CONCENTRATION,
            seed=derive_seed(self.seed, "clients"),
            task=self.task,
        )

    def held_out(self, count: int) -> list[Record]:
        """`count` records generated for the server; no client has any of them."""
        return self._world.held_out_records(count, seed=derive_seed(self.seed, "held-out"), task=self.task)


@final
@dataclass(frozen=True)
class FileSource:
    """Records of a file or a hub data set, split over the clients once and for all by the run's seed.

    `records` by number; `owned`: client -> numbers of its records; `server`: numbers of the records that no client has.
    `schema` and `changed` are what `Records` says of them.
    """

    provenance: str
    records: Sequence[Record]
    owned: Sequence[Sequence[int]]
    server: Sequence[int]
    examples_per_client: int
    schema: str = ""
    changed: int = 0

    @classmethod
    def split(
        cls,
        records: Sequence[Record],
        knobs: sections.Data,
        *,
        population: int,
        seed: int,
        set_aside: float = 0.0,
        at_site: bool = False,
    ) -> "FileSource":
        """Sets aside what no client gets, then gives every other record an owner.

        With `client_field` the owners are the file's own. An owner is set aside with all its records, or not at all, by a keyed
        hash of its name. Which of an owner's records are used, and in which order, follows from a keyed hash of owner and
        record. So no other owner's record matters.

        Otherwise records are set aside by a keyed hash, equal ones together. Then the owners are simulated: each category is
        spread over the clients by a Dirichlet(0.5) draw (Hsu, Qi and Brown 2019, https://arxiv.org/abs/1909.06335), which
        depends on all records; then nobody's share is nothing (`_give_to_the_empty`). A `population` of 0 is as many clients as
        the file names, or, simulated, as many as `examples_per_client` records each make.
        """
        check_usable(records, knobs.source)
        if knobs.client_field:
            owned, others = _split_by_owner(records, knobs.client_field, set_aside, seed, knobs.source)
            if at_site and len(owned) != population:
                raise DataError(
                    f"{knobs.source} names {len(owned)} owners in {knobs.client_field!r}, and this site answers for {population} "
                    "clients: give --clients one number for each owner, as the server's list has them."
                )
            _check_owners(knobs, len(owned), len(others), population or len(owned), set_aside)
            owned += [[] for _ in range(max(0, population - len(owned)))]  # N may count them, who then contribute zero
            server = sorted(chain.from_iterable(others), key=lambda index: _content_hash(records[index], seed))
            return cls(knobs.source, records, owned, server, knobs.examples_per_client)
        server, rest = _split_by_record(records, set_aside, seed)
        if not rest:
            raise DataError(
                f"all {len(records)} records of {knobs.source} are set aside for evaluation, equal ones together, and no client has any: give "
                "more records, or name text that the server owns in evaluation.data."
            )
        chance = random.Random(derive_seed(seed, "split"))
        chance.shuffle(rest)
        population = population or max(1, len(rest) // knobs.examples_per_client)
        if len(rest) < population:
            raise DataError(
                f"{population - len(rest)} of {population} simulated clients would own none of the {len(rest)} records of "
                f"{knobs.source}: lower federation.population to {len(rest)} or less, or leave it out."
            )
        owned = _split_by_category(records, rest, population, CONCENTRATION, chance)
        _give_to_the_empty(owned)
        return cls(knobs.source, records, owned, server, knobs.examples_per_client)

    def client(self, client: int) -> list[Record]:
        return [self.records[index] for index in self.owned[client][: self.examples_per_client]]

    def held_out(self, count: int) -> list[Record]:
        """At most `count` of the records that no client has."""
        return [self.records[index] for index in self.server[:count]]


@final
@dataclass(frozen=True)
class SiteSource:
    """A site's own text under the numbers that its clients have in the whole population, in ascending order."""

    held: Source
    clients: Sequence[int]

    @property
    def provenance(self) -> str:
        return self.held.provenance

    def client(self, client: int) -> list[Record]:
        place = bisect_left(self.clients, client)  # a site may have a million
        if place == len(self.clients) or self.clients[place] != client:
            raise DataError(f"client {client} is none of this site's.")
        return self.held.client(place)


@final
@dataclass(frozen=True)
class AbsentSource:
    """The clients' text of a federation as its server has it: not at all."""

    provenance = "the clients' own text, which stays at their sites"

    def client(self, client: int) -> list[Record]:
        """Raises DataError: the text is at the sites."""
        raise DataError(f"client {client} and its text are at a site: the server has no client's text.")


def in_hashed_order(records: Sequence[Record], seed: int) -> list[Record]:
    """The records in an order that a keyed hash of each gives, whatever order they came in."""
    return sorted(records, key=lambda record: _content_hash(record, seed))


def _split_by_owner(
    records: Sequence[Record], field: str, set_aside: float, seed: int, where: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Each client's record numbers in the order of their hashes, clients by name; and those of the owners who are no clients."""
    owners: dict[str, list[tuple[float, int]]] = defaultdict(list)
    copies: dict[str, int] = defaultdict(int)
    for index, record in enumerate(records):
        owner = owner_of(record, index + 1, field, "data.client_field", where)
        content = json.dumps(record, sort_keys=True)  # the owner's name is in it
        copies[content] += 1  # so that an owner's equal records differ
        owners[owner].append((_hash_to_unit(seed, content, copies[content]), index))
    check_spellings(owners, field, where)
    owned: list[list[int]] = []
    others: list[list[int]] = []
    for name in sorted(owners):
        part = others if _hash_to_unit(seed, f"owner {name}", 0) < set_aside else owned
        part.append([index for _, index in sorted(owners[name])])
    return owned, others


def _check_owners(knobs: sections.Data, clients: int, others: int, population: int, set_aside: float) -> None:
    """Raises DataError unless the file has as many clients as the recipe says, and somebody is set aside where that is asked, but not all."""
    if not clients:
        raise DataError(
            f"data.held_out_share = {set_aside} sets all {others} owners of {knobs.source} aside, and no client is left: lower it, or "
            "name a file that the server owns in evaluation.data."
        )
    if set_aside and not others:
        raise DataError(
            f"data.held_out_share = {set_aside} sets none of the {clients} owners of {knobs.source} aside: raise it, or name a "
            "file that the server owns in evaluation.data."
        )
    if population not in (clients, clients + others):
        rest = f", not counting {others} whom data.held_out_share sets aside" if set_aside else ""
        raise DataError(
            f"{knobs.source} names {clients} clients in {knobs.client_field!r}{rest}, the recipe {population}: set "
            f"federation.population={clients}."
        )


def _split_by_record(records: Sequence[Record], set_aside: float, seed: int) -> tuple[list[int], list[int]]:
    """Record numbers that are set aside, in the order of their hashes, and the others. At least one where some are asked for."""
    places = [_content_hash(record, seed) for record in records]
    bound = max(set_aside, math.nextafter(min(places), 1)) if set_aside else 0.0
    server = sorted((place, index) for index, place in enumerate(places) if place < bound)
    return [index for _, index in server], [index for index, place in enumerate(places) if place >= bound]


def _content_hash(record: Record, seed: int) -> float:
    return _hash_to_unit(seed, json.dumps(record, sort_keys=True), 0)


def _hash_to_unit(seed: int, content: str, copy: int) -> float:
    """A number in [0, 1) that belongs to one record under one seed."""
    digest = hashlib.blake2b(f"{copy}\x1f{content}".encode(), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _split_by_category(
    records: Sequence[Record], indices: Sequence[int], population: int, alpha: float, chance: random.Random
) -> list[list[int]]:
    categories: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        categories[records[index]["category"]].append(index)
    owned: list[list[int]] = [[] for _ in range(population)]
    for name in sorted(categories):
        shares = [chance.gammavariate(alpha, 1.0) + 1e-300 for _ in range(population)]
        for index, client in zip(
            categories[name], chance.choices(range(population), shares, k=len(categories[name])), strict=True
        ):
            owned[client].append(index)
    return owned


def _give_to_the_empty(owned: list[list[int]]) -> None:
    """Gives each simulated client without a record the last one of whoever has most at that moment, the first of equals."""
    most = [(-len(indices), client) for client, indices in enumerate(owned)]
    heapq.heapify(most)
    for indices in owned:
        if not indices:
            count, donor = most[0]
            indices.append(owned[donor].pop())
            heapq.heapreplace(most, (count + 1, donor))
