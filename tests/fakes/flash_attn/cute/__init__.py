"""Stand-in for flash-attn 4 (flash_attn/cute/interface.py of 4.0.0b36): the fourth argument by place is `qv`."""

from typing import Any

from torch import Tensor

import flash_attn

__version__ = "0.0.0"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """[T, heads, d] each -> ([T, heads, d], None without return_lse)."""
    assert qv is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and max_seqlen_q and max_seqlen_k
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal
    )
    return out, None
