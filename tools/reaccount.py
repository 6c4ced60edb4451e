"""Re-accounts a run from its files alone: imports nothing of drencoder, only json, scipy and dp_accounting.

    python tools/reaccount.py RUN

Reads RUN/ledger.jsonl and RUN/certificate.json, checks the chain of hashes, computes every observer's
epsilon under both adjacencies with dp_accounting's PLD accountant, prints a table and exits with 1 when
the chain is broken, the certificate is of another ledger, or an epsilon differs by more than 1e-6.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom

TOLERANCE = 1e-6
RELATIONS = {
    "add_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp.NeighboringRelation.REPLACE_ONE,
}


def read_ledger(path: Path) -> tuple[list[dict], str]:
    """The records and the last line's hash; ValueError when the chain is broken."""
    records, previous = [], "0" * 64
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        raise ValueError("the last line was never finished: open the run with `drencoder run --resume` first")
    for number, line in enumerate(data[:-1].split(b"\n"), start=1):
        record = json.loads(line)
        if record["prev"] != previous or record["seq"] != number - 1:
            raise ValueError(f"line {number} does not follow the one before it")
        records.append(record)
        previous = hashlib.sha256(line).hexdigest()
    return records, previous


def compositions(records: list[dict]) -> dict[str, list[dict] | None]:
    """What each observer sees of the worst client: events, or None where there is no guarantee."""
    plan = records[0]["plan"]
    charges = [r for r in records if r["kind"] == "charge"]
    known = ("header", "charge", "contributors", "note", *(["repeat"] if plan["noise"] == "replay" else []))
    if strange := [r["kind"] for r in records if r["kind"] not in known]:
        raise ValueError(f"the ledger has lines of kind {strange[0]}")
    if plan["trust"] == "central":
        events = [r["event"] for r in charges]
        return {"server": None, "clients": events, "public": events}

    # Otherwise the schedule falls into `cap` blocks; a client releases once in each, at worst the dearest slot.
    slots = list(range(0 if plan["stage1_rate"] > 0 else 1, plan["rounds"] + 1))
    cap = min(plan["participation_cap"], len(slots))
    block_of = {}
    for block in range(cap):
        for slot in slots[len(slots) * block // cap : len(slots) * (block + 1) // cap]:
            block_of[slot] = block
    contributors: dict[int, int] = {}
    for record in records:
        if record["kind"] == "contributors":
            slot, count = record["slot"], record["contributors"]
            contributors[slot] = min(count, contributors.get(slot, count))
    views: dict[str, dict[int, dict]] = {"server": {}, "clients": {}, "public": {}}
    for record in charges:
        slot, event = record["slot"], record["event"]
        if plan["trust"] == "secure-aggregation":
            # All see sums alone. The charge is for the noise of the fewest honest contributors; more of them add more.
            least = least_contributors(plan, slot)
            fewest, honest = (honest_of(plan, m) for m in (least, max(least, contributors.get(slot, 0))))
            shares = [
                ("server", honest / fewest),
                ("clients", max(1, honest - 1) / fewest),
                ("public", honest / fewest),
            ]
        else:
            # A sum of codes that were decoded one by one, by a non-linear map, hides nobody in the others' noise.
            m = 1 if plan["decodes_each"] and slot > 0 else contributors.get(slot, 1)
            shares = [("server", 1), ("clients", max(1, m - 1)), ("public", max(1, m))]
        for view, variances in shares:
            seen = dict(event)
            if seen["kind"] == "gaussian":
                seen["noise_multiplier"] *= math.sqrt(variances)
            worst = views[view].get(block_of[slot])
            if worst is None or seen.get("noise_multiplier", 0.0) < worst.get("noise_multiplier", 0.0):
                views[view][block_of[slot]] = seen
    return {view: list(blocks.values()) for view, blocks in views.items()}


def least_contributors(plan: dict, slot: int) -> int:
    """Secure aggregation: fewer void the round. The cohort's 1e-6 quantile less the share that may drop out."""
    rate = plan["stage1_rate"] if slot == 0 else plan["sampling_rate"]
    cohort = max(1, int(binom.ppf(1e-6, plan["population"], rate)))
    return max(1, math.ceil((1 - plan["dropout_share"]) * cohort - 1e-9))


def honest_of(plan: dict, contributors: int) -> int:
    """Secure aggregation: how many of them the plan assumes to keep their noise to themselves."""
    return max(1, math.floor(plan["honest_share"] * contributors + 1e-9))


def epsilon(events: list[dict] | None, delta: float, relation: str) -> float:
    """dp_accounting's PLD epsilon with its default grid."""
    if events is None:
        return math.inf
    counts: dict[str, int] = {}
    for event in events:
        single = {k: v for k, v in event.items() if k != "count"}
        key = json.dumps(single, sort_keys=True)
        counts[key] = counts.get(key, 0) + event["count"]
    accountant = PLDAccountant(RELATIONS[relation])
    for key, count in counts.items():
        event = json.loads(key)
        match event["kind"]:
            case "gaussian":
                dp_event = dp.GaussianDpEvent(event["noise_multiplier"])
            case "poisson_gaussian":
                gaussian = dp.GaussianDpEvent(event["noise_multiplier"])
                dp_event = dp.PoissonSampledDpEvent(event["sampling_rate"], gaussian)
            case "non_private":
                dp_event = dp.NonPrivateDpEvent()
            case kind:
                raise ValueError(f"unknown event kind {kind}")
        accountant.compose(dp_event, count)
    return float(accountant.get_epsilon(delta))


def main(run: str) -> int:
    try:
        records, head = read_ledger(Path(run, "ledger.jsonl"))
        certificate = json.loads(Path(run, "certificate.json").read_text())
        views = compositions(records)
    except (OSError, ValueError, KeyError) as error:
        print(f"FAILED: {error}")
        return 1
    failures = 0
    if certificate["ledger_head"] != {"seq": len(records) - 1, "sha256": head}:
        print("FAILED: the certificate belongs to another state of the ledger")
        failures += 1
    plan = records[0]["plan"]
    delta = plan["delta"]
    print(f"{len(records)} lines, chain intact, delta {delta:g}")
    if plan["trust"] == "secure-aggregation":
        delta *= 1 - 1e-6  # the rest is for noise that is discrete and not Gaussian
    print(f"{'observer':10} {'adjacency':12} {'certificate':>14} {'re-computed':>14}")
    for observer, events in views.items():
        for relation in RELATIONS:
            stated = float(certificate["observers"][observer]["by_relation"][relation]["epsilon_pld"])
            found = epsilon(events, delta, relation)
            same = stated == found or abs(stated - found) <= TOLERANCE
            failures += not same
            print(f"{observer:10} {relation:12} {stated:14.8f} {found:14.8f}{'' if same else '   DIFFERS'}")
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/reaccount.py RUN")
    sys.exit(main(sys.argv[1]))
