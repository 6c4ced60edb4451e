"""Another device than the CPU, without one: tensors on `meta`, and a mode that is as strict as a graphics card.

A tensor on `meta` has a shape and no values. So a product of one with a tensor on the CPU, which a card would refuse, is found without a
card, and so is every place where the CPU would have to wait for a value.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses an operation whose tensors lie on different devices, as a card does; single numbers may come from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        places = {x.device.type for x in tensors}
        assert len(places) < 2 or func in _MOVES, f"{func} mixes {sorted(places)}"
        return func(*args, **(kwargs or {}))
