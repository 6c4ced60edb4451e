"""Training without a federation: the ceiling that federated and private runs are held against."""

from torch import Tensor

from drencoder.models.cohort_training import cohort_updates
from drencoder.recipe.recipe import Local
from drencoder.rng import derive_seed
from drencoder.runs.build import Live

__all__ = ["train_centralised"]

_BATCH = 32


def train_centralised(live: Live) -> Tensor:
    """LoRA trained by AdamW on pooled text, (D,) float32: as much text as all rounds of the federated run see.

    The text is that of the first q N T clients (or of all, in as many epochs as rounds ask each of them), in batches
    of 32. `local.learning_rate` is the learning rate. There is no clip, no noise and no guarantee.
    """
    plan, recipe = live.plan, live.recipe
    turns = plan.expected_cohort * plan.rounds
    num_clients = min(plan.population, max(1, round(turns)))
    epochs = max(1, round(turns / num_clients))
    pooled = [example for client in range(num_clients) for example in live.texts.client(client, slot=1)]
    local = Local(upload="increment", epochs=epochs, batch_size=_BATCH, learning_rate=recipe.local.learning_rate)
    seed = derive_seed(recipe.seed, "centralised")
    return live.lora.initial_D.cpu() + cohort_updates(live.lora, live.lora.initial_D, [pooled], local, [seed])[0].cpu()
