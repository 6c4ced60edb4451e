"""Matrix products that are one client's own, though several clients share a batch.

Legend: K clients, T tokens of one client, I inputs and O outputs of a layer, r rank.

One product over the rows of all clients has another shape when one of them leaves, and a matrix library may then add up in another
order: others' updates would move by a rounding error. Of one client's own rows the shape is its own.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# From so many weights on, a product in 16 bits is faster by itself than among others: `bmm` makes a copy of the weight first (4,096 x
# 4,096 in bfloat16 on a CPU: 150 ms in place of 4). Below, the calls take longer than the products.
_WIDE_16_BIT = 1 << 16
# Multiplications from which a graphics card is busy with one product, so that a call for each client costs nothing.
_BUSY_CARD = 1 << 30


Pair: TypeAlias = tuple[Tensor, Tensor, float, Tensor | None]
"""A (K, r, I) and B (K, O, r) of the clients' adapters, float32; their scale; and what dropout left of the layer's input, if it took any."""


def own_products(x: Tensor, clients: int, weight_IO: Tensor, bias: Tensor | None, pair: Pair | None = None) -> Tensor:
    """A frozen linear layer's output for x (clients * R, ..., I), with a product for each client, and with their adapters, if it has any.

    The library takes K products in one call, where that is not slower. Which way is taken depends on the weight and on how many
    tokens one client has, so that it is the same in any company. The adapter's part is made in float32, and the sum is rounded
    once to the type of `x`.
    """
    x_KTI = x.reshape(clients, -1, x.shape[-1])
    if pair is None:
        y_KTO = _products(x_KTI, weight_IO, bias)
    else:
        A_KrI, B_KOr, scale, dropped = pair
        dropped_KTI = None if dropped is None else dropped.view(x_KTI.shape)
        y_KTO = _AdaptedProducts.apply(x_KTI, dropped_KTI, weight_IO, bias, A_KrI, B_KOr, scale)
    # Not a view of the function's own, since some models add to a layer's output in place.
    return y_KTO.view(*x.shape[:-1], -1)


def add_adapter(
    output: Tensor, x: Tensor, A_KrI: Tensor, B_KOr: Tensor, scale: float, *, rounded: bool = False
) -> Tensor:
    """output + scale * x A' B', for a layer that makes its own product: each client's rows with its own A and B (float32).

    With `rounded` the adapter's part is rounded to the output's type before the sum, as PEFT does in quantised layers, and not the sum alone.
    """
    x_KTI = x.reshape(A_KrI.shape[0], -1, x.shape[-1]).to(A_KrI.dtype)
    delta_KTO = torch.bmm(torch.bmm(x_KTI, A_KrI.mT), B_KOr.mT)
    if rounded:
        return output + (delta_KTO * scale).view(output.shape).to(output.dtype)
    return torch.add(output, delta_KTO.view(output.shape), alpha=scale).to(output.dtype)


def _products(x_KTI: Tensor, weight_IO: Tensor, bias: Tensor | None = None) -> Tensor:
    if _by_itself(weight_IO, x_KTI.shape[1]):
        return torch.stack([functional.linear(x_TI, weight_IO.T, bias) for x_TI in x_KTI.unbind()])
    y_KTO = torch.bmm(x_KTI, weight_IO.expand(x_KTI.shape[0], -1, -1))
    return y_KTO if bias is None else y_KTO + bias


def _by_itself(weight_IO: Tensor, tokens: int) -> bool:
    if weight_IO.device.type == "cuda":
        return tokens * weight_IO.numel() >= _BUSY_CARD
    return weight_IO.dtype.itemsize < 4 and weight_IO.numel() >= _WIDE_16_BIT


class _AdaptedProducts(torch.autograd.Function):
    """The frozen layer's product and the adapter's in one operation.

    It keeps the layer's input in its own type, which several layers share. What belongs to the rank is computed with the rank as
    rows: (r, I) x (I, T) takes a half to a quarter of the time of (T, I) x (I, r), whose rows are shorter than a register (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: Any, x_KTI: Tensor, dropped_KTI: Tensor | None, weight_IO: Tensor, bias: Tensor | None, A_KrI: Tensor, B_KOr: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        own_KTI = x_KTI if dropped_KTI is None else dropped_KTI
        inner_KrT = torch.bmm(A_KrI, own_KTI.to(A_KrI.dtype).mT)
        ctx.save_for_backward(own_KTI, inner_KrT, weight_IO, A_KrI, B_KOr)
        ctx.scale = scale
        return _plus_products(_products(x_KTI, weight_IO, bias), inner_KrT.mT, B_KOr.mT, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own_KTI, inner_KrT, weight_IO, A_KrI, B_KOr = ctx.saved_tensors
        needs_x, needs_dropped = ctx.needs_input_grad[:2]
        grad_KTO = grads[0].to(A_KrI.dtype)
        inner_grad_KrT = torch.bmm(B_KOr.mT, grad_KTO.mT).mul_(ctx.scale)
        x_grad_KTI = _products(grads[0], weight_IO.T) if needs_x else None
        dropped_grad_KTI = None
        if needs_dropped:
            dropped_grad_KTI = torch.bmm(inner_grad_KrT.mT, A_KrI).to(own_KTI.dtype)
        elif x_grad_KTI is not None:
            x_grad_KTI = _plus_products(x_grad_KTI, inner_grad_KrT.mT, A_KrI, 1.0)
        A_grad_KrI = torch.bmm(inner_grad_KrT, own_KTI.to(A_KrI.dtype))
        B_grad_KOr = torch.bmm(inner_KrT, grad_KTO).mul_(ctx.scale).mT
        return x_grad_KTI, dropped_grad_KTI, None, None, A_grad_KrI, B_grad_KOr, None


def _plus_products(y_KTO: Tensor, left_KTr: Tensor, right_KrO: Tensor, scale: float) -> Tensor:
    """y + scale * left right, made in float32 and rounded once; `y` is overwritten where it has that type."""
    return y_KTO.to(left_KTr.dtype).baddbmm_(left_KTr, right_KrO, alpha=scale).to(y_KTO.dtype)
