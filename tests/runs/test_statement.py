"""The promise in one sentence names the adjacency that its epsilon is for, and the epsilon of whom it speaks of."""

import pytest

from drencoder.privacy.accounting import RELATIONS, Relation
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.plan import Trust
from drencoder.runs import certificate

WORDS = {"add_remove": "for adding or removing one client", "replace_one": "for replacing one client"}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("trust", ["local", "central", "secure-aggregation"])
def test_the_statement_names_its_adjacency_and_its_epsilon(trust: Trust, relation: Relation) -> None:
    plan = make_plan(
        trust=trust, population=2000, sampling_rate=0.05, rounds=4, delta=1e-5, epsilon=6.0, relation=relation
    )  # fmt: skip
    observers = {name: one.to_dict() for name, one in plan.epsilons().items()}
    said = certificate._statement(plan, observers, simulated=False)
    assert WORDS[relation] in said
    assert not any(words in said for other, words in WORDS.items() if other != relation)
    cost = observers[plan.budget_observer]["by_relation"][relation]["epsilon_pld"]
    assert f"({cost:.3f}, 1e-05)-differential privacy" in said
