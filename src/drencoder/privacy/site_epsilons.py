"""What the units of each site have spent, from the run's ledger, where the unit is a record or an owner inside a site.

A slot that a site was not asked in costs its units nothing. One that it was asked in costs them the slot's charge, whether or not
its message came: it may have left the site.
"""

from typing import Any

from drencoder.privacy.accounting import RELATIONS, REPORT_INTERVAL, event_to_dict
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.observers import OBSERVERS, epsilons_by_observer

UNITS = {
    "client": "one client with all its text",
    "record": "one record of a site",
    "owner": "one owner inside a site, with all its records there",
}
"""Unit -> what is protected, in words."""

SITE_TRUST = "Each site is trusted with its own records: it draws who takes part, clips, adds the noise, and sends one sum a slot."

_OTHER_SITE = "another site: the adapter of each round, and its own"
_PUBLIC = "the model, and at most the noised sum of all sites in each slot"
SEES = {
    "local": {
        "server": "one noised sum of each site in each slot, and which site sent it",
        "clients": f"{_OTHER_SITE} noise",
        "public": _PUBLIC,
    },
    "secure-aggregation": {
        "server": "the noised sum of all sites in each slot, and which sites answered",
        "clients": f"{_OTHER_SITE} share of the noise",
        "public": _PUBLIC,
    },
}
"""Trust -> observer -> what it sees, in words."""

_TIME = "How long a site computes is not hidden: whoever measures that is trusted."
NOT_PROTECTED = {
    "record": f"A person with several records: epsilon is that of each record, and larger for all together. {_TIME}",
    "owner": f"An owner at two sites, or under two names, as one: epsilon is that of each, and larger for both together. {_TIME}",
}
"""Unit -> what the promise leaves out, in words."""


def unit_terms(ledger: Ledger) -> dict[str, Any]:
    """What a certificate says beside epsilon where the unit is inside a site. JSON-ready."""
    plan = ledger.plan
    return {
        "protects": UNITS[plan.unit],
        "sites": plan.population,
        "assumed_public": {
            "units_per_site": plan.site_units,
            "sampling_rate": plan.sampling_rate,
            "stage1_rate": plan.stage1_rate,
            "mean_divided_by": plan.expected_cohort,
            "stage1_mean_divided_by": plan.stage1_cohort,
        },
        "private": f"How many {plan.unit}s a site has and which of them took part: no number here comes from them.",
        "amplification": "Each unit takes part by a draw that its site keeps secret, so sub-sampling counts against every observer.",
        "sees": SEES[plan.trust],
        "not_protected": NOT_PROTECTED[plan.unit],
        "by_site": site_epsilons(ledger),
    }


def site_epsilons(ledger: Ledger) -> list[dict[str, Any]]:
    """JSON-ready rows, sites with the same slots together and those with the largest epsilon first: `sites`, `slots` (how many), `epsilon`, which
    has for each adjacency one number for each observer, and `events`, of which dp_accounting makes the same numbers: for each observer what is
    composed. Empty where the unit is a client."""
    plan, charged, unasked = ledger.plan, ledger.charged(), ledger.unasked()
    if not plan.curated:
        return []
    sites_of: dict[tuple[int, ...], list[int]] = {}
    for site in range(plan.population):
        slots = tuple(slot for slot in charged if site not in unasked.get(slot, ()))
        sites_of.setdefault(slots, []).append(site)
    rows = []
    for slots, sites in sites_of.items():
        own = {slot: charged[slot] for slot in slots}
        epsilon = {name: epsilons_by_observer(plan, own, name, REPORT_INTERVAL) for name in RELATIONS}
        events = {who: [event_to_dict(event) for event in plan.composition(who, own) or ()] for who in OBSERVERS}
        rows.append({"sites": sites, "slots": len(slots), "epsilon": epsilon, "events": events})
    return sorted(rows, key=lambda row: (-row["epsilon"][plan.relation][plan.budget_observer], row["sites"]))
