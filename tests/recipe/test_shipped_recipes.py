"""The paper's recipes: the published numbers, what a plan says of them, and a twin that runs on the embedded model."""

import pytest

from drencoder.errors import PrivacyError
from drencoder.recipe.recipe import Recipe, load_recipe, shipped_recipes
from drencoder.runs.plan_overview import survey
from drencoder.study.methods import METHODS, start_rates
from drencoder.study.settings import load_comparison

PAPER = [name for name in shipped_recipes() if name.startswith("paper/") and "embedded" not in name]
EMBEDDED = [name for name in shipped_recipes() if name.startswith("paper/embedded")]

# Setting -> clients, clients a round, rounds, local learning rate, batch, rank, local epochs (CG-FedLLM, arXiv 2405.13746).
PUBLISHED = {
    "dolly": (100, 5, 20, 1.5e-4, 32, 8, 1),
    "mmlu": (3, 3, 8, 3.5e-4, 8, 8, 2),
    "ceval": (3, 3, 5, 2e-4, 24, 16, 3),
}


def setting_of(recipe: Recipe) -> tuple[float, ...]:
    federation, local = recipe.federation, recipe.local
    cohort = round(federation.population * federation.sampling_rate)
    rate, batch, rank = local.learning_rate, local.batch_size, recipe.adapter.rank
    return federation.population, cohort, federation.rounds, rate, batch, rank, local.epochs


def test_every_model_meets_every_setting() -> None:
    assert sorted(PAPER) == sorted(f"paper/{model}-7b-{name}" for model in ("llama", "qwen") for name in PUBLISHED)
    assert set(EMBEDDED) >= {f"paper/embedded-{name}" for name in PUBLISHED}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("epsilon", [0.25, 2.0, 8.0])
def test_paper_recipes_hold_the_published_numbers_and_can_be_planned(name: str, epsilon: float) -> None:
    recipe = load_recipe(name, [f"privacy.epsilon={epsilon}"])
    assert setting_of(recipe) == PUBLISHED[name.rpartition("-")[2]]
    assert recipe.encoder.name == "autoencoder-published"
    assert (recipe.privacy.trust, recipe.privacy.noise_in) == ("local", "update")
    overview = survey(recipe)
    assert overview.adapter_size == 8_388_608 * recipe.adapter.rank // 8
    assert overview.adapter_size == 64 * (overview.code_size or 0)
    assert epsilon - 2e-3 <= overview.privacy.epsilons()["server"].epsilon_pld <= epsilon
    # Statistics instead of gradients: four numbers for each of 128 matrices.
    cohort, bytes_each = (
        overview.privacy.stage1_cohort,
        2 if epsilon == 8 and recipe.local.epochs == 1 else 3,
    )  # more noise needs more bits
    assert overview.stage1_bytes == round(cohort * (20 + bytes_each * 4 * 128 * recipe.local.epochs))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_twins_have_the_same_federation_and_choices(name: str) -> None:
    twin, paper = load_recipe(f"paper/embedded-{name}"), load_recipe(f"paper/llama-7b-{name}")
    changed = {"local.learning_rate": paper.local.learning_rate}
    assert setting_of(twin.changed(changed)) == PUBLISHED[name]
    assert twin.privacy == paper.privacy
    assert twin.server == paper.server
    assert twin.encoder == paper.encoder


@pytest.mark.parametrize("name", EMBEDDED)
def test_twins_can_be_compared_by_every_method_they_name(name: str) -> None:
    recipe, settings = load_comparison(name)
    rates = start_rates(settings.rates)
    for method in (METHODS[each] for each in settings.methods):
        for epsilon in settings.epsilons:
            survey(method.recipe(recipe, epsilon=epsilon, seed=0, rate=method.first_rate(recipe, rates)))


def test_three_clients_at_epsilon_2_can_learn_less_than_one_coordinate() -> None:
    overview = survey(
        load_recipe("paper/qwen-7b-mmlu", ["privacy.trust=central", "prior.source=none", "encoder.name=identity"])
    )
    # n^2 |g|^2 / (sigma C)^2 with n = 3 and mu = sqrt(8) / sigma = 0.5016: sigma = 5.64.
    assert overview.privacy.k_star(alignment=1.0) == pytest.approx(9 / 5.64**2, rel=0.01)
    assert any("less than one coordinate" in sentence for sentence in overview.warnings())


def test_the_dolly_setting_says_that_it_cannot_learn_and_the_crowd_does_not() -> None:
    assert any("cannot learn" in sentence for sentence in survey(load_recipe("paper/llama-7b-dolly")).warnings())
    assert survey(load_recipe("paper/embedded-crowd")).warnings() == []


def test_a_noise_multiplier_beside_epsilon_is_checked_and_not_obeyed() -> None:
    calibrated = survey(load_recipe("quickstart", ["privacy.epsilon=4"])).privacy
    for share, trust in ((0.5, "local"), (0.9, "central"), (0.5, "secure-aggregation")):
        plan = survey(load_recipe("quickstart", ["privacy.epsilon=4", f"privacy.trust={trust}"])).privacy
        noise = f"privacy.noise_multiplier={share * plan.noise_multiplier}"
        with pytest.raises(PrivacyError, match=r"costs epsilon [\d.]+; the budget is 4\.0"):
            survey(load_recipe("quickstart", ["privacy.epsilon=4", f"privacy.trust={trust}", noise]))
    more = f"privacy.noise_multiplier={2 * calibrated.noise_multiplier}"
    plan = survey(load_recipe("quickstart", ["privacy.epsilon=4", more])).privacy
    assert plan.noise_multiplier == 2 * calibrated.noise_multiplier
    assert plan.budget == 4
    assert plan.epsilons()["server"].epsilon_pld < 4
