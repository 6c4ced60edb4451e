"""Activation checkpointing: layers keep their inputs only, and the backward pass runs them again (Chen et al. 2016,
https://arxiv.org/abs/1604.06174). Takes a third more time, and changes no bit.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: Any) -> list[Any]:
    """The layers that a model runs one after the other; none if transformers does not mark them."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputed(model: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, forward and backward passes of the model's layers take memory for one layer at a time.

    transformers' own switch works in training mode only, and the base is in evaluation mode, so that its own dropout stays off.

    Args:
      generators: what the layers draw from; the second run draws the same.
    """
    layers = decoder_layers(model)
    forwards: list[Callable[..., Any]] = [layer.forward for layer in layers]
    before = [layer.__dict__.get("forward") for layer in layers]  # a hook of accelerate
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = partial(
            checkpoint,
            forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_same_draws, generators),
        )
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward  # the class's own again
            else:
                layer.forward = own


def _same_draws(generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
    """The contexts of a layer's first and second run; called before the first."""
    return contextlib.nullcontext(), _rewound(generators, [one.get_state() for one in generators])


@contextlib.contextmanager
def _rewound(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> Iterator[None]:
    after = [one.get_state() for one in generators]
    for one, state in zip(generators, states, strict=True):
        one.set_state(state)
    try:
        yield
    finally:
        for one, state in zip(generators, after, strict=True):
            one.set_state(state)
