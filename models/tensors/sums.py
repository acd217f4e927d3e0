"""Gradients that are added to a step's fp32 sums where they are computed, and are never in memory by themselves.

megatron-core's DistributedDataParallel gives each trained parameter its sum, `main_grad`, and hooks which add to it the
gradient that autograd has left, cast to fp32 where it is none. For a weight that costs three passes over its memory in
every micro-batch, for a table of tokens a fill and an add of all its rows where a few hundred have a gradient.

Every product of a tower with one of its weights comes here, in its blocks (models/blocks/outputs.py) and beside them.
What autograd adds are tables of positions and registers, which are sums over samples, what is one-dimensional, and a
patch projection whose gradient is scaled (mim.patch_gradient_scale).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.tensors.products import add_product, product, shared


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


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., in] -> [..., out]; without a sum it is F.linear."""
    return multiplied_apart(weight, bias, (x, slice(None)))[0]


def multiplied_apart(weight: Tensor, bias: Tensor | None, *parts: tuple[Tensor, slice]) -> tuple[Tensor, ...]:
    """The same of several x, each with outputs (rows of the weight) of its own."""
    xs, rows = [x for x, _ in parts], tuple(part for _, part in parts)
    if not weight.requires_grad or _sum_of(weight) is None:
        return tuple(_linear(x, weight, bias, part) for x, part in parts)
    answers: tuple[Tensor, ...] = _Multiplied.apply(weight, bias, rows, *xs)
    return answers


class SummedLinear(nn.Linear):
    """torch's, whose weight gets its gradients inside the product."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return multiplied(x, self.weight, self.bias)


class _Multiplied(torch.autograd.Function):
    """Keeps what it multiplies. One function of all rows: the gradients of two would be added, which have no values."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, rows: tuple[slice, ...], *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *xs)
        ctx.rows = rows
        return tuple(_linear(x, weight, bias, part) for x, part in zip(xs, rows, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *xs = ctx.saved_tensors
        total, of_xs = _sum_of(weight), list[Tensor | None]()
        of_bias = torch.zeros_like(weight[:, 0]) if ctx.needs_input_grad[1] else None
        assert total is not None, "multiplied has seen it"
        for place, (x, part, gradient) in enumerate(zip(xs, ctx.rows, gradients, strict=True), start=3):
            outputs = gradient.reshape(-1, gradient.shape[-1])
            factor = shared(outputs)
            of_x = product(factor, weight[part]).view_as(x) if ctx.needs_input_grad[place] else None
            add_product(total[part], factor.t(), x.reshape(-1, x.shape[-1]))
            of_xs.append(of_x)
            if of_bias is not None:
                of_bias[part] = outputs.sum(0)
        return _added(weight), of_bias, None, *of_xs


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


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
