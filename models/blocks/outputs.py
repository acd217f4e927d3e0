"""Outputs of a block's matrix products, kept from a pass without graph for the pass that repeats it with one.

The encode phase of a step, and every layer under full recomputation, computes the same products twice. With an output
kept, the second pass multiplies nothing for it: the linear answers with the kept tensor and has its usual backward, so
losses and gradients are those of the repeated product to the last bit, and where tensor parallelism adds partial sums
up it spares that collective, too. Per token and block, in units of the width H: fc2 1, proj 1, qkv 3, fc1 the MLP's.

The linears here are megatron-core's with that one thing added; nothing changes while no tape is open.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    RowParallelLinear,
    custom_fwd,
)
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce, _reduce_scatter_along_first_dim
from torch import Tensor, nn

from models.tensors.kept import LEVELS

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
        multiply = super()._forward_impl
        if not weight.requires_grad:
            group, scatters = how["tp_group"], how["sequence_parallel"]
            groups = (group if how["allreduce_dgrad"] else None, group if scatters else None, None)
            product = partial(_FrozenProduct.apply, input, weight, how["bias"], *groups)
            return self.tape.product(self, lambda: product(None), product)
        return self.tape.product(
            self,
            lambda: multiply(input, weight, **how),
            lambda output: _GivenProduct.apply(
                input,
                weight,
                how["bias"],
                how["gradient_accumulation_fusion"],
                how["allreduce_dgrad"],
                how["sequence_parallel"],
                how["tp_group"],
                None,
                output,
            ),
        )


class RowLinear(RowParallelLinear):
    """megatron-core's linear that the tensor axis splits by input features; its reduced output can be kept."""

    tape = _CLOSED

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in / tp] -> ([T or T / tp, 1, out], bias that the caller adds)."""
        assert self.skip_bias_add and self.input_is_parallel, "no block of these towers has it otherwise"
        forward = super().forward
        output = self.tape.product(self, lambda: forward(input_)[0], lambda output: self._given(input_, output))
        return output, self.bias

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if not weight.requires_grad:
            return _FrozenProduct.apply(input, weight, None, None, None, None, None)
        return super()._forward_impl(input, weight, **how)

    def _given(self, inputs: Tensor, output: Tensor) -> Tensor:
        gathered = self.tp_group if self.sequence_parallel else None
        if not self.weight.requires_grad:
            return _FrozenProduct.apply(inputs, self.weight, None, None, None, gathered, output)
        fusion = self.gradient_accumulation_fusion
        return _GivenProduct.apply(inputs, self.weight, None, fusion, False, False, None, gathered, output)


class _GivenProduct(LinearWithGradAccumulationAndAsyncCommunication):
    """megatron-core's linear where the output is known: its backward, and in front of it that of the row's collective.

    gathered: group over which the gradient of a scattered output is gathered; None: it comes whole.
    """

    @staticmethod
    @custom_fwd
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        gathered: Any,
        output: Tensor,
    ) -> Tensor:
        """What the backward reads, as megatron-core's forward leaves it."""
        ctx.save_for_backward(input, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias = bias is not None
        ctx.gradient_accumulation_fusion = gradient_accumulation_fusion
        ctx.allreduce_dgrad = allreduce_dgrad
        ctx.sequence_parallel = sequence_parallel
        ctx.wgrad_deferral_limit, ctx.grad_output_buffer = None, None
        ctx.tp_group, ctx.gathered = tp_group, gathered
        ctx.gtp_remat_size = 1  # asked for by the backward of 0.19
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        if ctx.gathered is not None:
            grad_output = _gather_along_first_dim(grad_output, ctx.gathered)
        gradients = LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, grad_output)
        return (*gradients[:3], *(None,) * 6)


class _FrozenProduct(torch.autograd.Function):
    """x W^T + bias with a weight that is not trained: keeps no input and computes no gradient of the weight.

    megatron-core's own has no gradient for a bias that is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        summed: Any,
        scattered: Any,
        gathered: Any,
        output: Tensor | None,
    ) -> Tensor:
        """summed, scattered: group over which the gradient of the input is added up and left whole, or cut as the input
        is. gathered: group over which that of the output is gathered. output: where it is known.
        """
        ctx.save_for_backward(weight)
        ctx.summed, ctx.scattered, ctx.gathered = summed, scattered, gathered
        if output is not None:
            return output.view_as(output)
        whole = input if scattered is None else _gather_along_first_dim(input, scattered)
        product = torch.matmul(whole, weight.t())
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input and bias."""
        (weight,) = ctx.saved_tensors
        if ctx.gathered is not None:
            gradient = _gather_along_first_dim(gradient, ctx.gathered)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = gradient.matmul(weight)
            if ctx.summed is not None:
                of_input = _reduce(of_input, ctx.summed)
            elif ctx.scattered is not None:
                of_input = _reduce_scatter_along_first_dim(of_input, ctx.scattered)
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_input, None, of_bias, *(None,) * 4


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
