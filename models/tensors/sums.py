"""Gradients that are added to a step's fp32 sums where they are computed, and are never in memory by themselves.

megatron-core's DistributedDataParallel gives each trained parameter its sum, `main_grad`, and hooks which add to it the
gradient that autograd has left, cast to fp32 where it is none. For a weight that costs three passes over its memory in
every micro-batch, for a table of tokens a fill and an add of all its rows where a few hundred have a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.tensors.products import add_product


def weight_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of a weight [out, in] from that of its output [T, out] and its input [T, in].

    Added to the weight's sum inside the product where there is a sum; then what is returned has no values. `gradient`
    may be `shared` (models/tensors/products.py).
    """
    total = _sum_of(weight)
    if total is None:
        return gradient.t().to(x.dtype) @ x
    add_product(total, gradient.t(), x)
    return _added(weight)


def looked_up(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of a table [V, H]: [..., H].

    A row's gradients are added to the table's sum in the order of `ids`; without a sum it is F.embedding.
    """
    if not table.requires_grad or _sum_of(table) is None:
        return F.embedding(ids, table)
    return _LookedUp.apply(ids, table)


class _LookedUp(torch.autograd.Function):
    """Keeps the ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table  # its gradient needs no values of it, which may have changed or be away
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        total = _sum_of(ctx.table)
        assert total is not None, "looked_up has seen it"
        rows, own = ids.flatten(), gradient.flatten(0, -2).to(total.dtype)
        if total.is_cuda:  # sorts the ids; index_add_ has no order there, and no two runs the same sums
            total.index_put_((rows,), own, accumulate=True)
        else:
            total.index_add_(0, rows, own)
        return None, _added(ctx.table)


def _sum_of(parameter: Tensor) -> Tensor | None:
    return getattr(parameter, "main_grad", None)


def _added(parameter: Tensor) -> Tensor:
    """What stands for a gradient that its sum has: the hooks, which start a reduction, follow one, and drop it."""
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(parameter)
