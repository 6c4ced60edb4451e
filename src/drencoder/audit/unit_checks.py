"""Does a site do with its units what the certificate says: draw each with its rate and anew, and add its clipped code once?

Canaries inside a site show it. The draw is what a certificate counts as amplification against everybody; that a unit moves the sum by its own
clipped code, whoever else took part, is what the noise is measured by. Each test has a chance of a false alarm of one in a million.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np

from drencoder.audit.noise_checks import Check
from drencoder.audit.trials import Seen, Trial, promised_std, telling_values, trial_values
from drencoder.privacy.accounting import REPORT_INTERVAL
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.observers import epsilons_by_observer
from drencoder.privacy.plan import PrivacyPlan

_ALARM = 1e-6
_ROUNDING = 0.02  # what rounding to integers may move a weight by


def check_units(trials: Sequence[Trial], seen: Seen, rate: float) -> list[Check]:
    """Checks releases with canaries of sites in them; `rate` is what each unit's draw was charged with."""
    return [_check_rate(trials, rate), _check_draws_differ(trials, rate), _check_weight(trials, seen)]


def check_observers(ledger: Ledger, certificate: Mapping[str, Any]) -> Check:
    """Whether a certificate states for every observer what the run's charges and contributors, as its ledger has them, cost."""
    relation, low = ledger.plan.relation, []
    for who, guarantee in ledger.guarantees().items():
        row = certificate.get("observers", {}).get(who, {}).get("by_relation", {}).get(relation, {})
        stated, due = float(row.get("epsilon_pld", 0.0)), guarantee.by_relation[relation].epsilon_pld
        if stated < due * (1 - 1e-3):
            low.append(f"{due:.2f} is due against the {who}, and {stated:.2f} is stated")
    found = f"The certificate states too small an epsilon: {'; '.join(low)}."
    if not low:
        found = "The certificate states for every observer what the ledger's charges and contributors cost."
    return Check("the certificate's epsilon of every observer", not low, found)


def check_worst_site(plan: PrivacyPlan, certificate: Mapping[str, Any]) -> Check:
    """Whether what a certificate states of its worst site is what the audit compares whole runs with.

    A site that was asked in fewer slots, since the run ended early, is stated to have spent less.
    """
    name = "the certificate's epsilon of the worst site"
    rows = certificate.get("unit_terms", {}).get("by_site") or [{"slots": 0, "epsilon": {}}]
    stated = rows[0]["epsilon"].get(plan.relation, {})
    slots = plan.slots[: rows[0]["slots"]]
    due = epsilons_by_observer(plan, {slot: (1, plan.population) for slot in slots}, plan.relation, REPORT_INTERVAL)
    low = [who for who, epsilon in due.items() if float(stated.get(who, 0.0)) < epsilon * (1 - 1e-3) or not slots]
    found = f"The certificate states of its worst site what {len(slots)} slots cost, for every observer"
    if low:
        found = f"The certificate states too small an epsilon of its worst site against the {low[0]}: {due[low[0]]:.2f} is due"
    return Check(name, not low, f"{found}.")


def _check_rate(trials: Sequence[Trial], rate: float) -> Check:
    """The number of canaries that were drawn against the binomial law. Fewer would cost nobody privacy."""
    from scipy.stats import binom

    drawn = sum(len(trial.planted.clients) for trial in trials)
    offered = sum(trial.planted.offered for trial in trials)
    often = float(binom.sf(drawn - 1, offered, rate)) < _ALARM
    found = f"Sites drew {drawn} of {offered} units, each of which is charged for a chance of {rate:g}"
    found += ": more than the amplification counts on." if often else "."
    return Check("sites draw no more often than was charged", not often, found)


def _check_draws_differ(trials: Sequence[Trial], rate: float) -> Check:
    """How many units do the same in two releases, against independent draws."""
    from scipy.stats import binom

    name, same, compared = "no draw of a site comes twice", 0, 0
    for first, second in pairwise(trials):
        both = min(first.planted.offered, second.planted.offered)
        one, other = ({unit for unit in trial.planted.clients if unit < both} for trial in (first, second))
        same += both - len(one ^ other)
        compared += both
    chance = rate**2 + (1 - rate) ** 2
    alike = rate < 1 and compared > 0 and float(binom.sf(same - 1, compared, chance)) < _ALARM
    found = f"Of {compared} units {same} did the same in two releases"
    found += ": who saw one draw knows the next." if alike else ", as independent draws have it."
    return Check(name, not alike, found)


def _check_weight(trials: Sequence[Trial], seen: Seen) -> Check:
    """By what a unit's clipped code is multiplied before it is in what leaves its site: it must be 1."""
    products: dict[tuple[int, int], list[float]] = defaultdict(list)  # (trial, site) -> of canaries that sent something
    took_part: dict[tuple[int, int], int] = {}
    power = noise = 0.0
    for index, trial in enumerate(trials):
        values, own_NV = trial_values(trial, seen).double(), telling_values(trial, seen).double()
        sign_N = trial.planted.signs(range(len(own_NV))).double()
        along_N = (values * own_NV).sum(1) * sign_N
        sizes_N = own_NV.square().sum(1) * sign_N.abs()
        power += float(sizes_N.sum())
        noise += promised_std(trial, seen) ** 2 * float(sizes_N.sum())
        for site, along, size in zip(trial.planted.site_of, along_N.tolist(), sizes_N.tolist(), strict=True):
            took_part[index, site] = took_part.get((index, site), 0) + 1
            products[index, site] += [along / size] if size else []
    weights = {place: float(np.mean(values)) for place, values in products.items() if values}
    weight = sum(weights[place] * len(products[place]) for place in weights) / sum(map(len, products.values()))
    off = abs(weight - 1) > _ROUNDING + NormalDist().inv_cdf(1 - _ALARM / 2) * math.sqrt(noise) / power
    found = f"A unit moves what leaves its site by {weight:.2f} times its clipped code"
    if off and _follows_number(weights, {place: took_part[place] for place in weights}, weight):
        found += ", the less the more units took part: a site divides by how many came."
    elif off:
        found += ": it is counted more or less than once, or not clipped."
    return Check("a unit counts once, whoever else takes part", not off, found if off else f"{found}.")


def _follows_number(
    weights: dict[tuple[int, int], float], took_part: dict[tuple[int, int], int], weight: float
) -> bool:
    """Whether weights of sites are better explained by one over the number of units that took part than by one weight."""
    weight_S = np.array(list(weights.values()))
    count_S = np.array([took_part[place] for place in weights], dtype=float)
    share = float(weight_S.sum() / (1 / count_S).sum())  # least squares, each site with its number of units
    by_number = float((count_S * (weight_S - share / count_S) ** 2).sum())
    return by_number < float((count_S * (weight_S - weight) ** 2).sum())
