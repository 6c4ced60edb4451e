"""What an auditor checks in a ledger beyond its chain of hashes: that each line is one which its plan allows."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from drencoder.privacy.accounting import epsilon_pld, event_to_dict
from drencoder.privacy.ledger import ROUNDING, Ledger
from drencoder.privacy.plan import PrivacyPlan
from drencoder.reading import cut

SAME_FLOAT = 1e-9  # relative: another version of SciPy calibrates another last digit
_CALIBRATED = ("noise_multiplier", "stage1_noise_multiplier")
_LOOSE = 1e-6  # relative, of the two calibrated ones: searches of two versions end that near to each other


def plan_differences(first: PrivacyPlan, second: PrivacyPlan) -> list[str]:
    """The fields in which two plans differ by more than another machine's arithmetic."""
    ours, theirs = first.to_dict(), second.to_dict()
    return [name for name in sorted(ours.keys() | theirs.keys()) if not _same(ours.get(name), theirs.get(name), name)]


def _same(one: Any, other: Any, name: str = "") -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_LOOSE if name in _CALIBRATED else SAME_FLOAT, abs_tol=0)
    return type(one) is type(other) and bool(one == other)


def ledger_troubles(ledger: Ledger) -> list[str]:
    """One sentence for each line that the ledger's own plan does not allow; empty if all are sound."""
    plan, header = ledger.plan, ledger.records[0]
    troubles = []
    if ledger.torn:
        troubles.append(f"the ledger's last line was never finished ({ledger.torn} bytes): resume the run.")
    if header["delta"] != plan.delta:
        troubles.append(f"the ledger's header says delta {header['delta']:g} and its plan {plan.delta:g}.")
    if (header["sampler_key"] is None) == (plan.capped or plan.noise == "replay"):
        missing = header["sampler_key"] is None
        troubles.append(f"the ledger's header {'lacks the' if missing else 'has a'} key of cohorts, against its plan.")
    troubles += _line_troubles(ledger)
    return troubles or list(_budget_troubles(ledger))


def _line_troubles(ledger: Ledger) -> Iterator[str]:
    plan = ledger.plan
    cohort_size = cache(lambda slot: len(ledger.sampler().cohort(slot)))
    charged: dict[int, int] = {}
    to_release: set[int] = set()  # charged, and nothing released of that attempt yet
    unasked: set[int] = set()
    for record in ledger.records[1:]:
        kind, line = record["kind"], f"line {record['seq'] + 1} of the ledger"
        slot: Any = record.get("slot")
        if slot is not None and slot not in plan.slots:
            yield f"{line} is of slot {slot}, which the plan does not have."
        elif kind in ("charge", "repeat"):
            yield from _charge_troubles(plan, record, charged.get(slot, 0), line)
            charged[slot] = charged.get(slot, 0) + (kind == "charge")
            to_release.add(slot)
        elif slot is not None and slot not in charged:
            yield f"{line}, of kind {kind}, is of slot {slot} before any charge of it."
        elif kind == "contributors":
            told = record["contributors"]
            if not plan.capped:
                yield f"{line}: the size of a secret cohort stands in the ledger."
            elif not 0 <= told <= cohort_size(slot):
                yield f"{line}: {told} contributors in slot {slot}, whose cohort has {cohort_size(slot)} clients."
        elif kind == "unasked":
            sites = record["sites"]
            known = plan.curated and all(type(site) is int and 0 <= site < plan.population for site in sites)
            if not known or slot in unasked or sites != sorted(set(sites)):
                yield f"{line} names sites that slot {slot} of this plan cannot leave out."
            unasked.add(slot)
        elif kind == "release":
            if slot not in to_release or record["attempt"] != charged[slot] - 1:
                yield f"{line} releases slot {slot} once more than it was charged."
            if record["of"] != ("adapter" if slot else "statistics"):
                yield f"{line} says that slot {slot} released {cut(record['of'], 20)}."
            to_release.discard(slot)
        elif kind == "abandoned":
            if slot not in to_release:
                yield f"{line} says that slot {slot} was abandoned, though it was released."
            to_release.discard(slot)


def _charge_troubles(plan: PrivacyPlan, record: Mapping[str, Any], before: int, line: str) -> Iterator[str]:
    slot = record["slot"]
    if (record["stage"], record["trust"]) != (plan.stage(slot), plan.trust):
        yield f"{line} charges slot {slot} as {cut(record['stage'], 20)}, {cut(record['trust'], 20)}: not as the plan has it."
    if record["kind"] == "repeat":
        if plan.noise != "replay" or not before:
            yield f"{line} repeats slot {slot} without a charge; only replayed runs may, after one."
        return
    if record["attempt"] != before:
        yield f"{line} is attempt {record['attempt']} at slot {slot}, and {before} came before it."
    if before and (plan.capped or plan.noise == "replay"):
        yield f"{line} charges slot {slot} again, which passes its clients' participation cap."
    planned, event = event_to_dict(plan.event(slot)), record["event"]
    if planned.keys() != event.keys() or not all(_same(planned[key], event[key]) for key in planned):
        noise = event.get("noise_multiplier")
        said = f"noise multiplier {noise:g}" if isinstance(noise, float) else "another event"
        expected = planned.get("noise_multiplier")
        yield (
            f"{line} charges slot {slot} with {said}, and the plan "
            + (f"has {expected:g}." if isinstance(expected, float) and expected != noise else "with another event.")
        )


def _budget_troubles(ledger: Ledger) -> Iterator[str]:
    plan = ledger.plan
    cost = epsilon_pld(plan.budget_events(ledger.charges()), plan.gaussian_delta, plan.relation)
    if cost > plan.budget * (1 + SAME_FLOAT) + ROUNDING:
        yield f"the charges cost epsilon {cost:.6f}, past the plan's budget of {plan.budget:.6f}."
