"""One private round, written out: a client's text -> update -> code -> clip -> noise -> sum -> adapter.

    python examples/by_hand.py

About ten clients of the embedded world take part, under local trust: the server is not trusted, so each client adds all of
its noise itself. Everything that leaves the clients is in `upload`. Everything that is paid for is in the ledger, which
the script prints at its end.

Legend: N clients, D adapter values.
"""

import tempfile
from pathlib import Path

from drencoder import load_recipe
from drencoder.data.sources import open_source
from drencoder.data.tokenization import Example
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.federated.query import update_query
from drencoder.federated.round import client_message, released_update, server_release
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.federated.server_rate import learning_rate
from drencoder.models.base_model import load_base, open_tokenizer
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.noise_source import SecureNoise

POPULATION, ROUND = 100, 1

# The plan decides three things together: who takes part, how much noise is added, and what that costs. Here each of 100
# clients is in the round with probability 0.1, and its one release costs epsilon 8 at most.
plan = make_plan(trust="local", epsilon=8.0, delta=1e-3, population=POPULATION, sampling_rate=0.1, rounds=1)
print(f"noise multiplier {plan.noise_multiplier:.3f}, expected cohort {plan.expected_cohort:.0f}")

# What everybody knows: the base model, where its adapter starts, and the encoder. The encoder projects an update onto random
# directions, 1/64 as many as the update has values. `query` is the question of this round, the clip norm included.
recipe = load_recipe("quickstart", [f"federation.population={POPULATION}"])
base = load_base(recipe.model)
lora = LoraModel(base, recipe.adapter, seed=0)
encoder = RandomSketch.build(lora.layout.segments, lora.layout.size // 64)
query = update_query(encoder, recipe, slot=ROUND)
state = ServerState.start(lora.initial_D)

# What only its owner knows: a client's text.
source = open_source(recipe.data, population=POPULATION, seed=0)
tokenizer = open_tokenizer(base, recipe.data)


def examples_of(client: int) -> list[Example]:
    """The tokenised records of one client."""
    return tokenizer.examples(source.client(client))


with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder) / "ledger.jsonl", plan) as ledger:
    # 1. Pay. The charge is on disk when `charge` returns. Without the permit nobody can add noise or release anything.
    permit = ledger.charge(ROUND)
    cohort = list(permit.cohort)

    # 2. The clients. Each one trains on its own text; its update is encoded, clipped and noised, and only then it is sent.
    update_ND = cohort_updates(lora, state.adapter_D, [examples_of(c) for c in cohort], recipe.local, seeds=cohort)
    upload = client_message(query, update_ND, cohort, permit, SecureNoise())
    sent, whole = sum(map(len, upload.messages)), 4 * lora.layout.size * len(cohort)
    print(f"{len(cohort)} clients sent {sent:,} bytes; their whole updates have {whole:,}")

    # 3. The server. It sees noised codes only. It adds them up, divides by the expected size of the cohort (never by the real
    #    one), decodes, and takes a step with its optimiser.
    outcome = server_release(query, [upload], permit, SecureNoise())
    ledger.record_contributors(ROUND, len(cohort))
    direction_D = released_update(query, outcome.release, permit, plan.expected_cohort)
    state = server_step(state, direction_D, recipe.server, learning_rate(recipe.server, plan, ROUND))

    # 4. What it cost, against each observer and under which assumption.
    for observer, guarantee in ledger.guarantees().items():
        print(f"against the {observer}: epsilon {guarantee.epsilon_pld:.3f}. {guarantee.assumption}")
    print((Path(folder) / "ledger.jsonl").read_text("utf-8"))
