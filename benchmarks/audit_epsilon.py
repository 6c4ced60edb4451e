"""Empirical epsilon against the promise: how near `drencoder audit` comes to an ideal white-box audit, and that it stays below.

    python benchmarks/audit_epsilon.py [--seeds 20] [--canaries 1000] [--units] [--json FILE] [--markdown FILE]

The embedded model with a small adapter. Local trust: the server's view of a client's message. Central trust, one round of all clients: the
public's view of the released sum. Secure aggregation: the server's view of the sum. The noise is the run's own, new for every seed; a
seed decides the canaries' coins. An ideal audit scores exact Gaussian noise of the promised size, with the same bounds.

With --units, records and owners of twelve sites in the place of clients: one release for an attacker who is told whom a site drew, and the whole
run of four rounds for one who is not, whose promise is what a certificate says of the worst site. And clients
under local trust and secure aggregation in the public's view of four rounds together.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from drencoder.audit.canaries import draw_coins
from drencoder.audit.observers import Release, View, audit_releases, measure
from drencoder.audit.scores import CanaryScores
from drencoder.audit.trials import Trials
from drencoder.audit.whole_run import audit_run
from drencoder.encoders.planning import load_checked_recipe
from drencoder.federated.query import update_query
from drencoder.privacy.accounting import sigma_gaussian
from drencoder.runs.build import build

SMALL = [
    "adapter.rank=2", "adapter.targets=['layers.0.self_attn.q_proj', 'layers.0.self_attn.v_proj']", "encoder.ratio=1",
    "prior.source=none", "federation.population=2000", "federation.rounds=1", "federation.sampling_rate=1.0",
]  # fmt: skip
SITES = [
    "federation.population=12", "federation.nodes=12", "federation.rounds=4", "federation.sampling_rate=0.3",
    "federation.units_per_site=100",
]  # fmt: skip
FOUR_ROUNDS = ["federation.rounds=4", "federation.sampling_rate=0.25"]
VIEWS = {"local": "a client's message", "central": "the released sum", "secure-aggregation": "the released sum"}
UNITS = (("record", "local"), ("owner", "local"), ("record", "secure-aggregation"), ("owner", "secure-aggregation"))
PUBLIC = ("local", "secure-aggregation")
BOUNDS = ("gaussian", "gdp", "one_run")


def measured(trust: str, epsilon: float, canaries: int, seeds: int) -> list[View]:
    """The view of each seed."""
    components = build(
        load_checked_recipe("quickstart", [*SMALL, f"privacy.trust={trust}", f"privacy.epsilon={epsilon}"])
    )
    encoder, plan = components.encoder(None), components.plan
    release = Release((1,), lambda slot: update_query(encoder, components.recipe, slot), "a round")
    trials, found = Trials(components, components.lora.initial_D), []
    for seed in range(seeds):
        views, _ = audit_releases(trials, release, plan, canaries=canaries, seed=seed)
        found.append(next(view for view in views if view.sees.startswith(VIEWS[trust])))
    return found


def measured_units(unit: str, trust: str, epsilon: float, canaries: int, seeds: int) -> dict[str, list[View]]:
    """What is scored -> the server's view of each seed."""
    settings = [f"privacy.unit={unit}", f"privacy.trust={trust}", f"privacy.epsilon={epsilon}"]
    components = build(load_checked_recipe("quickstart", [*SMALL, *SITES, *settings]))
    encoder, plan = components.encoder(None), components.plan
    release = Release(plan.slots, lambda slot: update_query(encoder, components.recipe, slot), "a round")
    trials, found = (
        Trials(components, components.lora.initial_D),
        {"one release, draw known": [], "the run, draw secret": []},
    )
    for seed in range(seeds):
        views, _ = audit_releases(trials, release, plan, canaries=canaries, seed=seed)
        found["one release, draw known"].append(next(view for view in views if view.observer == "server"))
        views, _ = audit_run(trials, release.queries, plan, canaries=canaries, seed=seed)
        found["the run, draw secret"].append(next(view for view in views if view.observer == "server"))
    return found


def measured_public(trust: str, epsilon: float, canaries: int, seeds: int) -> list[View]:
    """The public's view of whole runs of clients, of each seed."""
    settings = [f"privacy.trust={trust}", f"privacy.epsilon={epsilon}", *FOUR_ROUNDS]
    components = build(load_checked_recipe("quickstart", [*SMALL, *settings]))
    encoder, trials = components.encoder(None), Trials(components, components.lora.initial_D)
    found = []
    for seed in range(seeds):
        views, _ = audit_run(
            trials,
            lambda slot: update_query(encoder, components.recipe, slot),
            components.plan,
            canaries=canaries,
            seed=seed,
        )
        found.append(next(view for view in views if view.observer == "public"))
    return found


def ideal(epsilon: float, delta: float, canaries: int, seeds: int) -> list[View]:
    """Scores of exact Gaussian noise."""
    mu, found = 1 / sigma_gaussian(epsilon, delta), []
    for seed in range(seeds):
        coin_N = draw_coins(seed, canaries)
        noise_N = np.random.default_rng([seed, 1]).standard_normal(canaries)
        scores = CanaryScores.of(np.where(coin_N, 1.0, -1.0) + 2 / mu * noise_N, coin_N)
        found.append(measure(scores, observer="server", sees="", canary="", relation="add_remove", mu=mu, delta=delta))
    return found


def row(name: str, epsilon: float, views: list[View], seconds: float) -> dict[str, Any]:
    bounds = {bound: [view.bounds[bound] for view in views] for bound in BOUNDS}
    return {
        "what": name,
        "epsilon": epsilon,
        "promised": max(view.promised for view in views),
        "mean_95": {bound: float(np.mean([one["95"] for one in values])) for bound, values in bounds.items()},
        "largest_99.9": {bound: max(one["99.9"] for one in values) for bound, values in bounds.items()},
        "above_at_99.9": sum(view.bounds[bound]["99.9"] > view.promised for view in views for bound in BOUNDS),
        "alarms": sum(bool(view.exceeded) for view in views),
        "seconds": round(seconds / len(views), 1),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| what is scored | promised | Gaussian | GDP | one run | largest bound at 99.9 % | above the promise |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        means = " | ".join(f"{one['mean_95'][bound]:.2f}" for bound in BOUNDS)
        largest = max(one["largest_99.9"].values())
        lines.append(f"| {one['what']} | {one['promised']:.2f} | {means} | {largest:.2f} | {one['above_at_99.9']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--units", action="store_true", help="records and owners of sites, and no clients")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.canaries = 1, 100
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for epsilon in (8.0,) if args.smoke else (8.0, 1.0):
        for unit, trust in UNITS if args.units or args.smoke else ():
            started = time.perf_counter()
            for what, views in measured_units(unit, trust, epsilon, args.canaries, args.seeds).items():
                rows.append(row(f"{unit}, {trust}: {what}", epsilon, views, (time.perf_counter() - started) / 2))
                print(json.dumps(rows[-1]), flush=True)
        for trust in PUBLIC if args.units or args.smoke else ():
            started = time.perf_counter()
            views = measured_public(trust, epsilon, args.canaries, args.seeds)
            rows.append(
                row(f"client, {trust}: the run, published states", epsilon, views, time.perf_counter() - started)
            )
            print(json.dumps(rows[-1]), flush=True)
        for trust in ("ideal", *VIEWS) if not args.units else ():
            started = time.perf_counter()
            if trust == "ideal":
                views = ideal(epsilon, 1e-5, args.canaries, args.seeds)
            else:
                views = measured(trust, epsilon, args.canaries, args.seeds)
            rows.append(
                row(
                    f"{VIEWS[trust]}, {trust} trust" if trust in VIEWS else "exact Gaussian noise",
                    epsilon,
                    views,
                    time.perf_counter() - started,
                )
            )
            print(json.dumps(rows[-1]), flush=True)
        if args.json:
            found = {"seeds": args.seeds, "canaries": args.canaries, "rows": rows}
            args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(markdown(rows))
    if args.markdown:
        args.markdown.write_text(markdown(rows), "utf-8")


if __name__ == "__main__":
    main()
