"""Norms with what stands around them: a bias and the residual stream in front or behind, one pass each way.

Statistics and sums are fp32, and a result is rounded once, where eager operators round after each step: in bf16 the
values differ from theirs by a rounding. RMSNorm has no shift (`beta` None); its `mean` is empty.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.blocks.fused.operators import operator


def normalise(x: Tensor, weight: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 rows [..., C] -> normalised, scaled and shifted; 1 / deviation [..., 1]; mean [..., 1], or empty."""
    if beta is None:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * inverse * weight.float(), inverse, x.new_empty(0)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse * weight.float() + beta.float(), inverse, mean


def gradient_of_normalised(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, mean: Tensor, is_layer: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the fp32 rows x [..., C] from that of the scaled rows; the normalised rows. All fp32."""
    normed = (x - mean) * inverse if is_layer else x * inverse
    scaled = gradient * weight.float()
    along = (scaled * normed).mean(-1, keepdim=True)
    centre = scaled - scaled.mean(-1, keepdim=True) if is_layer else scaled
    return (centre - normed * along) * inverse, normed


def over_rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.flatten(0, -2).sum(0).to(like.dtype)


@operator(
    "norm_add(Tensor branch, Tensor? bias, Tensor? residual, Tensor weight, Tensor? beta, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)
def norm_add(
    branch: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + norm(branch + bias); the statistics."""
    x = branch.float() if bias is None else branch.float() + bias.float()
    out, inverse, mean = normalise(x, weight, beta, eps)
    if residual is not None:
        out = out + residual.float()
    return out.to(branch.dtype), inverse, mean


@operator(
    "add_norm(Tensor residual, Tensor branch, Tensor? bias, Tensor weight, Tensor? beta, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def add_norm(
    residual: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = residual + branch + bias; norm(x); the statistics."""
    x = residual.float() + (branch.float() if bias is None else branch.float() + bias.float())
    rounded = x.to(branch.dtype)
    out, inverse, mean = normalise(rounded.float(), weight, beta, eps)
    return rounded, out.to(branch.dtype), inverse, mean


@operator(
    "norm_backward(Tensor gradient, Tensor x, Tensor? bias, Tensor weight, Tensor inverse, Tensor mean, "
    "Tensor? stream, bool is_layer, bool sums_input) -> (Tensor, Tensor, Tensor, Tensor)"
)
def norm_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    mean: Tensor,
    stream: Tensor | None,
    is_layer: bool,
    sums_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the norm's input, with that of the stream around it added, of gain and shift, and of a bias there.

    x + bias: the norm's input. The last two are empty where the norm has no shift, and unless `sums_input`.
    """
    g = gradient.float()
    rows = x.float() if bias is None else x.float() + bias.float()
    of_x, normed = gradient_of_normalised(g, rows, weight, inverse, mean, is_layer)
    if stream is not None:
        of_x = of_x + stream.float()
    none = weight.new_empty(0)
    of_beta = over_rows(g, weight) if is_layer else none
    of_bias = over_rows(of_x, weight) if sums_input else none
    return of_x.to(x.dtype), over_rows(g * normed, weight), of_beta, of_bias


class _NormAdd(torch.autograd.Function):
    """Keeps the branch as the product wrote it, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, beta: Tensor | None, eps: float
    ) -> Tensor:
        out, inverse, mean = norm_add(branch, bias, residual, weight, beta, eps)
        ctx.save_for_backward(branch, bias, weight, inverse, mean)
        ctx.is_layer = beta is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        branch, bias, weight, inverse, mean = ctx.saved_tensors
        sums = bias is not None
        of_x, of_weight, of_beta, of_bias = norm_backward(
            gradient, branch, bias, weight, inverse, mean, None, ctx.is_layer, sums
        )
        return gradient, of_x, of_bias if sums else None, of_weight, of_beta if ctx.is_layer else None, None


class _AddNorm(torch.autograd.Function):
    """x = residual + branch + bias, and norm(x): keeps x, which goes on as the stream, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, beta: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, out, inverse, mean = add_norm(residual, branch, bias, weight, beta, eps)
        ctx.save_for_backward(x, weight, inverse, mean)
        ctx.is_layer, ctx.sums = beta is not None, bias is not None
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stream: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, mean = ctx.saved_tensors
        of_x, of_weight, of_beta, of_bias = norm_backward(
            gradient, x, None, weight, inverse, mean, stream, ctx.is_layer, ctx.sums
        )
        return of_x, of_x, of_bias if ctx.sums else None, of_weight, of_beta if ctx.is_layer else None, None


class _NormOfStream(torch.autograd.Function):
    """x and norm(x): one gradient comes back where autograd would add two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse, mean = norm_add(x, None, None, weight, beta, eps)
        ctx.save_for_backward(x, weight, inverse, mean)
        ctx.is_layer = beta is not None
        return x.view_as(x), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stream: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, mean = ctx.saved_tensors
        of_x, of_weight, of_beta, _ = norm_backward(
            gradient, x, None, weight, inverse, mean, stream, ctx.is_layer, False
        )
        return of_x, of_weight, of_beta if ctx.is_layer else None, None


@operator("bias_add(Tensor residual, Tensor branch, Tensor? bias) -> Tensor")
def bias_add(residual: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    """residual + branch + bias."""
    x = residual.float() + (branch.float() if bias is None else branch.float() + bias.float())
    return x.to(branch.dtype)


class _Added(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
        ctx.sums = bias is not None
        return bias_add(residual, branch, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return gradient, gradient, gradient.flatten(0, -2).sum(0) if ctx.sums else None


def added(residual: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    """residual + branch + bias, [T, 1, H]."""
    return _Added.apply(residual, branch, bias)


def residual_of_norm(norm: nn.Module, residual: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    """residual + norm(branch + bias), [T, 1, H]."""
    return _NormAdd.apply(residual, branch, bias, *_of(norm))


def norm_of_residual(norm: nn.Module, residual: Tensor, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x = residual + branch + bias, and norm(x), [T, 1, H] each."""
    return _AddNorm.apply(residual, branch, bias, *_of(norm))


def norm_of_stream(norm: nn.Module, stream: Tensor) -> tuple[Tensor, Tensor]:
    """The stream, to be used from here on, and its norm, [T, 1, H] each."""
    return _NormOfStream.apply(stream, *_of(norm))


def _of(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    return norm.weight, getattr(norm, "bias", None), norm.eps
