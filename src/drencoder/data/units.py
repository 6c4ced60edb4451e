"""Units of privacy inside a site: a record, or an owner with all its records there. No torch.

A unit has a number of its own, a keyed hash of its owner's name or of its record. Everything that a run computes of a unit starts
from that number, so that it does not depend on which other units the site has, or how many. How many they are is the site's
secret; `federation.units_per_site` is what everybody takes it to be.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, final, runtime_checkable

from drencoder.data.owners import check_spellings, owner_of
from drencoder.data.sources import (
    EmbeddedSource,
    FileSource,
    Record,
    SiteSource,
    Source,
    _content_hash,
    check_usable,
    open_source,
    read_source,
)
from drencoder.errors import DataError
from drencoder.recipe.recipe import Recipe

_EMBEDDED_SITE = 1 << 32  # numbers of an embedded site's units, at most


@runtime_checkable
class SiteUnits(Protocol):
    """A source whose clients are the units of sites: `client` takes a unit's number."""

    @property
    def provenance(self) -> str: ...

    def client(self, client: int) -> list[Record]: ...

    def units(self, site: int) -> Sequence[int]:
        """The numbers of a site's units, ascending. Which and how many they are is the site's secret."""
        ...


@final
@dataclass(frozen=True)
class FileUnits:
    """A file's records as units of its sites.

    `file.owned` has the records of each unit, in hashed order; `places`: number of a unit -> its place there; `sites`: number of a
    site -> the numbers of its units, ascending.
    """

    file: FileSource
    places: Mapping[int, int]
    sites: Mapping[int, Sequence[int]]

    @property
    def provenance(self) -> str:
        return self.file.provenance

    def client(self, client: int) -> list[Record]:
        return self.file.client(self.places[client])

    def units(self, site: int) -> Sequence[int]:
        return self.sites.get(site, ())


@final
@dataclass(frozen=True)
class EmbeddedUnits:
    """Sites of the embedded world; each unit is made from its number when asked for."""

    world: EmbeddedSource
    site_units: int
    single: bool  # whether a unit is one record

    @property
    def provenance(self) -> str:
        return self.world.provenance

    def client(self, client: int) -> list[Record]:
        return self.world.client(client)[: 1 if self.single else None]

    def units(self, site: int) -> Sequence[int]:
        return range(site * _EMBEDDED_SITE, site * _EMBEDDED_SITE + self.site_units)


def everyone(source: Source, population: int) -> Sequence[int]:
    """The numbers of all clients of a source, or of the units of all its sites."""
    if not isinstance(source, SiteUnits):
        return range(population)
    return list(chain.from_iterable(source.units(site) for site in range(population)))


def file_of(source: Source) -> FileSource | None:
    """The file's records behind a source, if it has any."""
    if isinstance(source, SiteSource):
        source = source.held
    if isinstance(source, FileUnits):
        return source.file
    return source if isinstance(source, FileSource) else None


def open_text(
    recipe: Recipe, *, set_aside: float = 0.0, own: tuple[str, Sequence[int]] | None = None, count: bool = False
) -> Source:
    """The clients' text, or that of sites whose units are protected (then it is a `SiteUnits`).

    Args:
      recipe: with its population set, but for `count`.
      set_aside: the share of the owners, units or records that nobody trains on.
      own: a machine's own file in the place of `data.source`, and the clients (or sites) of the population whose text it is.
      count: takes as many clients (or sites) as the data have.

    Raises:
      DataError: as `open_source`, or a record names no site or owner where it must.
    """
    data, unit = recipe.data, recipe.privacy.unit
    population = 0 if count else recipe.federation.population
    if unit == "client":
        if own is None:
            return open_source(data, population=population, seed=recipe.seed, set_aside=set_aside)
        held = open_source(replace(data, source=own[0]), population=len(own[1]), seed=recipe.seed, at_site=True)
        return SiteSource(held, own[1])
    if data.is_embedded and own is None:
        world = open_source(data, population=population, seed=recipe.seed)
        assert isinstance(world, EmbeddedSource)
        return EmbeddedUnits(world, recipe.federation.units_per_site, unit == "record")
    return _file_units(recipe, set_aside, own, count)


def _file_units(recipe: Recipe, set_aside: float, own: tuple[str, Sequence[int]] | None, count: bool) -> FileUnits:
    data = recipe.data if own is None else replace(recipe.data, source=own[0])
    read = read_source(data, one_site=own is not None and len(own[1]) == 1)
    check_usable(read.records, data.source)
    by_site = _records_of_sites(recipe, read.records, data.source, own, count)
    owned: list[list[int]] = []
    aside: list[list[int]] = []
    places: dict[int, int] = {}
    sites: dict[int, list[int]] = {}
    for site, (label, indices) in by_site.items():
        numbers = sites.setdefault(site, [])
        for name, members in _units(recipe, read.records, indices, data.source).items():
            number = _number(recipe.seed, label, *name)
            if _number(recipe.seed, "set aside", label, *name) < set_aside * 2**63:
                aside.append(members)
                continue
            places[number] = len(owned)
            numbers.append(number)
            owned.append(members)
        numbers.sort()
    if set_aside and not aside:
        raise DataError(
            f"data.held_out_share = {set_aside} sets none of the {recipe.privacy.unit}s of {data.source} aside: raise it, or name a "
            "file that the server owns in evaluation.data."
        )
    if not owned:
        raise DataError(
            f"data.held_out_share = {set_aside} sets all {len(aside)} {recipe.privacy.unit}s of {data.source} aside: lower it, or name a "
            "file that the server owns in evaluation.data."
        )
    server = sorted(chain.from_iterable(aside), key=lambda index: _content_hash(read.records[index], recipe.seed))
    file = FileSource(
        read.provenance, read.records, owned, server, data.examples_per_client, schema=read.schema, changed=read.changed
    )
    return FileUnits(file, places, sites)


def _records_of_sites(
    recipe: Recipe, records: Sequence[Record], where: str, own: tuple[str, Sequence[int]] | None, count: bool
) -> dict[int, tuple[str, list[int]]]:
    """Number of a site -> what its units' numbers are made from, and its records. A machine's file of one site is all that site's."""
    if own is not None and len(own[1]) == 1:
        return {own[1][0]: (f"site {own[1][0]}", list(range(len(records))))}
    field = recipe.data.client_field
    if not field:
        raise DataError(
            f"privacy.unit = {recipe.privacy.unit!r} needs to know at which site a record of {where} is: name the field in "
            "data.client_field."
        )
    by_label: dict[str, list[int]] = defaultdict(list)
    for index in range(len(records)):
        by_label[owner_of(records[index], index + 1, field, "data.client_field", where)].append(index)
    check_spellings(by_label, field, where)
    labels = sorted(by_label)
    sites = range(len(labels)) if count else own[1] if own is not None else range(recipe.federation.population)
    if len(labels) > len(sites) or (own is not None and len(labels) < len(sites)):
        raise DataError(
            f"{where} names {len(labels)} sites in {field!r}, and "
            + ("this machine answers for" if own is not None else "the recipe has federation.population =")
            + f" {len(sites)}: make the two numbers the same."
        )
    return {site: (label, by_label[label]) for site, label in zip(sites, labels, strict=False)}


def _units(
    recipe: Recipe, records: Sequence[Record], indices: Sequence[int], where: str
) -> dict[tuple[str, int], list[int]]:
    """(owner or record, number of its copy) -> its records in the order of their hashes, of one site's records."""
    copies: dict[str, int] = defaultdict(int)
    named: list[tuple[str, int, int]] = []
    for index in indices:
        content = json.dumps(records[index], sort_keys=True)
        copies[content] += 1  # so that equal records differ
        named.append((content, copies[content], index))
    if recipe.privacy.unit == "record":
        return {(content, copy): [index] for content, copy, index in named}
    field = recipe.data.owner_field
    if not field:
        raise DataError(
            f"privacy.unit = 'owner' needs to know whose a record of {where} is: name the field in data.owner_field, or protect "
            "single records with privacy.unit = 'record'."
        )
    owners: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for content, copy, index in named:
        owner = owner_of(records[index], index + 1, field, "data.owner_field", where)
        owners[owner, 0].append((_number(recipe.seed, "order", content, copy), index))
    check_spellings((owner for owner, _ in owners), field, where)
    return {owner: [index for _, index in sorted(members)] for owner, members in owners.items()}


def _number(seed: int, *parts: str | int) -> int:
    """A number in [0, 2**63) that belongs to these words under one seed."""
    text = "\x1f".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 1
