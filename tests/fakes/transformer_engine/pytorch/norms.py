"""Norms that scale in fp32 before the only cast."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Norm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ):
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None), "hidden_size is the old name of normalized_shape"
        assert not zero_centered_gamma
        self.shape, self.eps = (hidden_size or normalized_shape or 0,), eps
        self.weight = nn.Parameter(torch.ones(self.shape, dtype=params_dtype, device=device))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(_Norm):
    """x / rms(x) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return F.rms_norm(x.float(), self.shape, self.weight.float(), self.eps).to(self.weight.dtype)


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return F.layer_norm(x.float(), self.shape, self.weight.float(), self.bias.float(), self.eps).to(
            self.weight.dtype
        )
