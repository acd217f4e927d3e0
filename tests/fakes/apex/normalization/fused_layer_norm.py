"""Fused norms that scale in fp32 before the only cast."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Sequence[int], eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """x / rms(x) * weight over the last dimensions."""
    return F.rms_norm(input.float(), list(normalized_shape), weight.float(), eps).to(input.dtype)
