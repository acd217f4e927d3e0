"""Stand-in for flash-attn 3 (hopper/flash_attn_interface.py), whose first releases also returned the log-sum-exp."""

from typing import Any

import flash_attn
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """[T, heads, d] each -> ([T, heads, d], log-sum-exp)."""
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal
    )
    return out, out.new_zeros(q.shape[1], len(q))
