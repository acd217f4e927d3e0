"""Rotary position embedding of q and k in one pass each way, fp32 inside, nothing kept but the tables."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.blocks.fused.operators import operator


@operator("turn(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)")
def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Turn the pairs of neighbouring channels of q and k [M, S, heads, d], or turn them back; tables [1 or M, S, 1, d].

    (a, b) -> (a cos - b sin, b cos + a sin); both channels of a pair have one angle.
    """
    return _turned(q, cos, sin, back), _turned(k, cos, sin, back)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    pairs, c, s = (t.float().unflatten(-1, (-1, 2)) for t in (x, cos, sin))
    sign = torch.arange(2, device=x.device) * 2.0 - 1.0  # (-1, 1)
    turned = pairs * c + pairs.flip(-1) * s * (-sign if back else sign)
    return turned.flatten(-2).to(x.dtype)


class _Turn(torch.autograd.Function):
    """Turning back is the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *turn(of_q, of_k, cos, sin, True), None, None


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [M, S, heads, d] turned by tables [1 or M, S, 1, d]."""
    return _Turn.apply(q, k, cos, sin)
