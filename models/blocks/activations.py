"""Nonlinearities of an MLP of two linears, by their names in the config; each keeps its input and no more."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SLOPE = 1.702  # of OpenAI's CLIP (its model.py, QuickGELU)


class _QuickGelu(torch.autograd.Function):
    """autograd's own graph would keep the sigmoid beside x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(_SLOPE * x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(_SLOPE * x)
        return gradient * gate * (1 + _SLOPE * x * (1 - gate))


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), any shape."""
    return _QuickGelu.apply(x)


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Name in a config -> function; gelu is exact (erf)."""
