"""Outputs of a block's matrix products, kept from a pass without graph for the pass that repeats it with one.

The encode phase of a step, and every layer under full recomputation, computes the same products twice. With an output
kept, the second pass multiplies nothing for it: the linear answers with the kept tensor and has its usual backward, so
losses and gradients are those of the repeated product to the last bit, and where tensor parallelism adds partial sums
up it spares that collective, too. Per token and block, in units of the width H: fc2 1, proj 1, qkv 3, fc1 the MLP's.

The linears here are megatron-core's with a product of their own, whose backward leaves two passes over memory out:

- The gradient of a weight is added to the step's fp32 sum inside the product, instead of being written, read and added.
- The input of a linear is also what goes around it: the residual stream, or the input of the next linear beside it. Who
  asks for it gets it passed through, so that the product of the backward adds to the gradient that comes back there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.tensors.kept import LEVELS
from models.tensors.products import product, product_onto, shared
from models.tensors.sums import weight_gradient

Outputs = dict[nn.Module, Tensor]
"""Linear -> its output in one pass, behind the collective and in front of a bias that the caller adds."""


class OutputTape:
    """Where the linears of a tower leave their outputs and find them again."""

    def __init__(self) -> None:
        self._open: Outputs | None = None

    @contextmanager
    def open(self, outputs: Outputs) -> Iterator[None]:
        """Inside the block a pass without graph leaves its outputs here, and one with graph takes them away."""
        before, self._open = self._open, outputs
        try:
            yield
        finally:
            self._open = before

    def product(self, linear: nn.Module, multiply: Callable[[], Tensor], given: Callable[[Tensor], Tensor]) -> Tensor:
        """Output of `linear`: `given` the kept one, or else by `multiply`."""
        outputs = self._open
        if outputs is None:
            return multiply()
        if torch.is_grad_enabled():
            kept = outputs.pop(linear, None)
            return multiply() if kept is None else given(kept)
        if linear not in outputs:
            outputs[linear] = multiply()
        return outputs[linear]


_CLOSED = OutputTape()


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's linear that the tensor axis splits by output features; its output can be kept."""

    tape = _CLOSED

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        assert weight is self.weight, "no block of these towers has it otherwise"
        return self.product(input, how["bias"])[0]

    def product(self, x: Tensor, bias: Tensor | None = None, *, own: bool = True) -> tuple[Tensor, Tensor]:
        """x [T or T / tp, 1, in] -> ([T, 1, out / tp], x to be used from here on). own: see `How.may_write`."""
        group = self.tp_group if self.tp_group.size() > 1 else None
        splits = self.sequence_parallel
        how = How(gathered=group if splits else None, summed=None if splits else group, may_write=own)
        return _taped(self, x, bias, how)


class RowLinear(RowParallelLinear):
    """megatron-core's linear that the tensor axis splits by input features; its reduced output can be kept."""

    tape = _CLOSED

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in / tp] -> ([T or T / tp, 1, out], bias that the caller adds)."""
        return self.product(input_)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same."""
        assert self.skip_bias_add and self.input_is_parallel, "no block of these towers has it otherwise"
        group = self.tp_group if self.tp_group.size() > 1 else None
        how = How(reduced=group, scatters=group is not None and self.sequence_parallel)
        return _taped(self, x, None, how)[0], self.bias


@dataclass(frozen=True, kw_only=True)
class How:
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


class Product(torch.autograd.Function):
    """x W^T + bias, and x. Keeps x, or its part of it under sequence parallelism, for a weight that is trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: How, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """output: of an earlier pass, where it was kept."""
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.how, ctx.of_one_row = how, x.shape[1:]
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
        how: How = ctx.how
        if gradient is None:
            return passed, None, None, None, None
        work = None
        trains, trains_bias = ctx.needs_input_grad[1:3]
        if how.gathered is not None and trains:
            x, work = _gather(x, how.gathered, wait=False)
        if how.scatters:
            gradient = _gather(gradient, how.reduced)[0]
        rows = gradient.flatten(0, -2)
        factor = shared(rows)
        # Nobody reads it at the lowest block that is trained, where no norm comes before the product.
        of_x = _input_gradient(factor, weight, passed, how) if ctx.needs_input_grad[0] else None
        if work is not None:
            work.wait()
        work, of_own = _start_sum(of_x, how)
        of_weight = weight_gradient(weight, factor, x.flatten(0, -2)) if trains else None
        of_bias = rows.sum(0) if trains_bias else None
        if work is not None and of_own is not None:
            work.wait()
            of_own = of_own if passed is None else passed.view_as(of_own) + of_own
        return None if of_own is None else of_own.view(-1, *ctx.of_one_row), of_weight, of_bias, None, None


def _finished(output: Tensor, how: How) -> Tensor:
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


def _input_gradient(rows: Tensor, weight: Tensor, passed: Tensor | None, how: How) -> Tensor:
    """[T, in]: what goes back through the product and, where no collective comes in between, what came around it."""
    if passed is None or how.gathered is not None or how.summed is not None:
        return product(rows, weight)
    return product_onto(passed.flatten(0, -2), rows, weight, may_write=how.may_write)


def _start_sum(of_x: Tensor | None, how: How) -> tuple[dist.Work | None, Tensor | None]:
    """Over the tensor axis, while the gradient of the weight is computed."""
    if of_x is None:
        return None, None
    if how.gathered is not None:
        own = of_x.new_empty(len(of_x) // how.gathered.size(), of_x.shape[1])
        return dist.reduce_scatter_tensor(own, of_x, group=how.gathered, async_op=True), own
    if how.summed is not None:
        return dist.all_reduce(of_x, group=how.summed, async_op=True), of_x
    return None, of_x


def _taped(linear: ColumnLinear | RowLinear, x: Tensor, bias: Tensor | None, how: How) -> tuple[Tensor, Tensor]:
    passed = x

    def multiply(output: Tensor | None = None) -> Tensor:
        nonlocal passed
        answer, passed = Product.apply(x, linear.weight, bias, how, output)
        return answer

    return linear.tape.product(linear, multiply, multiply), passed


def keep_outputs(layers: nn.ModuleList, level: str) -> OutputTape:
    """Let the linears of these blocks that `level` names use a new tape, and the others none."""
    tape = OutputTape()
    for layer in layers:
        for kind, linears in _linears(layer).items():
            for linear in linears:
                linear.tape = tape if kind in LEVELS[level] else _CLOSED  # type: ignore[assignment]
    return tape


def can_keep(layers: nn.ModuleList) -> bool:
    """Whether the blocks are built from the linears above (Transformer Engine's multiply and quantise in one call)."""
    kept = (ColumnLinear, RowLinear)
    return all(isinstance(m, kept) for layer in layers for linears in _linears(layer).values() for m in linears)


def _linears(layer: Any) -> dict[str, list[nn.Module]]:
    """Kind of product -> its linears in one block; the q, k, v and the gate and up of EVA-02 B/L are several."""
    attention, mlp = layer.self_attention, layer.mlp
    qkv = attention.linear_qkv
    named = {
        "fc2": [getattr(mlp, name, None) for name in ("linear_fc2", "down")],
        "proj": [attention.linear_proj],
        "qkv": [getattr(qkv, name) for name in ("linear", "q", "k", "v") if hasattr(qkv, name)] or [qkv],
        "fc1": [getattr(mlp, name, None) for name in ("linear_fc1", "gate", "up")],
    }
    return {kind: [linear for linear in linears if linear is not None] for kind, linears in named.items()}
