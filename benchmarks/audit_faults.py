"""Broken mechanisms, one at a time, and what `drencoder audit` says about each.

    python benchmarks/audit_faults.py [--canaries 400] [--only WORDS] [--json FILE] [--markdown FILE]

Each fault is put into the running program at a seam that is there whatever the mechanism looks like inside: a message after it is
made, a released sum, a site's sum and draw, the source of the noise, the masks, the text that losses are measured on. Exits with 1 if a fault goes unnoticed, or
if an audit without a fault finds one.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from audit_parts.sites_and_shares import (
    adding_to_nothing,
    cancelling,
    divided,
    draw_of,
    every_round,
    half_of_the_messages,
    patched,
    shares,
    site_sums,
    told_number,
)

from drencoder.audit import audit as whole_audit
from drencoder.audit import canaries, trials
from drencoder.data.sources import EmbeddedSource
from drencoder.encoders.planning import load_checked_recipe
from drencoder.encoders.wire import pack_rows, unpack_rows
from drencoder.federated import client_side
from drencoder.federated import round as one_round
from drencoder.privacy.mechanism import quantiser_for
from drencoder.privacy.noise_source import ReplayNoise
from drencoder.privacy.sampling import UnitSampler
from drencoder.recipe.recipe import Recipe
from drencoder.runs import asking, run, stage1
from drencoder.runs.build import Components
from drencoder.secure_aggregation import client as secure_client
from drencoder.secure_aggregation import server as secure_server

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(what is published, the same without noise) -> what is published by the broken program."""


QUICK = [
    "adapter.rank=2", "adapter.targets=['layers.0.self_attn.q_proj', 'layers.0.self_attn.v_proj']", "encoder.ratio=4",
    "prior.source=none", "federation.population=1000", "federation.sampling_rate=0.4", "federation.rounds=1", "evaluation.examples=64",
]  # fmt: skip


SITES = [
    "federation.population=8", "federation.nodes=8", "federation.sampling_rate=0.3", "federation.rounds=2", "federation.units_per_site=40",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What is broken, under which trust and of which unit it shows, how it is put in, whether it needs the part of an audit that trains, and
    what else the recipe must say for it to show."""

    breaks: str
    trust: str
    plant: Callable[[], contextlib.AbstractContextManager[Any]]
    records: bool = False
    unit: str = "client"
    settings: tuple[str, ...] = ()


def messages(change: Change) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Local trust: every message is changed after it was noised."""
    original = client_side.client_message

    def broken(query: Any, update_ND: torch.Tensor, clients: Sequence[int], permit: Any, noise: Any) -> Any:
        upload = original(query, update_ND, clients, permit, noise)
        wire, slot = one_round.message_wire(query, permit), query.spec.slot
        noised = one_round.code_values(query, permit, unpack_rows(upload.messages, wire, slot).code_NK)
        changed = change(noised, canaries.contributions(query, update_ND)).double()
        if wire.integers:
            changed = (changed / quantiser_for(permit, wire.code_size, query.spec.clip_l2).step).round().long()
        return replace(upload, messages=pack_rows(changed if wire.integers else changed.float(), wire, slot))

    return lambda: patched((client_side, "client_message", broken))


def sums(change: Change) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A server that is trusted: the released sum is changed after it was noised."""
    original = asking.server_release

    def broken(query: Any, answers: Any, permit: Any, noise: Any) -> Any:
        kept = list(answers)
        result = original(query, kept, permit, noise)
        rows = [unpack_rows(upload.messages, query.spec.wire, query.spec.slot).code_NK for upload in kept]
        clean = torch.cat(rows).sum(0) if rows else torch.zeros_like(result.release.value)
        object.__setattr__(result.release, "value", change(result.release.value, clean).float())
        return result

    return lambda: patched((asking, "server_release", broken))


def bare_value(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return torch.cat([noised[..., :-1], clean[..., -1:].to(noised.dtype)], dim=-1)


def two_thirds(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return clean + (noised - clean) * 2 / 3


def shared(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return clean + (noised - clean)[:1]


def cancelled(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return clean + adding_to_nothing((noised - clean).double())


def long_clip(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return noised + clean  # twice as long as the clip


class FixedNoise(ReplayNoise):
    """Noise of a constant seed that calls itself secure."""

    kind = "secure"


def fixed_seed() -> contextlib.AbstractContextManager[Any]:
    return patched((Components, "noise", lambda _self: FixedNoise(0)))


def realised_cohort() -> contextlib.AbstractContextManager[Any]:
    original, came = one_round.released_update, [1.0]
    release = asking.server_release

    def counting(query: Any, answers: Any, permit: Any, noise: Any) -> Any:
        kept = list(answers)
        came[0] = float(sum(len(upload.clients) for upload in kept))
        return release(query, kept, permit, noise)

    def broken(query: Any, released: Any, permit: Any, expected_cohort: float) -> torch.Tensor:
        return original(query, released, permit, max(1.0, came[0]))

    places = [(owner, "released_update", broken) for owner in (run, trials, whole_audit)]
    return patched((asking, "server_release", counting), *places)


def realised_bytes() -> contextlib.AbstractContextManager[Any]:
    def broken(result: Any, expected_cohort: float, query: Any) -> int:
        return int(result.bytes_up)

    return patched((run, "uploaded_bytes", broken), (stage1, "uploaded_bytes", broken))


def clients_held_out() -> contextlib.AbstractContextManager[Any]:
    def broken(self: EmbeddedSource, count: int) -> list[Any]:
        return [
            record for client in range(-(-count // self.knobs.examples_per_client)) for record in self.client(client)
        ][:count]

    return patched((EmbeddedSource, "held_out", broken))


def known_masks() -> contextlib.AbstractContextManager[Any]:
    def broken(settings: Any, agreement: Any, node: int, peer: int, peer_key: bytes) -> bytes:
        return bytes(31) + bytes([min(node, peer) ^ max(node, peer)])

    return patched(*((owner, "derive_pair_mask_key", broken) for owner in (secure_client, secure_server)))


def constant_seed_of_masks() -> contextlib.AbstractContextManager[Any]:
    return patched((secure_client.secrets, "token_bytes", lambda size: bytes(size)))


UNIT_DRAW = UnitSampler.joining
FOUR_ROUNDS = ("federation.rounds=4", "federation.sampling_rate=0.25")

FAULTS: tuple[Fault, ...] = (
    Fault("nothing", "local", contextlib.nullcontext, records=True),
    Fault("nothing", "central", contextlib.nullcontext, records=True),
    Fault("nothing", "secure-aggregation", contextlib.nullcontext),
    Fault("one value of a message has no noise", "local", messages(bare_value)),
    Fault("one value of the released sum has no noise", "central", sums(bare_value)),
    Fault("noise at 2/3 of its size, in messages", "local", messages(two_thirds)),
    Fault("noise at 2/3 of its size, in the released sum", "central", sums(two_thirds)),
    Fault("no noise at all, in messages", "local", messages(lambda _noised, clean: clean)),
    Fault("all clients of a batch have the same noise", "local", messages(shared)),
    Fault("a contribution twice as long as the clip", "local", messages(long_clip)),
    Fault("noise from a fixed seed", "local", fixed_seed),
    Fault("noise from a fixed seed", "central", fixed_seed),
    Fault("noise from a fixed seed", "secure-aggregation", fixed_seed),
    Fault("the sum is divided by the cohort that came", "central", realised_cohort),
    Fault("bytes are counted as they came from a secret cohort", "central", realised_bytes, records=True),
    Fault("evaluation text is the clients' own", "local", clients_held_out, records=True),
    Fault("masks between nodes that the server can compute", "secure-aggregation", known_masks),
    Fault("the seed of a node's own mask is constant", "secure-aggregation", constant_seed_of_masks),
    Fault(
        "noise at 2/3 of its size, in shares", "secure-aggregation", shares(lambda n, _: np.rint(n * 2 / 3).astype(int))
    ),
    Fault(
        "one value of a share has no noise",
        "secure-aggregation",
        shares(lambda n, _: n * (np.arange(n.size) < n.size - 1)),
    ),
    Fault("one client's share has no noise", "secure-aggregation", shares(lambda n, first: 0 * n if first else n)),
    Fault("nothing, four rounds", "secure-aggregation", contextlib.nullcontext, settings=FOUR_ROUNDS),
    Fault(
        "clients take part in every round, whatever the cap", "secure-aggregation", every_round, settings=FOUR_ROUNDS
    ),
    Fault("nothing, four rounds", "local", contextlib.nullcontext, settings=FOUR_ROUNDS),
    Fault("clients take part in every round, whatever the cap", "local", every_round, settings=FOUR_ROUNDS),
    Fault("the clients' noise adds up to nothing in a sum", "local", messages(cancelled), settings=FOUR_ROUNDS),
    Fault("half of the messages that are counted are in a sum", "local", half_of_the_messages, settings=FOUR_ROUNDS),
    Fault("nothing", "local", contextlib.nullcontext, records=True, unit="owner"),
    Fault("nothing", "secure-aggregation", contextlib.nullcontext, unit="record"),
    Fault(
        "a site's noise at 2/3 of its size",
        "local",
        site_sums(lambda n, clean, *_: two_thirds(n, clean)),
        unit="record",
    ),
    Fault(
        "a site's share of noise at 2/3 of its size",
        "secure-aggregation",
        site_sums(lambda n, clean, *_: two_thirds(n, clean)),
        unit="owner",
    ),
    Fault(
        "one site's share has no noise",
        "secure-aggregation",
        site_sums(lambda n, clean, _, where: clean if where[1] == 0 else n),
        unit="record",
    ),
    Fault(
        "a site's noise cancels over the run",
        "local",
        site_sums(cancelling(5)),
        unit="record",
        settings=("federation.rounds=5",),
    ),
    Fault("the sites' noise adds up to nothing in a sum", "local", site_sums(cancelling(8, sites=True)), unit="record"),
    Fault("a site divides by how many units took part", "local", site_sums(divided), unit="record"),
    Fault("a unit is counted twice", "local", site_sums(lambda n, clean, *_: n + clean), unit="owner"),
    Fault(
        "a record is three times as long as the clip",
        "local",
        site_sums(lambda n, clean, *_: n + 2 * clean),
        unit="record",
    ),
    Fault(
        "all units of a site take part", "local", draw_of(lambda _self, units, _rate, _site: list(units)), unit="record"
    ),
    Fault(
        "a site's draw is the same in every round",
        "local",
        draw_of(lambda _self, units, rate, site: UNIT_DRAW(UnitSampler(bytes(32)), units, rate, 1, site)),
        unit="owner",
    ),
    Fault("a site tells how many units took part", "local", told_number, records=True, unit="record"),
)


class Silent:
    def say(self, text: str) -> None: ...


def audit_with(fault: Fault, recipe: Recipe, *, canaries: int, seed: int = 0) -> tuple[str, ...]:
    """What the audit finds with a fault in place: one sentence for each test that fails."""
    with fault.plant():
        return whole_audit.audit_recipe(recipe, Silent(), canaries=canaries, seed=seed, records=fault.records).failures


def recipe_of(fault: Fault, overrides: Sequence[str]) -> Recipe:
    sites = [] if fault.unit == "client" else [*SITES, f"privacy.unit={fault.unit}"]
    return load_checked_recipe("quickstart", [*overrides, *sites, f"privacy.trust={fault.trust}", *fault.settings])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=400)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.only = "2/3"
    torch.set_num_threads(1)
    rows = []
    for fault in sorted(FAULTS, key=lambda fault: fault.records):  # the long ones last
        if args.only not in f"{fault.breaks}, {fault.trust}, {fault.unit}":
            continue
        started = time.perf_counter()
        failures = audit_with(fault, recipe_of(fault, QUICK), canaries=args.canaries)
        rows.append(
            {
                "breaks": fault.breaks,
                "trust": fault.trust,
                "unit": fault.unit,
                "failures": failures,
                "seconds": round(time.perf_counter() - started),
            }
        )
        print(
            f"{fault.breaks} ({fault.trust}, {fault.unit}): {len(failures)} tests fail. {failures[0] if failures else ''}",
            flush=True,
        )
        if args.json:
            args.json.write_text(
                json.dumps({"canaries": args.canaries, "overrides": QUICK, "rows": rows}, indent=1) + "\n", "utf-8"
            )
    if args.markdown:
        args.markdown.write_text(markdown(rows), "utf-8")
    wrong = [row for row in rows if bool(row["failures"]) == row["breaks"].startswith("nothing")]
    for row in wrong:
        print(f"WRONG: {row['breaks']} ({row['trust']})", file=sys.stderr)
    return 1 if wrong else 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the results page."""
    lines = ["| what is broken | trust | unit | tests that fail | the first of them says |", "|---|---|---|---|---|"]
    for row in rows:
        first = row["failures"][0] if row["failures"] else "no fault was found"
        lines.append(f"| {row['breaks']} | {row['trust']} | {row['unit']} | {len(row['failures'])} | {first} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
