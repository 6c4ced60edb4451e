"""Does anything that a run tells or leaves depend on a client's data in another way than through the noised releases?

A short run of the recipe is made several times, with noise and cohorts that are replayed. Its clients train and answer as always, and
then every message is replaced by one of zeros, so that all releases are the same whatever the clients hold. What the runs
tell (lines of the console, rows of the metrics, the certificate) and leave (every file of the run folder) must then be the same,
byte for byte, in every world of a canary client: with its own text, with an update that is not finite, with one a million times
as long, and under central trust without its answer. Where a record or an owner inside a site is protected, the canary is such a unit, which
took part in the run, and the last world is a site without it. What differs between two runs of the same world (the run's number) is left out.

This is non-interference (Goguen and Meseguer 1982, https://doi.org/10.1109/SP.1982.10014) with the release as the one declared channel.
"""

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from drencoder.audit.noise_checks import Check
from drencoder.data.sources import Record
from drencoder.data.units import SiteUnits, everyone, file_of
from drencoder.encoders.wire import pack_rows
from drencoder.federated.in_process import AlwaysThere, InProcessEngine
from drencoder.federated.query import Query
from drencoder.federated.round import SecureSum, Upload, message_wire
from drencoder.federated.site_round import SiteCurator
from drencoder.models.client_training import ClientTrainer
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource
from drencoder.recipe.recipe import Recipe
from drencoder.runs.build import Components, build
from drencoder.runs.run import run_built

_TRAINED = 4  # clients of a cohort that really train; the others send zero
# What two runs of one world do not have in common: a run's number, hashes of what has it in it, and the time of day. The digits of
# a fraction are none of these. The time must go, too: two runs that end within one second share it, and a third does not.
_CHANGING = re.compile(
    rb"[0-9a-f]{64}|(?<![.\w])[0-9a-f]{16}\b|\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?"
)
_RECORDS = 4096

WORLDS = {
    "not finite": "its update is not finite",
    "long": "its update is a million times as long",
    "absent": "it does not answer",
}


def short_recipe(recipe: Recipe) -> Recipe:
    """The recipe with two rounds, few evaluation texts and replayed noise: what a secrecy check runs."""
    return replace(
        recipe,
        federation=replace(recipe.federation, rounds=min(2, recipe.federation.rounds)),
        privacy=replace(recipe.privacy, noise="replay", noise_multiplier=0.0),
        evaluation=replace(recipe.evaluation, examples=8, every=1),
    )


def check_secrecy(recipe: Recipe) -> list[Check]:
    """One check for each world.

    Raises:
      DrencoderError: the short run cannot be made.
    """
    components = build(short_recipe(recipe))
    with tempfile.TemporaryDirectory(prefix="drencoder-audit-") as name:
        folder = Path(name)
        own, again = (_told(components, folder / run, "own") for run in ("own", "again"))
        steady = {key for key in own if own[key] == again.get(key)}
        checks = []
        unit = components.plan.unit
        who = "an owner" if unit == "owner" else f"a {unit}"
        worlds = WORLDS | ({"absent": "it is not at its site"} if components.plan.curated else {})
        for world, words in worlds.items():
            if world == "absent" and not components.plan.secret_draw:
                continue  # who answers is no secret there
            other = _told(components, folder / world.replace(" ", "-"), world)
            moved = sorted(key for key in steady | (other.keys() - own.keys()) if own.get(key) != other.get(key))
            found = f"With {who} of which {words}, {len(steady)} things that a run tells or leaves are the same."
            if moved:
                found = f"With {who} of which {words}, {moved[0]} is another: it tells something of the {unit}'s data without noise."
            checks.append(Check(f"nothing but releases depends on {who}'s data", not moved, found))
    return checks


def _told(components: Components, folder: Path, world: str) -> dict[str, bytes]:
    """What a run in this world tells and leaves, by name, without what no two runs have in common."""
    federation, units = components.recipe.federation, components.texts.source
    engine = _BlindedEngine(
        components.trainer, federation.nodes, components.recipe.threshold, world,
        units if isinstance(units, SiteUnits) else None, components.recipe.seed,
    )  # fmt: skip
    listener, screen = _Lines(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        run_built(replace(components, engine=engine), folder, listener)
    told = {"the screen": screen.getvalue(), "the console": "\n".join(listener.said)}
    seen = {name: text.encode() for name, text in told.items()}
    seen |= {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {name: _CHANGING.sub(b"", data) for name, data in seen.items()}


@final
class _Lines:
    """A listener that keeps all that it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def planned(self, overview: Any) -> None:
        self.said.append(json.dumps(overview.to_dict(), default=str))

    def say(self, text: str) -> None:
        self.said.append(text)

    def round_done(self, row: Mapping[str, Any]) -> None:
        self.said.append(json.dumps(row))

    def finished(self, certificate: Mapping[str, Any]) -> None:
        self.said.append(json.dumps(certificate))


@final
@dataclass(frozen=True)
class _CanaryWorld:
    """The run's own trainer, in which the first client of each cohort is the canary."""

    trainer: ClientTrainer
    canary: int
    world: str

    @property
    def batch_clients(self) -> int:
        return self.trainer.batch_clients

    def train_clients(self, adapter_D: Tensor, clients: Sequence[int], slot: int, epochs: int) -> Tensor:
        size = epochs * adapter_D.numel()
        rows = torch.zeros(len(clients), size)
        here = [place for place, client in enumerate(clients) if place < _TRAINED or client == self.canary]
        rows[here] = self.trainer.train_clients(adapter_D, [clients[place] for place in here], slot, epochs).cpu()
        for place, client in enumerate(clients):
            if client == self.canary and self.world == "not finite":
                rows[place] = torch.nan
            elif client == self.canary and self.world == "long":
                rows[place] *= 1e6
        return rows


@final
@dataclass
class _BlindedEngine(AlwaysThere):
    """Clients answer as always, and the server receives zeros in the place of every message."""

    trainer: ClientTrainer
    nodes: int
    threshold: int
    world: str
    units: SiteUnits | None  # of the sites, where a unit of theirs is the canary
    seed: int

    def gather(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | SecureSum]:
        """See `Engine.gather`."""
        if not cohort:
            return
        canary, curator, answering = cohort[0], None, list(cohort)
        if self.units is not None:
            canary = self._canary_unit(cohort, permit)
            there = _Without(self.units, canary) if self.world == "absent" else self.units
            curator = SiteCurator(there, _CanaryWorld(self.trainer, canary, self.world), self.seed)
        elif self.world == "absent":
            answering = answering[1:]
        trainer = _CanaryWorld(self.trainer, canary, self.world)
        engine = InProcessEngine(trainer, self.nodes, self.threshold, curator=curator)
        for answer in engine.gather(query, adapter_D, answering, permit, noise):
            if isinstance(answer, SecureSum):
                yield replace(answer, sum_V=np.zeros_like(answer.sum_V))
                continue
            wire = message_wire(query, permit)
            dtype = torch.int64 if wire.integers else torch.float32
            zeros_NK = torch.zeros(len(answer.messages), wire.code_size, dtype=dtype)
            yield replace(answer, messages=pack_rows(zeros_NK, wire, query.spec.slot))

    def _canary_unit(self, cohort: Sequence[int], permit: Permit) -> int:
        """The first unit of the first site that the replayed draw puts into the slot; -1 where it puts none."""
        assert self.units is not None
        curator = SiteCurator(self.units, self.trainer, self.seed)
        return next((unit for site in cohort for unit in curator.draw(site, permit)), -1)


@final
@dataclass(frozen=True)
class _Without:
    """Sites without one of their units."""

    whole: SiteUnits
    unit: int

    @property
    def provenance(self) -> str:
        return self.whole.provenance

    def client(self, client: int) -> list[Record]:
        return self.whole.client(client)

    def units(self, site: int) -> Sequence[int]:
        return [unit for unit in self.whole.units(site) if unit != self.unit]


# --- evaluation text ---------------------------------------------------------------------------------


def check_evaluation_text(components: Components) -> Check:
    """Whether the text that losses are measured on, one by one and without noise, is some client's."""
    name, source = "evaluation text is no client's", components.texts.source
    if components.texts.evaluation is None:
        return Check(name, True, "The recipe measures on no text.")
    measured = components.texts.evaluation(components.recipe.evaluation.examples)
    file = file_of(source)
    if file is not None and (both := set(file.server) & {one for owner in file.owned for one in owner}):
        found = f"{len(both)} records that are set aside for evaluation are clients' records, too."
        return Check(name, False, found, of_records=True)
    everybody = everyone(source, components.plan.population)
    step = max(1, len(everybody) * components.recipe.data.examples_per_client // _RECORDS)
    held = {_digest(record) for client in everybody[::step] for record in source.client(client)}
    shared = sum(_digest(record) in held for record in measured)
    found = f"{shared} of {len(measured)} evaluation texts are also a client's, word for word"
    if 2 * shared > len(measured):
        found += ": the losses in outcomes.json and in the metrics would be theirs, without noise."
        return Check(name, False, found, of_records=True)
    return Check(name, True, f"{found}{', which may be chance' if shared else ''}.", of_records=True)


def _digest(record: Mapping[str, Any]) -> int:
    return hash(tuple(str(record.get(key, "")) for key in ("instruction", "context", "response")))
