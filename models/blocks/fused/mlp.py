"""What stands between the products of an MLP: bias and nonlinearity, or SwiGLU with the norm behind it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.blocks.fused.norms import gradient_of_normalised, normalise, over_rows
from models.blocks.fused.operators import operator

_QUICK = 1.702
_TANH = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    if kind == "quick_gelu":
        return x * torch.sigmoid(_QUICK * x)
    return 0.5 * x * (1 + torch.tanh(_TANH * (x + _CUBIC * x * x * x)))


def _slope(x: Tensor, kind: str) -> Tensor:
    """Derivative of `_activate`."""
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    if kind == "quick_gelu":
        gate = torch.sigmoid(_QUICK * x)
        return gate * (1 + _QUICK * x * (1 - gate))
    bend = torch.tanh(_TANH * (x + _CUBIC * x * x * x))
    return 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * _TANH * (1 + 3 * _CUBIC * x * x)


@operator("bias_activation(Tensor x, Tensor? bias, str kind) -> Tensor")
def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """f(x + bias); kind: gelu (exact), quick_gelu or gelu_tanh."""
    rows = x.float() if bias is None else x.float() + bias.float()
    return _activate(rows, kind).to(x.dtype)


@operator("bias_activation_backward(Tensor gradient, Tensor x, Tensor? bias, str kind) -> Tensor")
def bias_activation_backward(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Gradient of x + bias."""
    rows = x.float() if bias is None else x.float() + bias.float()
    return (gradient.float() * _slope(rows, kind)).to(x.dtype)


@operator("swiglu(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up."""
    return _gated(gate, up).to(gate.dtype)


@operator("swiglu_norm(Tensor gate, Tensor up, Tensor weight, Tensor beta, float eps) -> (Tensor, Tensor, Tensor)")
def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of silu(gate) x up over the last dimension; the statistics."""
    out, inverse, mean = normalise(_gated(gate, up), weight, beta, eps)
    return out.to(gate.dtype), inverse, mean


@operator("swiglu_backward(Tensor gradient, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return _of_factors(gradient.float(), gate, up)


@operator(
    "swiglu_norm_backward(Tensor gradient, Tensor gate, Tensor up, Tensor weight, Tensor inverse, Tensor mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def swiglu_norm_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, weight: Tensor, inverse: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up, gain and shift."""
    g = gradient.float()
    of_product, normed = gradient_of_normalised(g, _gated(gate, up), weight, inverse, mean, True)
    return *_of_factors(of_product, gate, up), over_rows(g * normed, weight), over_rows(g, weight)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    return g * torch.sigmoid(g) * up.float()


def _of_factors(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g = gate.float()
    bend = torch.sigmoid(g)
    of_gate = gradient * up.float() * bend * (1 + g * (1 - bend))
    return of_gate.to(gate.dtype), (gradient * g * bend).to(up.dtype)


class _BiasActivation(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.kind = kind
        return bias_activation(x, bias, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        of_x = bias_activation_backward(gradient, x, bias, ctx.kind)
        return of_x, of_x.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class _SwiGlu(torch.autograd.Function):
    """Keeps gate and up; the product of the two is never in memory where a norm follows."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        if weight is None or beta is None:
            ctx.save_for_backward(gate, up)
            return swiglu(gate, up)
        out, inverse, mean = swiglu_norm(gate, up, weight, beta, eps)
        ctx.save_for_backward(gate, up, weight, inverse, mean)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 2:
            return *swiglu_backward(gradient, *ctx.saved_tensors), None, None, None
        return *swiglu_norm_backward(gradient, *ctx.saved_tensors), None


def activated(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """f(x + bias), any shape; kind as in `bias_activation`."""
    return _BiasActivation.apply(x, bias, kind)


def gated(gate: Tensor, up: Tensor, norm: torch.nn.LayerNorm | None) -> Tensor:
    """norm(silu(gate) x up), [..., F]; without a norm the product."""
    if norm is None:
        return _SwiGlu.apply(gate, up, None, None, 0.0)
    return _SwiGlu.apply(gate, up, norm.weight, norm.bias, norm.eps)
