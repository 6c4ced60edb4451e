"""A plan says in words whether so many clients can teach anything, and what would help."""

import re

import pytest

from drencoder.federated.server_rate import planned_rate
from drencoder.recipe.recipe import Recipe, Server, load_recipe
from drencoder.runs.judgement import judge
from drencoder.runs.plan_overview import privacy_plan


def recipe_of(**changes: object) -> Recipe:
    known = {
        "data.client_field": "who",
        "data.source": "x.jsonl",
        "federation.sampling_rate": 0.33,
        "federation.rounds": 2,
    }
    return load_recipe().changed(known | {key.replace("__", "."): value for key, value in changes.items()})


def judged(recipe: Recipe, records: int | None = None) -> list[str]:
    return judge(recipe, privacy_plan(recipe), records)


@pytest.mark.parametrize(
    ("population", "epsilon", "words"),
    [(30, 2.0, "nothing can be learned"), (300, 4.0, "little can be learned"), (20_000, 8.0, "so a round can learn")],
)
def test_local_trust(population: int, epsilon: float, words: str) -> None:
    recipe = recipe_of(federation__population=population, privacy__epsilon=epsilon)
    told = judged(recipe, 50 * population)
    assert told[0].startswith(f"{population:,} owners under local trust at epsilon {epsilon:g}: k* ")
    assert words in told[0]
    better = [sentence for sentence in told if "central trust would give k*" in sentence.lower()]
    record_level = [sentence for sentence in told if sentence.startswith("Record-level privacy")]
    if "so a round" in words:
        assert told[1:] == []
        return
    assert len(better) == 1
    assert len(record_level) == 1
    central = recipe.changed({"privacy.trust": "central"})
    promised = float(re.search(r"entral trust would give k\* ([\d,.]*\d)", better[0])[1].replace(",", ""))  # type: ignore[index]
    assert promised == pytest.approx(privacy_plan(central).k_star(), rel=0.05)


@pytest.mark.parametrize(
    ("trust", "words", "rate"), [("local", "as the cap leaves room for", 0.333), ("central", "in every round", 1.0)]
)
def test_a_larger_cohort_is_recommended_as_far_as_it_may_go(trust: str, words: str, rate: float) -> None:
    """Under local trust a larger cohort costs no epsilon, but each client answers so often only."""
    few = recipe_of(
        federation__population=100, federation__sampling_rate=0.05, privacy__trust=trust, privacy__epsilon=4.0
    )
    assert "worse than it was" in judged(few)[0]
    (tip,) = [sentence for sentence in judged(few) if sentence.startswith("With ")]
    assert f"{words} (federation.sampling_rate = {rate:g})" in tip
    more = few.changed({"federation.sampling_rate": rate})
    promised = float(re.search(r"k\* would be ([\d,.]*\d)", tip)[1].replace(",", ""))  # type: ignore[index]
    assert promised == pytest.approx(privacy_plan(more).k_star(), rel=0.05)
    assert promised > 1.5 * privacy_plan(few).k_star()
    assert not any(sentence.startswith("With ") for sentence in judged(more))


def test_noise_is_warned_of_where_a_named_rate_is_too_long_for_it() -> None:
    knobs = {"federation__population": 100, "server__optimizer": "fedadam"}
    chosen = judged(recipe_of(**knobs, server__learning_rate=0.0))[0]
    named = judged(recipe_of(**knobs, server__learning_rate=0.02))[0]
    short = judged(recipe_of(**knobs, server__learning_rate=1e-5))[0]
    assert "worse than it was" not in chosen + short
    rate = planned_rate(Server(), privacy_plan(recipe_of(**knobs)))
    assert (
        f"at server.learning_rate = 0.02 the noise may leave the model worse than it was: leave the rate out, and it is {rate:.2g}."
        in named
    )


def test_what_does_not_go_with_the_recipe_is_not_recommended() -> None:
    recipe = recipe_of(federation__population=30, privacy__epsilon=2.0, encoder__wire_dtype="rotated4")
    assert not any("secure aggregation" in sentence for sentence in judged(recipe))


def test_without_noise_there_is_nothing_to_judge() -> None:
    assert judged(recipe_of(federation__population=30, privacy__trust="non-private")) == []
