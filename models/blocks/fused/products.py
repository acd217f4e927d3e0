"""Linears whose backward leaves two passes over memory out.

- The gradient of a weight is added to the step's fp32 sum inside the product (`addmm` into `weight.main_grad`, which
  megatron-core's DistributedDataParallel gives each parameter), instead of being written, read and added.
- The input of a linear is also what goes around it: the residual stream, or the input of the next linear beside it. It
  is passed through, so that the product of the backward adds to the gradient that comes back there.

Collectives of the tensor axis, outputs that are kept (models/blocks/outputs.py) and values are those of the unfused
linears, but for the order of fp32 sums.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.blocks.outputs import ColumnLinear, RowLinear
from models.tensors.products import add_product


@dataclass(frozen=True, kw_only=True)
class _How:
    """What a product does beside multiplying. Groups are None where the tensor axis has one rank."""

    gathered: Any = None
    """Column, sequence parallel: group that the input is gathered over, and its gradient reduced and scattered."""
    summed: Any = None
    """Column otherwise: group that the gradient of the input is summed over."""
    reduced: Any = None
    """Row: group that the output is summed over."""
    scatters: bool = False
    """Row: leave each rank its part of the tokens."""
    may_write: bool = True
    """Whether the gradient of the passed input is the block's own, so that it may be written over."""


class _Product(torch.autograd.Function):
    """x W^T + bias, and x. Keeps x, or its part of it under sequence parallelism."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """output: of an earlier pass, where it was kept."""
        ctx.save_for_backward(x, weight)
        ctx.how = how
        ctx.set_materialize_grads(False)
        if output is None:
            whole = x if how.gathered is None else _gather(x, how.gathered)[0]
            output = _finished(F.linear(whole, weight, bias), how)
        else:
            output = output.view_as(output)
        return output, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        how: _How = ctx.how
        if gradient is None:
            return passed, None, None, None, None
        work = None
        trains, trains_bias = ctx.needs_input_grad[1:3]
        if how.gathered is not None and trains:
            x, work = _gather(x, how.gathered, wait=False)
        if how.scatters:
            gradient = _gather(gradient, how.reduced)[0]
        rows = gradient.flatten(0, -2)
        of_x = _input_gradient(rows, weight, passed, how)
        if work is not None:
            work.wait()
        work, of_own = _start_sum(of_x, how)
        of_weight = _weight_gradient(weight, rows, x.flatten(0, -2)) if trains else None
        of_bias = rows.sum(0) if trains_bias else None
        if work is not None:
            work.wait()
            of_own = of_own if passed is None else passed.view_as(of_own) + of_own
        return of_own.view(-1, *ctx.saved_tensors[0].shape[1:]), of_weight, of_bias, None, None


def _finished(output: Tensor, how: _How) -> Tensor:
    if how.reduced is None:
        return output
    if not how.scatters:
        dist.all_reduce(output, group=how.reduced)
        return output
    own = output.new_empty(output.shape[0] // how.reduced.size(), *output.shape[1:])
    dist.reduce_scatter_tensor(own, output, group=how.reduced)
    return own


def _gather(own: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, dist.Work | None]:
    """Rows of all ranks of the tensor axis."""
    whole = own.new_empty(own.shape[0] * group.size(), *own.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, own.contiguous(), group=group, async_op=not wait)


def _input_gradient(rows: Tensor, weight: Tensor, passed: Tensor | None, how: _How) -> Tensor:
    """[T, in]: what goes back through the product and, where no collective comes in between, what came around it."""
    if passed is None or how.gathered is not None or how.summed is not None:
        return rows @ weight
    around = passed.flatten(0, -2)
    if how.may_write and around.is_contiguous() and around.dtype == rows.dtype:
        return around.addmm_(rows, weight)
    return torch.addmm(around, rows, weight)


def _start_sum(of_x: Tensor, how: _How) -> tuple[dist.Work | None, Tensor]:
    """Over the tensor axis, while the gradient of the weight is computed."""
    if how.gathered is not None:
        own = of_x.new_empty(len(of_x) // how.gathered.size(), of_x.shape[1])
        return dist.reduce_scatter_tensor(own, of_x, group=how.gathered, async_op=True), own
    if how.summed is not None:
        return dist.all_reduce(of_x, group=how.summed, async_op=True), of_x
    return None, of_x


def _weight_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of a weight [out, in], added to its sum where there is one; then what is returned has no values."""
    total = getattr(weight, "main_grad", None)
    if total is None:
        return gradient.t() @ x
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), x)
    else:
        add_product(total, gradient.t(), x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # megatron-core's hooks, which start the reduction of a full bucket, follow a gradient; they drop this one.
    return torch.empty_like(weight)


def column(linear: ColumnLinear, x: Tensor, bias: Tensor | None = None, *, own: bool = True) -> tuple[Tensor, Tensor]:
    """x [T or T / tp, 1, in] -> ([T, 1, out / tp], x to be used from here on). own: see `_How.may_write`."""
    group = linear.tp_group if linear.tp_group.size() > 1 else None
    splits = linear.sequence_parallel
    how = _How(gathered=group if splits else None, summed=None if splits else group, may_write=own)
    return _taped(linear, x, bias, how)


def row(linear: RowLinear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [T, 1, in / tp] -> ([T or T / tp, 1, out], bias that is not added yet)."""
    group = linear.tp_group if linear.tp_group.size() > 1 else None
    how = _How(reduced=group, scatters=group is not None and linear.sequence_parallel)
    return _taped(linear, x, None, how)[0], linear.bias


def _taped(linear: ColumnLinear | RowLinear, x: Tensor, bias: Tensor | None, how: _How) -> tuple[Tensor, Tensor]:
    passed = x

    def multiply(output: Tensor | None = None) -> Tensor:
        nonlocal passed
        product, passed = _Product.apply(x, linear.weight, bias, how, output)
        return product

    return linear.tape.product(linear, multiply, multiply), passed
