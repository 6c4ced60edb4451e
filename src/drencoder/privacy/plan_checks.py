"""Bounds of a privacy plan's facts. Each refusal is one sentence with the value, the bound and the cure."""

import math
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
    """Bounds of the single fields; each refusal says the value, the bound and the cure."""
    for name, value, allowed in (
        ("trust", plan.trust, get_args(Trust)),
        ("relation", plan.relation, RELATIONS),
        ("noise", plan.noise, get_args(Noise)),
        ("unit", plan.unit, get_args(Unit)),
    ):
        if value not in allowed:
            refuse(f"{name} is {value!r}", f"it is one of {', '.join(allowed)}", "choose one of these")
    for name, number in (
        ("population", plan.population),
        ("rounds", plan.rounds),
        ("participation_cap", plan.participation_cap),
    ):
        if not isinstance(number, int) or number < 1:
            refuse(f"{name} is {number}", "it must be a whole number of at least 1", "raise it")
    if not 0 < plan.sampling_rate <= 1:
        refuse(f"sampling_rate is {plan.sampling_rate}", "it must lie in (0, 1]", "use cohort / population")
    if not 0 <= plan.stage1_rate <= 1:
        refuse(f"stage1_rate is {plan.stage1_rate}", "it must lie in [0, 1]", "0 means no stage 1")
    if not 0 < plan.delta < 1:
        refuse(f"delta is {plan.delta}", "it must lie strictly between 0 and 1", "use 1e-5 or less")
    if plan.curated:
        _check_sites(plan)
    if plan.delta * plan.units >= 1:
        units = f"{plan.unit}s"
        refuse(
            f"delta is {plan.delta} with {plan.units} {units}",
            f"delta must be below 1 / {'population' if plan.unit == 'client' else f'number of {units}'}, else publishing one {plan.unit}'s data whole would pass",
            f"use {0.1 / plan.units:.0e} or less",
        )
    if plan.trust == "secure-aggregation":
        _check_shares(plan)


def _check_sites(plan: "PrivacyPlan") -> None:
    """Bounds of plans whose unit is inside a site."""
    if type(plan.site_units) is not int or plan.site_units < 1:
        refuse(
            f"site_units is {plan.site_units}",
            f"it must be how many {plan.unit}s everybody takes a site to have, at least 1",
            "name a number that does not come from the records",
        )
    if plan.trust == "central":
        refuse(
            f"trust is 'central' and the unit is '{plan.unit}'",
            "each site adds the noise itself",
            "use 'local', or 'secure-aggregation' for nearly as little noise as a trusted server would add",
        )
    if plan.non_private:
        refuse(
            f"{' and '.join(plan.non_private)} would have no noise and the unit is '{plan.unit}'",
            "a site sends nothing without noise",
            "use the unit 'client' for a baseline",
        )


def _check_shares(plan: "PrivacyPlan") -> None:
    """Bounds of the fields that only secure aggregation has."""
    if not 0 <= plan.dropout_share < 0.5:
        refuse(f"dropout_share is {plan.dropout_share}", "it must lie in [0, 0.5)", "0.25 is usual")
    if not 0 < plan.honest_share <= 1:
        refuse(f"honest_share is {plan.honest_share}", "it must lie in (0, 1]", "0.75 is usual")
    if plan.non_private:
        refuse(
            f"{' and '.join(plan.non_private)} would have no noise",
            "secure aggregation without noise tells the sum as it is",
            "use prior.source 'moments', or another trust for a baseline",
        )
    if plan.nonlinear_decoding:
        refuse(
            "Codes would be decoded or rounded one by one",
            "secure aggregation gives only their sum",
            "use a linear encoder and float32",
        )


def check_noise(epsilon: float | None, noise_multiplier: float | None, stage1_noise_ratio: float) -> None:
    """Bounds of what a plan is calibrated from."""
    if not 0 < stage1_noise_ratio < math.inf:
        refuse(f"stage1_noise_ratio is {stage1_noise_ratio}", "it must be positive and finite", "1 is usual")
    if epsilon is not None and not 0 < epsilon < math.inf:
        refuse(f"epsilon is {epsilon}", "it must be positive and finite", "1 to 8 is usual")
    if noise_multiplier is not None and not _LEAST_NOISE <= noise_multiplier <= _MOST_NOISE:
        refuse(
            f"noise_multiplier is {noise_multiplier}",
            f"it must lie between {_LEAST_NOISE:g} and {_MOST_NOISE:g}",
            "leave it out to have it found from epsilon, or name the stage in non_private",
        )
