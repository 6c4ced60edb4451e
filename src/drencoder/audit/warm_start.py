"""An adapter that is a few steps into training: at LoRA's start B = 0, and the gradient of A, which an attack could read, is zero.

Legend: D adapter values.
"""

from torch import Tensor

from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.models.cohort_training import cohort_updates
from drencoder.recipe import recipe as config
from drencoder.runs.build import Components

__all__ = ["warm_adapter"]

_STEPS = 4
_EXAMPLES = 32  # of each step
_SERVER = config.Server(optimizer="fedadam", learning_rate=0.001)


def warm_adapter(components: Components) -> Tensor:
    """The adapter (D,) after a few steps without noise on the server's own text; as it starts where the server has none."""
    texts = components.texts.held_out(_STEPS * _EXAMPLES)
    state = ServerState.start(components.lora.initial_D)
    gradient = config.Local(upload="gradient", batch_size=_EXAMPLES)
    for begin in range(0, len(texts), _EXAMPLES):
        update_1D = cohort_updates(components.lora, state.adapter_D, [texts[begin : begin + _EXAMPLES]], gradient, [0])
        state = server_step(state, update_1D[0].cpu(), _SERVER, _SERVER.learning_rate)
    return state.adapter_D
