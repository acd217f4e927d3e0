"""Stand-in for flash-attn 2.8.3 (tests/fakes/README.md)."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    """[T, heads, d] each -> [T, heads, d]."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    for bounds, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max())
    asking, seen = (itertools.pairwise(bounds.tolist()) for bounds in (cu_seqlens_q, cu_seqlens_k))
    parts = [
        F.scaled_dot_product_attention(
            q[slice(*own)].transpose(0, 1),
            k[slice(*other)].transpose(0, 1),
            v[slice(*other)].transpose(0, 1),
            is_causal=causal,
            scale=softmax_scale,
        )
        for own, other in zip(asking, seen, strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])
