"""Who looks on, what each one's guarantee rests on, and the epsilons that are stated for it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from drencoder.privacy.accounting import Event, Relation, clt_mu, epsilon_gaussian, epsilon_pld, epsilon_rdp, gdp_mu

if TYPE_CHECKING:
    from drencoder.privacy.plan import PrivacyPlan

OBSERVERS = ("server", "clients", "public")

ASSUMPTIONS = {
    ("central", "server"): "No guarantee: the server is trusted, it sees the un-noised sum of a round.",
    ("central", "clients"): "The server adds the noise, keeps cohorts and sums secret, and does not collude.",
    ("central", "public"): "The server adds the noise, keeps cohorts and sums secret, and does not collude.",
    ("local", "server"): "No assumption about others: each client adds its full noise itself and keeps to the cap.",
    ("local", "clients"): "All other contributors of a round add their noise honestly; the observer is one "
    "client, knows its own noise, and colludes neither with the server nor with another client.",
    ("local", "public"): "All other contributors of a round add their noise honestly; the observer sees only sums "
    "and the model, and colludes neither with the server nor with a client.",
    ("secure-aggregation", "server"): "The stated share of a round's contributors add their noise and keep it to "
    "themselves; the others may tell the server everything. Fewer nodes collude than secure aggregation's threshold allows.",
    ("secure-aggregation", "clients"): "The observer is one of the honest contributors, who knows its own noise; the "
    "others are as against the server.",
    ("secure-aggregation", "public"): "As against the server: all that the public sees, the server has seen.",
}
"""(trust, observer) -> what the guarantee rests on, where the unit is a client."""

_OWN_SITE = "The unit's own site keeps its records and its draw to itself, clips each unit's code, and adds its "
_FULL, _SHARE = _OWN_SITE + "full noise", _OWN_SITE + "share of the noise. "
_AND_OTHERS = _FULL + ", and so do all other sites of a slot; the observer "
SITE_ASSUMPTIONS = {
    ("local", "server"): _FULL + ". Nothing is assumed of other sites.",
    ("local", "clients"): _AND_OTHERS
    + "is one site, knows its own noise, and colludes neither with the server nor with another "
    "site.",
    ("local", "public"): _AND_OTHERS
    + "sees only sums and the model, and colludes neither with the server nor with a site.",
    ("secure-aggregation", "server"): _SHARE
    + "The stated share of a slot's sites add theirs and keep them to themselves; the "
    "others may tell the server everything. Fewer nodes collude than secure aggregation's threshold allows.",
    ("secure-aggregation", "clients"): _SHARE
    + "The observer is one of the honest sites, which knows its own noise; the others "
    "are as against the server.",
    ("secure-aggregation", "public"): ASSUMPTIONS["secure-aggregation", "public"],
}
"""(trust, observer) -> what the guarantee rests on, where the unit is a record or an owner inside a site; "clients" are sites."""


@dataclass(frozen=True)
class EpsilonReport:
    """The cost of one composition under one adjacency.

    `epsilon_pld` is the reported number (exact where nothing is sub-sampled). `epsilon_rdp` is a looser bound,
    None where none is known. `mu` is exact Gaussian DP, None under sub-sampling. `epsilon_clt_approx`
    is NOT a guarantee: the central limit's approximation, given for comparison with the literature.
    """

    epsilon_pld: float
    epsilon_rdp: float | None
    mu: float | None
    epsilon_clt_approx: float | None


@dataclass(frozen=True)
class ObserverGuarantee:
    """What one observer learns at most, under the plan's adjacency; `by_relation` has both."""

    observer: str
    delta: float
    relation: Relation
    epsilon_pld: float
    epsilon_rdp: float | None
    mu: float | None
    epsilon_clt_approx: float | None
    by_relation: Mapping[Relation, EpsilonReport]
    events: tuple[Event, ...]
    assumption: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite epsilon is the string "inf", which JSON numbers cannot say."""
        data: dict[str, Any] = json_ready({k: v for k, v in asdict(self).items() if k != "events"})
        return data


def epsilons_by_observer(
    plan: "PrivacyPlan", charged: Mapping[int, tuple[int, int]], relation: Relation, interval: float | None = None
) -> dict[str, float]:
    """Observer -> PLD epsilon of the worst client, or of a site's units, after these charges: slot -> (charges, contributors)."""
    views = {name: plan.composition(name, charged) for name in OBSERVERS}
    return {
        name: math.inf if events is None else epsilon_pld(events, plan.gaussian_delta, relation, interval)
        for name, events in views.items()
    }


def report(events: tuple[Event, ...], delta: float, relation: Relation, interval: float | None) -> EpsilonReport:
    """All epsilons of one composition under one adjacency."""
    mu = gdp_mu(events, relation)
    limit = clt_mu(events) if mu is None and relation == "add_remove" else None
    return EpsilonReport(
        epsilon_pld=epsilon_pld(events, delta, relation, interval),
        epsilon_rdp=epsilon_rdp(events, delta, relation),
        mu=mu,
        epsilon_clt_approx=None if limit is None else epsilon_gaussian(limit, delta),
    )


def json_ready(value: Any) -> Any:
    """Tables and lists as JSON has them. It has no infinity: that becomes the string "inf"."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
