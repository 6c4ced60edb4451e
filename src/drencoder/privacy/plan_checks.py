"""Bounds of a privacy plan's facts. Each refusal is one sentence with the value, the bound and the cure."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import RELATIONS

if TYPE_CHECKING:
    from drencoder.privacy.plan import PrivacyPlan

_LEAST_NOISE, _MOST_NOISE = 1e-4, 1e6  # beyond them floating point numbers end before epsilon does

_SHARE_FIELDS = {"dropout_share", "honest_share"}
_UNIT_FIELDS = {"unit", "site_units"}

Trust = Literal["local", "central", "secure-aggregation"]
Noise = Literal["secure", "replay"]
Stage = Literal["stage1", "round"]
Unit = Literal["client", "record", "owner"]


def refuse(value: str, bound: str, cure: str) -> NoReturn:
    """Raises `PrivacyError`: "VALUE; BOUND: CURE."."""
    raise PrivacyError(f"{value}; {bound}: {cure}.")


def unused_fields(trust: object, unit: object) -> set[str]:
    """Fields that say nothing under this trust and unit: ledgers leave them out, and look as they did before there were any."""
    return (set() if trust == "secure-aggregation" else _SHARE_FIELDS) | (_UNIT_FIELDS if unit == "client" else set())


def check_facts(plan: "PrivacyPlan") -> None:
    """Refuses a plan with a field out of its bounds."""
    _refuse_first(_rules_of_all(plan))
    if plan.curated:
        _refuse_first(_rules_of_sites(plan))
    if plan.delta * plan.units >= 1:
        units = f"{plan.unit}s"
        refuse(
            f"delta is {plan.delta} with {plan.units} {units}",
            f"delta must be below 1 / {'population' if plan.unit == 'client' else f'number of {units}'}, else publishing one {plan.unit}'s data whole would pass",
            f"use {0.1 / plan.units:.0e} or less",
        )
    if plan.trust == "secure-aggregation":
        _refuse_first(_rules_of_shares(plan))


def check_noise(epsilon: float | None, noise_multiplier: float | None, stage1_noise_ratio: float) -> None:
    """Bounds of what a plan is calibrated from."""
    _refuse_first(_rules_of_noise(epsilon, noise_multiplier, stage1_noise_ratio))


_Rules = Iterator[tuple[bool, str, str, str]]  # whether it is broken, and the value, the bound and the cure


def _refuse_first(rules: _Rules) -> None:
    """Refuses for the first rule that is broken; those after it are not looked at."""
    for broken, *words in rules:
        if broken:
            refuse(*words)


# fmt: off
def _rules_of_all(plan: "PrivacyPlan") -> _Rules:
    for name, kinds in {"trust": get_args(Trust), "relation": RELATIONS, "noise": get_args(Noise), "unit": get_args(Unit)}.items():
        value = getattr(plan, name)
        yield value not in kinds, f"{name} is {value!r}", f"it is one of {', '.join(kinds)}", "choose one of these"
    for name in ("population", "rounds", "participation_cap"):
        value = getattr(plan, name)
        yield not isinstance(value, int) or value < 1, f"{name} is {value}", "it must be a whole number of at least 1", "raise it"
    rate, first, delta = plan.sampling_rate, plan.stage1_rate, plan.delta
    yield not 0 < rate <= 1, f"sampling_rate is {rate}", "it must lie in (0, 1]", "use cohort / population"
    yield not 0 <= first <= 1, f"stage1_rate is {first}", "it must lie in [0, 1]", "0 means no stage 1"
    yield not 0 < delta < 1, f"delta is {delta}", "it must lie strictly between 0 and 1", "use 1e-5 or less"


def _rules_of_sites(plan: "PrivacyPlan") -> _Rules:
    """For plans whose unit is inside a site."""
    unit, count, stages = plan.unit, plan.site_units, " and ".join(plan.non_private)
    yield (type(count) is not int or count < 1, f"site_units is {count}",
           f"it must be how many {unit}s everybody takes a site to have, at least 1", "name a number that does not come from the records")
    yield (plan.trust == "central", f"trust is 'central' and the unit is '{unit}'", "each site adds the noise itself",
           "use 'local', or 'secure-aggregation' for nearly as little noise as a trusted server would add")
    yield (bool(stages), f"{stages} would have no noise and the unit is '{unit}'", "a site sends nothing without noise",
           "use the unit 'client' for a baseline")


def _rules_of_shares(plan: "PrivacyPlan") -> _Rules:
    """For the fields that only secure aggregation has."""
    lost, honest, stages = plan.dropout_share, plan.honest_share, " and ".join(plan.non_private)
    yield not 0 <= lost < 0.5, f"dropout_share is {lost}", "it must lie in [0, 0.5)", "0.25 is usual"
    yield not 0 < honest <= 1, f"honest_share is {honest}", "it must lie in (0, 1]", "0.75 is usual"
    yield (bool(stages), f"{stages} would have no noise", "secure aggregation without noise tells the sum as it is",
           "use prior.source 'moments', or another trust for a baseline")
    yield (plan.nonlinear_decoding, "Codes would be decoded or rounded one by one", "secure aggregation gives only their sum",
           "use a linear encoder and float32")


def _rules_of_noise(epsilon: float | None, sigma: float | None, ratio: float) -> _Rules:
    yield not 0 < ratio < math.inf, f"stage1_noise_ratio is {ratio}", "it must be positive and finite", "1 is usual"
    yield epsilon is not None and not 0 < epsilon < math.inf, f"epsilon is {epsilon}", "it must be positive and finite", "1 to 8 is usual"
    yield (sigma is not None and not _LEAST_NOISE <= sigma <= _MOST_NOISE, f"noise_multiplier is {sigma}",
           f"it must lie between {_LEAST_NOISE:g} and {_MOST_NOISE:g}",
           "leave it out to have it found from epsilon, or name the stage in non_private")
# fmt: on
