"""For reaccount.py: the ledger's lines, what each observer sees of them, and what dp_accounting makes of that."""

import hashlib
import json
import logging
import math
from functools import lru_cache
from pathlib import Path

import dp_accounting as dp
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binom

TOLERANCE = 1e-6
RELATIONS = {
    "add_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp.NeighboringRelation.REPLACE_ONE,
}
logging.getLogger("absl").setLevel(logging.ERROR)  # orders that do not converge are left out, which is sound
FIELDS = {  # kind of line -> its fields, besides seq, kind and prev
    "header": "format run_id plan delta sampler_key recipe drencoder",
    "charge": "stage slot trust attempt event",
    "repeat": "stage slot trust",
    "contributors": "slot contributors",
    "unasked": "slot sites",
    "release": "slot attempt of sha256",
    "abandoned": "slot",
    "lost": "slot",
    "site": "name clients data owners",
    "note": "text",
    "closed": "rounds files",
}


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> bool:
    """Equal, numbers to the tolerance; an infinite one is the string "inf" in JSON."""
    if expected == math.inf:
        return found in ("inf", math.inf)
    if type(found) in (int, float) and type(expected) in (int, float):
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=min(tolerance, tolerance * abs(expected)))
    return type(found) is type(expected) and found == expected


def parse(text: bytes | str) -> object:
    """A JSON value; ValueError for an object that names a value twice, of which another reader would take the other."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("an object has two values of one name")
        return value

    return json.loads(text, object_pairs_hook=unique)


def read_ledger(path: Path) -> tuple[list[dict], str]:
    """The records and the last line's hash; ValueError when the chain is broken."""
    records, previous = [], "0" * 64
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        raise ValueError("the ledger's last line was never finished: resume the run with drencoder run --resume")
    for number, line in enumerate(data[:-1].split(b"\n"), start=1):
        record = parse(line)
        if number == 1 and record.get("format") != 2:
            raise ValueError("the ledger is of another format than 2: use the script of the version that wrote it")
        if json.dumps(record, sort_keys=True, allow_nan=False).encode() != line:
            raise ValueError(f"line {number} of the ledger is not written as drencoder writes it")
        if record["prev"] != previous or record["seq"] != number - 1:
            raise ValueError(f"line {number} of the ledger does not follow the one before it")
        if set(record) != {"seq", "kind", "prev", *FIELDS[record["kind"]].split()} or (record["kind"] == "header") != (
            number == 1
        ):
            raise ValueError(f"line {number} of the ledger has not the fields of its kind")
        records.append(record)
        previous = hashlib.sha256(line).hexdigest()
    return records, previous


def is_curated(plan: dict) -> bool:
    """Whether the unit is a record or an owner inside a site: then `population` counts sites, and all are in every slot."""
    return plan.get("unit", "client") != "client"


def units_of(plan: dict) -> int:
    """How many units everybody takes there to be."""
    return plan["population"] * (plan["site_units"] if is_curated(plan) else 1)


def slots_of(plan: dict) -> list[int]:
    return list(range(0 if plan["stage1_rate"] > 0 else 1, plan["rounds"] + 1))


def blocks_of(plan: dict) -> dict[int, int]:
    """Where participation is capped, the schedule falls into `cap` blocks: slot -> number of its block."""
    slots = slots_of(plan)
    cap = min(plan["participation_cap"], len(slots))
    edges = [len(slots) * block // cap for block in range(cap + 1)]
    return {slot: block for block in range(cap) for slot in slots[edges[block] : edges[block + 1]]}


def planned_event(plan: dict, slot: int) -> dict:
    """What one release of a slot is charged as."""
    stage = "round" if slot else "stage1"
    if stage in plan["non_private"]:
        return {"kind": "non_private", "count": 1}
    event = {"noise_multiplier": plan["noise_multiplier" if slot else "stage1_noise_multiplier"], "count": 1}
    if plan["trust"] != "central" and not is_curated(plan):
        return {"kind": "gaussian", **event}
    return {"kind": "poisson_gaussian", "sampling_rate": plan["sampling_rate" if slot else "stage1_rate"], **event}


def cohort_size(plan: dict, key: bytes, slot: int) -> int:
    """How many clients the sampler draws for a slot from the key in the header (trust other than central)."""
    if is_curated(plan):
        return plan["population"]
    blocks, rate = blocks_of(plan), lambda s: plan["sampling_rate" if s else "stage1_rate"]
    before = [rate(s) for s in blocks if blocks[s] == blocks[slot] and s < slot]
    start, stop = math.fsum(before), math.fsum([*before, rate(slot)])
    prefix = key + f"capped\x1f{blocks[slot]}".encode()
    words = np.frombuffer(hashlib.shake_256(prefix).digest(8 * plan["population"]), dtype="<u8")
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return int(np.count_nonzero((uniform >= start) & (uniform < stop)))


def line_troubles(records: list[dict]) -> list[str]:
    """Each line against the plan."""
    header, found = records[0], []
    plan, charged, open_slots, unasked = header["plan"], {}, set(), set()
    capped, replay = plan["trust"] != "central", plan["noise"] == "replay"
    if header["delta"] != plan["delta"]:
        found.append("the header's delta is not the plan's")
    if (header["sampler_key"] is None) == (capped or replay):
        found.append("the header has a key of cohorts where there must be none, or none where there must be one")
        return found
    for number, record in enumerate(records[1:], start=2):
        kind, slot = record["kind"], record.get("slot")
        trouble = ""
        if slot is not None and slot not in slots_of(plan):
            trouble = f"slot {slot} is not in the plan"
        elif kind in ("charge", "repeat"):
            before = charged.get(slot, 0)
            if (record["stage"], record["trust"]) != ("round" if slot else "stage1", plan["trust"]):
                trouble = "stage or trust is not the plan's"
            if kind == "repeat" and not (replay and before):
                trouble = "a repeat without a charge"
            if kind == "charge":
                event, planned = record["event"], planned_event(plan, slot)
                same = event.keys() == planned.keys() and all(agree(event[k], planned[k], 1e-9) for k in planned)
                if not same:
                    trouble = f"the event {event} is not the plan's {planned}"
                if record["attempt"] != before or (before and (capped or replay)):
                    trouble = f"slot {slot} is charged once too often, or out of order"
                charged[slot] = before + 1
            open_slots.add(slot)
        elif slot is not None and slot not in charged:
            trouble = f"slot {slot} has no charge before"
        elif kind == "contributors":
            most = cohort_size(plan, bytes.fromhex(header["sampler_key"]), slot) if capped else -1
            if not 0 <= record["contributors"] <= most:
                trouble = f"{record['contributors']} contributors do not fit the cohort of slot {slot}"
        elif kind == "unasked":
            sites = record["sites"]
            known = is_curated(plan) and all(type(s) is int and 0 <= s < plan["population"] for s in sites)
            if not known or slot in unasked or sites != sorted(set(sites)):
                trouble = f"slot {slot} cannot leave out these sites"
            unasked.add(slot)
        elif kind in ("release", "abandoned"):
            if slot not in open_slots or (kind == "release" and record["attempt"] != charged[slot] - 1):
                trouble = f"slot {slot} is released or abandoned once more than it was charged"
            if kind == "release" and record["of"] != ("adapter" if slot else "statistics"):
                trouble = f"slot {slot} cannot release {record['of']}"
            open_slots.discard(slot)
        if trouble:
            found.append(f"line {number} of the ledger: {trouble}")
    return found


def budget_events(plan: dict, slots: list[int]) -> list[dict]:
    """What counts against the target: all private slots; under a cap the dearest of each block, as the strongest observer sees it."""
    events = {slot: planned_event(plan, slot) for slot in slots}
    private = {slot: event for slot, event in events.items() if event["kind"] != "non_private"}
    if plan["trust"] == "central":
        return list(private.values())
    records = [{"kind": "header", "plan": plan}]
    records += [{"kind": "charge", "slot": slot, "event": event} for slot, event in private.items()]
    return compositions(records)["server" if plan["trust"] == "local" else "clients"]


def compositions(records: list[dict]) -> dict[str, list[dict] | None]:
    """What each observer sees of the worst client: events, or None where there is no guarantee."""
    plan = records[0]["plan"]
    charges = [r for r in records if r["kind"] == "charge"]
    if plan["trust"] == "central":
        events = [r["event"] for r in charges]
        return {"server": None, "clients": events, "public": events}

    # Otherwise a client releases once in each block of the schedule, at worst the dearest slot.
    block_of = blocks_of(plan)
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
            m = 1 if plan["nonlinear_decoding"] and slot > 0 else contributors.get(slot, 1)
            shares = [("server", 1), ("clients", max(1, m - 1)), ("public", max(1, m))]
        for view, variances in shares:
            seen = dict(event)
            if seen["kind"] != "non_private":
                seen["noise_multiplier"] *= math.sqrt(variances)
            worst = views[view].get(block_of[slot])
            if worst is None or seen.get("noise_multiplier", 0.0) < worst.get("noise_multiplier", 0.0):
                views[view][block_of[slot]] = seen
    return {view: list(blocks.values()) for view, blocks in views.items()}


def site_rows(records: list[dict]) -> list[dict]:
    """What the units of each site have spent: sites that were asked in the same slots together, the dearest first."""
    plan = records[0]["plan"]
    unasked = {record["slot"]: record["sites"] for record in records if record["kind"] == "unasked"}
    charged = list(dict.fromkeys(record["slot"] for record in records if record["kind"] == "charge"))
    sites_of: dict[tuple, list[int]] = {}
    for site in range(plan["population"]):
        sites_of.setdefault(tuple(s for s in charged if site not in unasked.get(s, [])), []).append(site)
    rows = []
    for slots, sites in sites_of.items():
        own = [record for record in records if record["kind"] != "charge" or record["slot"] in slots]
        views = compositions(own)
        spent = {
            relation: {name: epsilon(events, composition_delta(plan), relation) for name, events in views.items()}
            for relation in RELATIONS
        }
        rows.append({"sites": sites, "slots": len(slots), "epsilon": spent, "events": views})
    bound = "server" if plan["trust"] == "local" else "clients"
    return sorted(rows, key=lambda row: (-row["epsilon"][plan["relation"]][bound], row["sites"]))


def same_events(stated: dict, expected: dict[str, list[dict]]) -> bool:
    """Whether a certificate's events of each observer are these, up to the last digits of the noise."""

    def in_order(events: list[dict]) -> list[tuple[dict, int]]:
        return sorted(counted(events), key=lambda pair: (pair[0]["sampling_rate"], pair[0]["noise_multiplier"]))

    def same(one: tuple[dict, int], other: tuple[dict, int]) -> bool:
        return (
            one[1] == other[1]
            and one[0].keys() == other[0].keys()
            and all(agree(one[0][k], other[0][k]) for k in other[0])
        )

    views = [(in_order(stated[view]), in_order(events)) for view, events in expected.items()]
    return stated.keys() == expected.keys() and all(
        len(one) == len(other) and all(map(same, one, other)) for one, other in views
    )


def least_contributors(plan: dict, slot: int) -> int:
    """Secure aggregation: fewer void the round. The cohort's 1e-6 quantile less the share that may drop out."""
    rate = plan["stage1_rate"] if slot == 0 else plan["sampling_rate"]
    cohort = plan["population"] if is_curated(plan) else max(1, int(binom.ppf(1e-6, plan["population"], rate)))
    return max(1, math.ceil((1 - plan["dropout_share"]) * cohort - 1e-9))


def honest_of(plan: dict, contributors: int) -> int:
    """Secure aggregation: how many of them the plan assumes to keep their noise to themselves."""
    return max(1, math.floor(plan["honest_share"] * contributors + 1e-9))


def composition_delta(plan: dict) -> float:
    """A millionth of delta is set aside: noise is discrete and not Gaussian."""
    return plan["delta"] * (1 - 1e-6)


def dp_event(event: dict) -> dp.DpEvent:
    match event["kind"]:
        case "gaussian":
            return dp.GaussianDpEvent(event["noise_multiplier"])
        case "poisson_gaussian":
            return dp.PoissonSampledDpEvent(event["sampling_rate"], dp.GaussianDpEvent(event["noise_multiplier"]))
        case "non_private":
            return dp.NonPrivateDpEvent()
    raise ValueError(f"unknown event kind {event['kind']}")


def counted(events: list[dict]) -> list[tuple[dict, int]]:
    counts: dict[str, int] = {}
    for event in events:
        key = json.dumps({k: v for k, v in event.items() if k != "count"}, sort_keys=True)
        counts[key] = counts.get(key, 0) + event["count"]
    return [(json.loads(key), count) for key, count in counts.items()]


def epsilon(events: list[dict] | None, delta: float, relation: str) -> float:
    """dp_accounting's PLD epsilon with its default grid."""
    return math.inf if events is None else _epsilon(json.dumps(counted(events)), delta, relation)


@lru_cache(maxsize=64)  # two observers often see the same
def _epsilon(events: str, delta: float, relation: str) -> float:
    accountant = PLDAccountant(RELATIONS[relation])
    for event, count in json.loads(events):
        accountant.compose(dp_event(event), count)
    return float(accountant.get_epsilon(delta))


def other_numbers(events: list[dict] | None, delta: float, relation: str) -> dict:
    """RDP's epsilon, mu of exact Gaussian DP, and the central limit's approximation; None where there is none."""
    if events is None or any(event["kind"] == "non_private" for event in events):
        return {"epsilon_rdp": math.inf, "mu": math.inf, "epsilon_clt_approx": None}
    return dict(_other_numbers(json.dumps(counted(events)), delta, relation))


@lru_cache(maxsize=64)
def _other_numbers(events: str, delta: float, relation: str) -> dict:
    merged = json.loads(events)
    parts = [(event.get("sampling_rate", 1.0), event["noise_multiplier"], count) for event, count in merged]
    sampled = any(rate < 1 for rate, _, _ in parts)
    shift = 1 if relation == "add_remove" else 2
    mu = None if sampled else math.sqrt(sum(count * (shift / sigma) ** 2 for _, sigma, count in parts))
    limit = None
    if sampled and shift == 1 and all(rate == 1 or sigma**-2 <= 100 for rate, sigma, _ in parts):
        squares = (q * q * math.expm1(s**-2) if q < 1 else s**-2 for q, s, count in parts for _ in range(count))
        limit = float(dp.get_epsilon_gaussian(1 / math.sqrt(math.fsum(squares)), delta))
    rdp = None
    if shift == 1 or not sampled:  # replacing: a shift of 2 C under noise s C is one of C under s C / 2
        accountant = RdpAccountant(neighboring_relation=RELATIONS["add_remove"])
        for event, count in merged:
            halved = {"kind": "gaussian", "noise_multiplier": event["noise_multiplier"] / 2}
            accountant.compose(dp_event(event if shift == 1 else halved), count)
        rdp = float(accountant.get_epsilon(delta)) if parts else 0.0
    return {"epsilon_rdp": rdp, "mu": mu, "epsilon_clt_approx": limit}
