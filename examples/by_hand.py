"""One private round by hand: a client's text -> update -> code -> clip -> noise -> sum -> adapter.

    python examples/by_hand.py

Local trust, ten clients of the embedded world. Everything that leaves a client is in `upload`; everything that is
charged is in the ledger this prints.
"""

import tempfile
from pathlib import Path

from drencoder import load_recipe
from drencoder.data.sources import open_source
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.federated.query import update_query
from drencoder.federated.round import client_message, released_update, server_release
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel, load_base
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.mechanism import SecureNoise
from drencoder.privacy.plan import make_plan
from drencoder.recipe import recipe as config
from drencoder.runs.build import Texts

# The plan: sampler, noise and events are born together. One release of one client costs epsilon 8 at most.
plan = make_plan(trust="local", epsilon=8.0, delta=1e-3, population=100, sampling_rate=0.1, rounds=1)
print(f"noise multiplier {plan.noise_multiplier:.3f}, expected cohort {plan.expected_cohort:.0f}")

# Public things: base model, adapter, encoder. The encoder keeps 1/64 of the values, fresh directions each round.
recipe = load_recipe("quickstart", ["federation.population=100"])
base = load_base(config.Model())
lora = LoraModel(base, recipe.adapter, seed=0)
encoder = RandomSketch.build(lora.layout.segments, lora.layout.size // 64)
query = update_query(encoder, recipe, slot=1)
state = ServerState.start(lora.initial_D)

with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder) / "ledger.jsonl", plan) as ledger:
    permit = ledger.charge(1)  # on disk from here on; without a permit nothing is noised and nothing leaves
    cohort = list(permit.cohort)  # who takes part

    # A client. Its text and its update stay here; the messages are what leaves.
    texts = Texts(open_source(recipe.data, population=100, seed=0), base, recipe.data.max_tokens, d1_share=0.0)
    update_ND = cohort_updates(lora, state.adapter_D, [texts.client(c, 1) for c in cohort], recipe.local, cohort)
    upload = client_message(query, update_ND, cohort, permit, SecureNoise())
    print(f"{len(cohort)} clients sent {len(upload.messages[0])} bytes each, instead of {4 * lora.layout.size}")

    # The server. It sees noised codes only, adds them up, divides by the fixed expected size, decodes, steps.
    outcome = server_release(query, [upload], permit, SecureNoise())
    ledger.record_contributors(1, len(cohort))
    direction_D = released_update(query, outcome.release, permit, plan.expected_cohort)
    state = server_step(state, direction_D, recipe.server, recipe.server.learning_rate)

    for observer, guarantee in ledger.guarantees().items():
        print(f"against {observer}: epsilon {guarantee.epsilon_pld:.3f}. {guarantee.assumption}")
    print((Path(folder) / "ledger.jsonl").read_text())
