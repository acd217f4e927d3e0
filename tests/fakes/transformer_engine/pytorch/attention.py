"""Attention in thd form, by cu_seqlens."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.linear import TransformerEngineBaseModule

LATER: Any = object()
"""Default of what came after 2.9, the oldest version of the range, which does not take it: nobody may pass it."""


class DotProductAttention(TransformerEngineBaseModule):
    """softmax(q k^T) v within each sequence."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = LATER,
        softcap: float = LATER,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        name: str | None = LATER,
    ):
        super().__init__()
        assert all(value is LATER for value in (bottom_right_diagonal, softcap, name))
        assert attention_dropout == 0 and attention_type == "self" and softmax_type == "vanilla"
        self.heads, self.head_width, self.scale = num_attention_heads // tp_size, kv_channels, softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = LATER,
        softcap: float | None = LATER,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = LATER,
        num_splits: int | None = LATER,
        **_: Any,
    ) -> Tensor:
        """[T, heads, d] each -> [T, heads x d]."""
        assert all(value is LATER for value in (bottom_right_diagonal, softcap, bf16_backward, num_splits))
        if query_layer.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError("No dot product attention backend is available for the provided inputs.")
        assert qkv_format == "thd" and attn_mask_type in ("padding", "padding_causal"), (qkv_format, attn_mask_type)
        assert query_layer.shape[1:] == (self.heads, self.head_width)
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        for bounds, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_kv, max_seqlen_kv)):
            assert longest == int(bounds.diff().max())
        causal = attn_mask_type == "padding_causal"
        asking, seen = (itertools.pairwise(bounds.tolist()) for bounds in (cu_seqlens_q, cu_seqlens_kv))
        parts = [
            F.scaled_dot_product_attention(
                query_layer[slice(*own)].transpose(0, 1),
                key_layer[slice(*other)].transpose(0, 1),
                value_layer[slice(*other)].transpose(0, 1),
                is_causal=causal,
                scale=self.scale,
            )
            for own, other in zip(asking, seen, strict=True)
        ]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
