"""Norms of the towers, and the residual forms: post-norm (paper section 2), with a gain (LayerScale)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.blocks.packages import APEX, load


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast to the weight's dtype, then scaled (the authors' order; paper section 2)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps its input as it is and a number a row; autograd's own graph keeps an fp32 copy and the normalised rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(weight.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_norm_backward(gradient, *ctx.saved_tensors), None


def _norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input x and of the gain; inverse: 1 / rms of each row, fp32."""
    normed = x * inverse  # fp32: the mean square is
    scaled = (gradient * weight).float()
    along = (scaled * normed).mean(-1, keepdim=True)
    weight_gradient = (gradient * normed.to(weight.dtype)).flatten(0, -2).sum(0)
    return torch.addcmul(scaled, normed, along, value=-1).mul_(inverse).to(x.dtype), weight_gradient


class ApexRMSNorm(RMSNorm):
    """The same in one kernel of apex, scaled in fp32 before the only cast (in bf16 not bit-equal to `RMSNorm`)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(config, hidden_size, eps)
        self.kernel = load(APEX).fused_rms_norm_affine

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.kernel(x, self.weight, self.weight.shape, self.eps)


class CompiledRMSNorm(RMSNorm):
    """The same in two kernels that torch.compile writes, forward and backward, with the sums in front and behind.

    They may round once where the eager norm rounds twice, so in bf16 they are not bit-equal to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return _CompiledNorm.apply(x, None, None, self.weight, self.eps)

    def added_to(self, residual: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
        """residual + norm(branch + bias), [..., H]."""
        return _CompiledNorm.apply(branch, bias, residual, self.weight, self.eps)


class _CompiledNorm(torch.autograd.Function):
    """Keeps what `_RmsNorm` keeps; the compiler's own choice would keep twice as much."""

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        out, x, inverse = _compiled(_norm_forward)(branch, bias, residual, weight, eps)
        ctx.save_for_backward(branch if bias is None else x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight = _compiled(_norm_backward)(gradient, *ctx.saved_tensors)
        of_bias = of_x.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, gradient if ctx.needs_input_grad[2] else None, of_weight, None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call, and once more for all later shapes."""
    return torch.compile(function)


def _norm_forward(
    branch: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output; input of the norm; 1 / rms of each row, fp32."""
    x = branch if bias is None else branch + bias
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    normed = (x * inverse).to(weight.dtype) * weight
    return (normed if residual is None else residual + normed), x, inverse


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm under megatron-core's constructor; megatron-core's own wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Mark parameters whose gradients are sums over a rank's own tokens: the tensor axis has to add them up."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SplitChannelNorm(nn.Module):
    """LayerNorm over channels that tensor parallelism splits: [T, 1, C/tp] -> [T, 1, C/tp].

    Every rank of the tensor group normalises the gathered row, so its weight gradient is complete on each.
    """

    def __init__(self, config: TransformerConfig, channels: int, tp_group):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all C channels."""
        if self.tp_group.size() == 1:
            return self.norm(x)
        full = gather_from_tensor_model_parallel_region(x, group=self.tp_group)
        return scatter_to_tensor_model_parallel_region(self.norm(full), group=self.tp_group)


class PostNormResidual(nn.Module):
    """residual + norm(branch + bias): the residual form of the 18B and E/14 towers."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., nn.Module]):
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """megatron-core asks for the function first and calls it with ((branch, bias), residual, dropout rate)."""
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _rate: float) -> Tensor:
        branch, bias = branch_and_bias
        if isinstance(self.norm, CompiledRMSNorm):
            return self.norm.added_to(residual, branch, bias)
        return residual + self.norm(branch if bias is None else branch + bias)


class ScaledResidual(nn.Module):
    """residual + gain * (branch + bias): LayerScale (arXiv 2103.17239) of DINOv3 and InternViT."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """megatron-core asks for the function first and calls it with ((branch, bias), residual, dropout rate)."""
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _rate: float) -> Tensor:
        branch, bias = branch_and_bias
        return residual + self.gain * (branch if bias is None else branch + bias)


class QkNorm(nn.Module):
    """RMSNorm over all heads' q and over all heads' k (InternViT-6B): [T, heads / tp, d] each.

    A row's mean square is over H channels, of which a rank has H / tp: one all-reduce of two fp32 numbers a token,
    forward and backward, instead of gathering the channels.
    """

    def __init__(self, config: TransformerConfig, tp_group):
        super().__init__()
        self.group, self.eps = tp_group, config.layernorm_epsilon
        self.channels = config.num_attention_heads * config.kv_channels
        local = self.channels // tp_group.size()
        self.q, self.k = (_Gain(local, config.params_dtype) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both, normalised."""
        return _JointNorm.apply(q, k, self.q.weight, self.k.weight, self.channels, self.eps, self.group)


class _Gain(nn.Module):
    """Gain of this rank's channels, as a module: its name then is that of a norm's weight."""

    def __init__(self, channels: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype))


class _JointNorm(torch.autograd.Function):
    """Keeps its inputs as they are (views of the qkv projection's output, kept anyway) and a number a row of each."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, channels: int, eps: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        squares = torch.stack([x.float().square().sum((-2, -1)) for x in (q, k)])
        inverse = torch.rsqrt(_summed(squares, group) / channels + eps)[..., None, None]  # [2, T, 1, 1]
        ctx.save_for_backward(q, k, q_gain, k_gain, inverse)
        ctx.channels, ctx.group = channels, group
        gains = (q_gain, k_gain)
        q, k = ((x * i).to(g.dtype) * g.view(x.shape[1:]) for x, i, g in zip((q, k), inverse, gains, strict=True))
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_gradient: Tensor, k_gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_gain, k_gain, inverse = ctx.saved_tensors
        normed = [x * i for x, i in zip((q, k), inverse, strict=True)]  # fp32
        gradients, gains = (q_gradient, k_gradient), (q_gain, k_gain)
        scaled = [(y * g.view(y.shape[1:])).float() for y, g in zip(gradients, gains, strict=True)]
        along = torch.stack([(s * n).sum((-2, -1)) for s, n in zip(scaled, normed, strict=True)])
        along = (_summed(along, ctx.group) / ctx.channels)[..., None, None]
        of_inputs = (
            torch.addcmul(s, n, a, value=-1).mul_(i).to(q.dtype)
            for s, n, a, i in zip(scaled, normed, along, inverse, strict=True)
        )
        of_gains = ((y * n.to(g.dtype)).sum(0).flatten() for y, n, g in zip(gradients, normed, gains, strict=True))
        return *of_inputs, *of_gains, None, None, None


def _summed(squares: Tensor, group: Any) -> Tensor:
    """fp32 [2, T], added up over the ranks of the tensor group."""
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares
