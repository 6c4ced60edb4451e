"""What a plan comes to, in words: whether so many clients under this trust and epsilon can teach anything. No torch."""

from dataclasses import replace
from math import floor

from drencoder.errors import PrivacyError, RecipeError
from drencoder.federated.server_rate import planned_rate
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Recipe
from drencoder.runs.plan_overview import privacy_plan
from drencoder.runs.unit_table import LITTLE, k_star_text, verdict_of, with_unit

_TRUSTS = {"local": "local trust", "central": "central trust", "secure-aggregation": "secure aggregation"}


def judge(recipe: Recipe, plan: PrivacyPlan, records: int | None = None) -> list[str]:
    """One sentence on what the clients can teach under the plan; if that is little, others on what would help.

    `records` is how many records all clients have, if that is known.
    """
    if plan.non_private or not plan.noise_multiplier:
        return []
    k_star, trust = plan.k_star(), recipe.privacy.trust
    epsilon = recipe.privacy.epsilon
    who = f"{plan.population:,} {'owners' if recipe.data.client_field else 'clients'}"
    if plan.curated:
        who = f"{plan.units:,} {plan.unit}s at {plan.population:,} sites"
    begin = f"{who} under {_TRUSTS[trust]} at epsilon {epsilon:g}"
    if k_star >= LITTLE:
        return [f"{begin}: k* {k_star_text(k_star)}, so a round can learn."]
    sentences = [f"{begin}: k* {k_star_text(k_star)}, {verdict_of(k_star)}{_what_noise_may_do(recipe, plan)}."]
    others = {_TRUSTS[other]: _k_star(recipe, other) for other in _TRUSTS if other != trust}
    better = {name: value for name, value in others.items() if value is not None and value > 1.5 * k_star}
    if better:
        given = [f"{name} would give k* {k_star_text(value)}" for name, value in better.items()]
        sentences.append(f"{'; '.join(given)[:1].upper()}{'; '.join(given)[1:]}.")
    most = floor(1000 * recipe.rate_within_cap) / 1000
    if recipe.sampling_rate < most:
        more = _k_star(replace(recipe, federation=replace(recipe.federation, sampling_rate=most)), trust)
        if more is not None and more > 1.5 * k_star:
            who = (
                f"every {plan.unit} in every round"
                if most == 1
                else "as many clients a round as the cap leaves room for"
            )
            sentences.append(f"With {who} (federation.sampling_rate = {most:g}) k* would be {k_star_text(more)}.")
    if records and records > 2 * plan.population and plan.unit == "client":
        single = with_unit(recipe, "record", -(-records // plan.population))
        alone = None if single is None else _k_star(single, single.privacy.trust)
        if alone is not None and alone > 1.5 * k_star:
            sentences.append(
                f"Record-level privacy, a weaker promise that protects one of the {records:,} records and not its owner, would give "
                f"k* {k_star_text(alone)}: set privacy.unit = 'record' and federation.units_per_site."
            )
    return sentences


def _what_noise_may_do(recipe: Recipe, plan: PrivacyPlan) -> str:
    """What little signal means for the server's step, unless the plan chose the step for it."""
    server = recipe.server
    if server.optimizer != "fedadam":
        return ", and the noise may leave the model worse than it was"
    chosen = planned_rate(replace(server, learning_rate=0.0), plan)
    if not server.learning_rate or server.learning_rate <= chosen:
        return ""
    return (
        f", and at server.learning_rate = {server.learning_rate:g} the noise may leave the model worse than it was: leave the rate out, and it "
        f"is {chosen:.2g}"
    )


def _k_star(recipe: Recipe, trust: str) -> float | None:
    """k* under another trust; None if the recipe's other knobs do not go with it."""
    try:
        return privacy_plan(replace(recipe, privacy=replace(recipe.privacy, trust=trust))).k_star()
    except (PrivacyError, RecipeError):
        return None
