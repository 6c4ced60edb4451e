"""An adapter that is a few steps into training: at LoRA's start B = 0, and the gradient of A, which an attack could read, is zero.

Legend: D adapter values.
"""

from collections.abc import Sequence

from torch import Tensor

from drencoder.data.tokenization import Example
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.models.cohort_training import cohort_updates
from drencoder.recipe import recipe as config
from drencoder.runs.build import Components

_STEPS = 4
_EXAMPLES = 32  # of each step
_SERVER = config.Server(optimizer="fedadam", learning_rate=0.001)


def warm_adapter(components: Components, texts: Sequence[Example] | None = None) -> Tensor:
    """The adapter (D,) after a few steps without noise on `texts` (default: the server's own); as it starts where there are none."""
    texts = components.texts.held_out(_STEPS * _EXAMPLES) if texts is None else texts
    state = ServerState.start(components.lora.initial_D)
    gradient = config.Local(upload="gradient", batch_size=_EXAMPLES)
    size = max(1, -(-len(texts) // _STEPS))
    for begin in range(0, len(texts), size):
        update_1D = cohort_updates(components.lora, state.adapter_D, [texts[begin : begin + size]], gradient, [0])
        state = server_step(state, update_1D[0].cpu(), _SERVER, _SERVER.learning_rate)
    return state.adapter_D
