"""What a run could protect with the user's data: a client, an owner inside a site, or a record, side by side. No torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from drencoder.data.survey import DataSurvey
from drencoder.errors import PrivacyError, RecipeError
from drencoder.privacy.site_epsilons import UNITS
from drencoder.recipe.recipe import Recipe
from drencoder.runs.plan_overview import privacy_plan

NOTHING, LITTLE = 4.0, 64.0  # coordinates a round: below, nothing is learned; below, less than without noise


@dataclass(frozen=True)
class UnitRow:
    """A unit under the recipe's epsilon, delta, rounds and sampling rate. `units` is N; `site_units` 0 where the unit is a client."""

    unit: str
    protects: str
    trust: str
    units: int
    site_units: int
    sampling_rate: float
    noise_multiplier: float
    k_star: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare_units(recipe: Recipe, survey: DataSurvey | None) -> list[UnitRow]:
    """One row for each unit that the data allow, the strongest promise first; none where only one does, or there is no noise.

    Of the recipe's own unit the row has the recipe's number of units; of the others that of the data, which a recipe would have
    to name as a public number.
    """
    if survey is None or not recipe.data.client_field or recipe.privacy.trust == "non-private":
        return []
    rows = []
    for unit, count in (("client", survey.clients), ("owner", survey.owners), ("record", survey.records)):
        if not count or (unit != "client" and count < 2 * survey.clients):
            continue
        changed = recipe if unit == recipe.privacy.unit else with_unit(recipe, unit, -(-count // survey.clients))
        try:
            plan = None if changed is None else privacy_plan(changed)
        except (PrivacyError, RecipeError):
            plan = None
        if plan is not None:
            rows.append(
                UnitRow(
                    unit, UNITS[unit], plan.trust, plan.units, plan.site_units, plan.sampling_rate, plan.noise_multiplier,
                    plan.k_star(), verdict_of(plan.k_star()),
                )
            )  # fmt: skip
    return rows if len(rows) > 1 else []


def with_unit(recipe: Recipe, unit: str, site_units: int) -> Recipe | None:
    """The recipe with another unit; None if its other knobs do not go with it. A site adds its noise itself: a trusted server's
    place is taken by secure aggregation."""
    privacy, federation = recipe.privacy, recipe.federation
    rate = recipe.sampling_rate  # of another unit, too: the rows differ in nothing but the unit
    changes: dict[str, Any] = {
        "privacy.unit": unit,
        "federation.units_per_site": site_units,
        "federation.sampling_rate": rate,
    }
    if unit != "client" and privacy.trust == "central":
        changes["privacy.trust"] = "secure-aggregation"
    if unit == "client":  # a cap that the rate needs: of sites there is none
        slots = rate * federation.rounds + recipe.stage1_rate
        changes["privacy.participation_cap"] = max(privacy.participation_cap, math.ceil(slots) + 1)
    try:
        return recipe.changed(changes)
    except RecipeError:
        return None


def other_number(recipe: Recipe, survey: DataSurvey | None) -> str:
    """A sentence if the data have far more or fewer units a site than the recipe says, for the screen of whoever holds them; else ""."""
    unit, named = recipe.privacy.unit, recipe.federation.units_per_site
    if survey is None or unit == "client":
        return ""
    units = (survey.owners if unit == "owner" else survey.records) or 0
    mean = units / max(1, survey.clients)
    if named / 2 <= mean <= named * 2:
        return ""
    return (
        f"These data have about {mean:,.0f} {unit}s a site and federation.units_per_site = {named:,}, by which means are divided: steps "
        f"will be about {mean / named:.2g} times as long as planned."
    )


def k_star_text(k_star: float) -> str:
    """k* for people: whole, and two digits of it where it is small."""
    return f"{k_star:,.0f}" if k_star >= 10 else f"{k_star:.2g}"


def verdict_of(k_star: float) -> str:
    """What a round can learn, in words."""
    if k_star < NOTHING:
        return "nothing can be learned"
    return "little can be learned" if k_star < LITTLE else "a round can learn"
