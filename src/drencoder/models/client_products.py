"""Matrix products that are one client's own, though several clients share a batch.

Legend: K clients, T tokens of one client, I inputs and O outputs of a layer, r rank.

One product over the rows of all clients has another shape when one of them leaves, and a matrix library may then add up in another
order: others' updates would move by a rounding error. Of one client's own rows the shape is its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["add_adapter", "own_products"]

# From so many weights on, a product in 16 bits is faster by itself than among others: `bmm` makes a copy of the weight first (4,096 x
# 4,096 in bfloat16 on a CPU: 150 ms in place of 4). Below, the calls take longer than the products.
_WIDE_16_BIT = 1 << 16
# Multiplications from which a graphics card is busy with one product, so that a call for each client costs nothing.
_BUSY_CARD = 1 << 30


def own_products(x: Tensor, clients: int, weight_IO: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer's output for x (clients * R, ..., I), with a product for each client.

    The library takes K products in one call, where that is not slower. Which way is taken depends on the weight and on how many
    tokens one client has, so that it is the same in any company.
    """
    x_KTI = x.reshape(clients, -1, x.shape[-1])
    if _by_itself(weight_IO, x_KTI.shape[1]):
        y_KTO = torch.stack([functional.linear(x_TI, weight_IO.T, bias) for x_TI in x_KTI.unbind()])
    else:
        y_KTO = torch.bmm(x_KTI, weight_IO.expand(clients, -1, -1))
        if bias is not None:
            y_KTO = y_KTO + bias
    return y_KTO.view(*x.shape[:-1], -1)


def _by_itself(weight_IO: Tensor, tokens: int) -> bool:
    if weight_IO.device.type == "cuda":
        return tokens * weight_IO.numel() >= _BUSY_CARD
    return weight_IO.dtype.itemsize < 4 and weight_IO.numel() >= _WIDE_16_BIT


def add_adapter(output: Tensor, x: Tensor, A_KrI: Tensor, B_KOr: Tensor, scale: float) -> Tensor:
    """output + scale * x A' B', each client's rows with its own A and B (float32); in the type of `output`, rounded once.

    Args:
      output: (K * R, ..., O), of the frozen layer.
      x: (K * R, ..., I), the layer's input, or what dropout left of it.
    """
    clients = len(A_KrI)
    base_KTO, x_KTI = (values.reshape(clients, -1, values.shape[-1]) for values in (output, x))
    # Not a view of the function's own, since some models add to a layer's output in place.
    return _AddAdapter.apply(base_KTO, x_KTI, A_KrI, B_KOr, scale).view(output.shape)


class _AddAdapter(torch.autograd.Function):
    """Keeps the layer's input in its own type, which several layers share, and makes float32 of it where it is needed."""

    @staticmethod
    def forward(ctx: Any, base_KTO: Tensor, x_KTI: Tensor, A_KrI: Tensor, B_KOr: Tensor, scale: float) -> Tensor:
        inner_KTr = torch.bmm(x_KTI.to(A_KrI.dtype), A_KrI.mT)
        ctx.save_for_backward(x_KTI, inner_KTr, A_KrI, B_KOr)
        ctx.scale = scale
        return torch.baddbmm(base_KTO.to(A_KrI.dtype), inner_KTr, B_KOr.mT, alpha=scale).to(base_KTO.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_KTI, inner_KTr, A_KrI, B_KOr = ctx.saved_tensors
        grad_KTO = grads[0].to(A_KrI.dtype)
        inner_grad_KTr = torch.bmm(grad_KTO, B_KOr).mul_(ctx.scale)
        x_grad_KTI = torch.bmm(inner_grad_KTr, A_KrI).to(x_KTI.dtype) if ctx.needs_input_grad[1] else None
        A_grad_KrI = torch.bmm(x_KTI.to(A_KrI.dtype).mT, inner_grad_KTr).mT
        B_grad_KOr = torch.bmm(inner_KTr.mT, grad_KTO).mT.mul(ctx.scale)
        return grads[0], x_grad_KTI, A_grad_KrI, B_grad_KOr, None
