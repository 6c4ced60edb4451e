"""Privacy events as data, and what a composition of them costs: the one door to dp_accounting.

An event describes one release for one client's contribution of norm at most C, with Gaussian noise of
standard deviation `noise_multiplier` * C on the joint vector. Its meaning never changes; an unknown
kind raises. The adjacency is a separate argument: under `add_remove` a contribution appears or
vanishes (shift C), under `replace_one` it turns into another (shift 2C, *same* noise multiplier).

- PLD (Koskela et al. 2020, arXiv 1906.03049; connect-the-dots: Doroshenko et al. 2022, arXiv 2207.04380)
  is the reported number. The discretisation is pessimistic: a finer grid only lowers the bound.
- Compositions without sub-sampling are a single Gaussian with mu^2 = sum of (shift/noise)^2 (Dong,
  Roth & Su 2019, arXiv 1905.02383, cor. 3.3), whose epsilon(delta) is exact (Balle & Wang 2018,
  arXiv 1805.06530, thm. 8).
- RDP (Mironov 2017, arXiv 1702.07476) stands beside it, an upper bound from other mathematics.
- The CLT for sub-sampling (Bu et al. 2020, arXiv 1911.11607, cor. 5.4) is an *approximation*, which is
  often far below the truth and never a guarantee.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from drencoder.errors import PrivacyError

if TYPE_CHECKING:  # importing dp_accounting takes 0.7 s, all of scipy: only functions that need it pay
    import dp_accounting
    import numpy as np
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Relation = Literal["add_remove", "replace_one"]
RELATIONS: tuple[Relation, ...] = ("add_remove", "replace_one")

REPORT_INTERVAL = 1e-4  # of certificates; dp_accounting's own default, so that others re-compute the same digits
QUICK_INTERVAL = 1e-3  # of plans and progress lines where it does: ten times faster, about 1e-5 higher
COARSE_INTERVAL = 1e-2  # of the first steps of a search only


@dataclass(frozen=True)
class GaussianEvent:
    """`count` releases with Gaussian noise of `noise_multiplier` * C, everybody's part certain."""

    noise_multiplier: float
    count: int = 1


@dataclass(frozen=True)
class PoissonGaussianEvent:
    """`count` such releases, each over a secret Poisson cohort of rate `sampling_rate`."""

    sampling_rate: float
    noise_multiplier: float
    count: int = 1


@dataclass(frozen=True)
class NonPrivateEvent:
    """`count` releases without noise. Every epsilon of a composition with one is infinite."""

    count: int = 1


Event: TypeAlias = GaussianEvent | PoissonGaussianEvent | NonPrivateEvent

_KINDS = {GaussianEvent: "gaussian", PoissonGaussianEvent: "poisson_gaussian", NonPrivateEvent: "non_private"}


def event_to_dict(event: Event) -> dict[str, Any]:
    """A JSON-ready form: the kind, and the fields."""
    return {"kind": _KINDS[type(event)], **asdict(event)}


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same multiset with equal events counted together; the order of first sight stays."""
    counts: dict[Event, int] = {}
    for event in events:
        one = replace(event, count=1)
        counts[one] = counts.get(one, 0) + event.count
    return tuple(replace(one, count=count) for one, count in counts.items() if count)


def to_dp_event(events: Iterable[Event]) -> "dp_accounting.DpEvent":
    """The only translation into dp_accounting's language."""
    import dp_accounting as dp

    def one(event: Event) -> dp.DpEvent:
        _check(event)
        match event:
            case GaussianEvent():
                single = dp.GaussianDpEvent(event.noise_multiplier)
            case PoissonGaussianEvent():
                gaussian = dp.GaussianDpEvent(event.noise_multiplier)
                single = dp.PoissonSampledDpEvent(event.sampling_rate, gaussian)
            case NonPrivateEvent():
                single = dp.NonPrivateDpEvent()
            case _:
                raise PrivacyError(f"Unknown privacy event {event!r}.")
        return dp.SelfComposedDpEvent(single, event.count)

    return dp.ComposedDpEvent([one(event) for event in events])


def epsilon_pld(events: Iterable[Event], delta: float, relation: Relation, interval: float | None = None) -> float:
    """The smallest provable epsilon at `delta`; infinite with a non-private event, 0 without events.

    Exact closed form where nothing is sub-sampled, else a privacy loss distribution on a grid of
    `interval`, rounded up (None: a grid coarse enough to be quick, whose error is below 2e-4 and 0.1 %). For
    Poisson sampling under `replace_one` the pair is (1-q) N(0) + q N(+-C), as dp_accounting has it
    (`AdjacencyType.REPLACE`; Schuchardt et al. 2024, arXiv 2403.04867): tighter than group privacy of two.
    """
    merged = merge(events)
    if any(isinstance(event, NonPrivateEvent) for event in merged):
        return math.inf
    mu = gdp_mu(merged, relation)
    if mu is not None:
        return epsilon_gaussian(mu, delta)
    if interval is not None:
        return _pld(merged, delta, relation, interval)
    quick = _pld(merged, delta, relation, QUICK_INTERVAL)
    if fine_enough(_pld(merged, delta, relation, COARSE_INTERVAL), quick):
        return quick
    return _pld(merged, delta, relation, REPORT_INTERVAL)


def fine_enough(ten_times_coarser: float, value: float) -> bool:
    """Whether a PLD's grid leaves an error below 2e-4 and 0.1 % in `value`, by the epsilon of a grid ten times coarser."""
    # The grid's error falls with the square of its interval, so the difference is 99 times what is left.
    return (ten_times_coarser - value) / 99 < min(2e-4, 1e-3 * value)


@lru_cache(maxsize=4096)
def _pld(events: tuple[Event, ...], delta: float, relation: Relation, interval: float) -> float:
    return float(_composed_pld(events, relation, interval).get_epsilon_for_delta(delta))


def delta_pld(
    events: Iterable[Event], epsilons: Sequence[float], relation: Relation, interval: float = QUICK_INTERVAL
) -> list[float]:
    """Upper bounds on delta(epsilon), one for each of `epsilons` (ascending, >= 0); from the grid, never closed form.

    Under `add_remove` the larger one of adding and removing. 1 with a non-private event, 0 without events.
    """
    merged = merge(events)
    if not merged or any(isinstance(event, NonPrivateEvent) for event in merged):
        return [1.0 if merged else 0.0] * len(epsilons)
    deltas = _composed_pld(merged, relation, interval).get_delta_for_epsilon(epsilons)
    return [min(1.0, max(0.0, float(delta))) for delta in deltas]


def _composed_pld(events: tuple[Event, ...], relation: Relation, interval: float) -> "PrivacyLossDistribution":
    """What dp_accounting's PLDAccountant composes, to the last bit, from kept parts. `events` are merged and all private."""
    from dp_accounting.pld.privacy_loss_distribution import identity

    composed = identity(value_discretization_interval=interval)
    for event in events:
        _check(event)
        if isinstance(event, GaussianEvent):  # a composition of equal Gaussians is one Gaussian
            part = _single_pld(GaussianEvent(event.noise_multiplier / math.sqrt(event.count)), relation, interval)
        else:
            part = _single_pld(replace(event, count=1), relation, interval).self_compose(event.count)
        composed = composed.compose(part)
    return composed


@lru_cache(maxsize=64)
def _single_pld(event: Event, relation: Relation, interval: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution

    assert isinstance(event, GaussianEvent | PoissonGaussianEvent)
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_rate if isinstance(event, PoissonGaussianEvent) else 1.0,
        neighboring_relation=_neighbours(relation),
    )


@lru_cache(maxsize=4096)
def _rdp(events: tuple[Event, ...], delta: float, relation: Relation) -> float:
    from dp_accounting.rdp import compute_epsilon

    singles = [(event.count, *_single_rdp(replace(event, count=1), relation)) for event in events]
    total = sum(count * rdp for count, _, rdp in singles)  # RDP adds up order by order (Mironov 2017, prop. 1)
    return float(compute_epsilon(singles[0][1], total, delta)[0])


@lru_cache(maxsize=256)
def _single_rdp(event: Event, relation: Relation) -> "tuple[np.ndarray, np.ndarray]":
    """(orders, RDP at each) of one release: the slow part, the same in every round."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=_neighbours(relation))
    log = logging.getLogger("absl")
    log.addFilter(_not_about_orders)
    try:
        accountant.compose(to_dp_event([event]))
    finally:
        log.removeFilter(_not_about_orders)
    return accountant.orders, accountant.rdp


def _not_about_orders(record: logging.LogRecord) -> bool:
    # dp_accounting leaves out an order whose series does not converge, which is sound, and warns each time.
    return "failed to converge" not in record.getMessage()


def epsilon_rdp(events: Iterable[Event], delta: float, relation: Relation) -> float | None:
    """Epsilon from Renyi DP; None where dp_accounting has no bound (Poisson under `replace_one`)."""
    merged = merge(events)
    if any(isinstance(event, NonPrivateEvent) for event in merged):
        return math.inf
    if relation == "replace_one":
        if gdp_mu(merged, relation) is None:
            return None
        # A shift of 2C under noise s*C is a shift of C under s*C/2. (RdpAccountant takes the relation's
        # shift as part of the noise multiplier, unlike PLDAccountant.)
        halved = [
            (event.noise_multiplier / 2, event.count) for event in merged if not isinstance(event, NonPrivateEvent)
        ]
        merged, relation = tuple(GaussianEvent(sigma, count) for sigma, count in halved), "add_remove"
    return _rdp(merged, delta, relation) if merged else 0.0


def gdp_mu(events: Iterable[Event], relation: Relation) -> float | None:
    """mu of exact Gaussian DP, sqrt(sum (shift/noise)^2); None when an event is sub-sampled."""
    shift = 1.0 if relation == "add_remove" else 2.0
    total, sampled = 0.0, False
    for event in events:
        if isinstance(event, NonPrivateEvent):
            return math.inf
        sampled |= isinstance(event, PoissonGaussianEvent) and event.sampling_rate < 1
        total += event.count * (shift / event.noise_multiplier) ** 2
    return None if sampled else math.sqrt(total)


def clt_mu(events: Iterable[Event]) -> float | None:
    """mu of the central limit, sqrt(sum q^2 (exp(1/sigma^2) - 1)), add/remove. NOT a guarantee."""
    total = 0.0
    for event in events:
        match event:
            case PoissonGaussianEvent() if event.sampling_rate < 1:
                exponent = event.noise_multiplier**-2
                if exponent > 100:  # far outside the limit's reach
                    return None
                total += event.count * event.sampling_rate**2 * math.expm1(exponent)
            case NonPrivateEvent():
                return None
            case _:
                total += event.count * event.noise_multiplier**-2
    return math.sqrt(total)


@lru_cache(maxsize=4096)
def epsilon_gaussian(mu: float, delta: float) -> float:
    """Exact epsilon at `delta` of a mu-GDP mechanism (Balle & Wang 2018, thm. 8)."""
    import dp_accounting as dp

    if mu in (0, math.inf):
        return mu
    with _tiny_numbers():
        return float(dp.get_epsilon_gaussian(1 / mu, delta))


def sigma_gaussian(epsilon: float, delta: float) -> float:
    """Inverse of `epsilon_gaussian`: the noise multiplier 1/mu that costs `epsilon`, from above."""
    import dp_accounting as dp

    with _tiny_numbers():
        return float(dp.get_sigma_gaussian(epsilon, delta)) * (1 + 1e-9)  # the root's own error, on the safe side


def _tiny_numbers() -> "np.errstate":
    """dp_accounting takes the logarithm of 0 on its way to a delta that is 0, which is right; numpy would warn."""
    import numpy as np

    return np.errstate(divide="ignore")


def _neighbours(relation: Relation) -> "dp_accounting.NeighboringRelation":
    import dp_accounting as dp

    members = {
        "add_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": dp.NeighboringRelation.REPLACE_ONE,
    }
    return members[relation]


def _check(event: Event) -> None:
    if event.count < 1 or int(event.count) != event.count:
        raise PrivacyError(f"A privacy event has count {event.count}; it must be a whole number of at least 1.")
    if not isinstance(event, NonPrivateEvent) and not 0 < event.noise_multiplier < math.inf:
        raise PrivacyError(
            f"A privacy event has noise multiplier {event.noise_multiplier}; it must be positive and finite. "
            "A release without noise is the kind 'non_private'."
        )
    if isinstance(event, PoissonGaussianEvent) and not 0 < event.sampling_rate <= 1:
        raise PrivacyError(f"A privacy event has sampling rate {event.sampling_rate}; it must lie in (0, 1].")
