"""Core attention on packed tokens, whatever kernel computes it, and the qkv projections of the EVA towers.

A kernel is built with (config, mask, layer_number, groups) and maps q, k, v [T, heads, d] and the `PackedTokens` to
[T, heads x d]; rope and the sub-LN norm around it are the same for every kernel.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from models.blocks.norms import QkNorm, SplitChannelNorm
from models.blocks.packages import FLASH_2, FLASH_3, FLASH_4, load
from models.blocks.packed import PackedTokens
from models.blocks.rope import rotate_both

Kernel = Callable[..., nn.Module]


class CoreAttention(MegatronModule):
    """Attention within each sample: [T, heads, d] -> [T, heads x d], or [R, heads x d] of the tokens that ask."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        pg_collection,
        *,
        kernel: Kernel,
        norm: bool = False,
        qk_norm: bool = False,
        turn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotate_both,
        **_: Any,
    ):
        super().__init__(config=config)
        self.turn = turn
        self.kernel = kernel(config=config, mask=attn_mask_type, layer_number=layer_number, groups=pg_collection)
        channels = config.num_attention_heads * config.kv_channels
        self.inner_norm = SplitChannelNorm(config, channels, pg_collection.tp) if norm else None
        self.qk_norm = QkNorm(config, pg_collection.tp) if qk_norm else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, packed_seq_params: PackedTokens, **__: Any) -> Tensor:
        """Norm of q and k where the tower has one, rope when the tokens carry it, the kernel, the sub-LN norm."""
        tokens = packed_seq_params
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        if tokens.rope is not None:
            cos, sin = (table.transpose(1, 2) for table in tokens.rope)  # [1 or M, S, 1, d]
            q, k = (t.flatten(0, 1) for t in self.turn(tokens.by_sample(q), tokens.by_sample(k), cos, sin))
        if tokens.queries is None:
            out = self.kernel(q, k, v, tokens)
        else:
            out = self.kernel(q.index_select(0, tokens.queries.rows), k, v, tokens)
            out = tokens.queries.pad(out)
        return out if self.inner_norm is None else self.inner_norm(out.unsqueeze(1)).squeeze(1)


class SdpaAttention(MegatronModule):
    """torch's scaled_dot_product_attention, which picks flash or memory-efficient kernels on a GPU by itself."""

    def __init__(self, config: TransformerConfig, mask: AttnMaskType, **_: Any):
        super().__init__(config=config)
        self.causal = mask == AttnMaskType.causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens) -> Tensor:
        """[T, heads, d] -> [T, heads x d]."""
        seen = _seen_by_queries(tokens) if self.causal and tokens.queries is not None else None
        q, k, v = (tokens.by_sample(t).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and seen is None)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _seen_by_queries(tokens: PackedTokens) -> Tensor:
    """Bool [M, 1, 1, S]: a query sees its sample up to itself."""
    assert tokens.queries is not None
    slots = torch.arange(tokens.tokens_per_sample, device=tokens.queries.rows.device)
    return (slots <= (tokens.queries.rows % tokens.tokens_per_sample).unsqueeze(1))[:, None, None]


class MatmulAttention(MegatronModule):
    """Two matrix products and a softmax in fp32: on a CPU in bf16 several times faster than torch's own backward.

    Keeps the S x S weights of every head, which short samples can afford and long ones cannot.
    """

    def __init__(self, config: TransformerConfig, mask: AttnMaskType, **_: Any):
        super().__init__(config=config)
        assert mask == AttnMaskType.no_mask, "written for the image tower, which has no mask"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens) -> Tensor:
        """[T, heads, d] -> [T, heads x d]."""
        q, k, v = (tokens.by_sample(t).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        out = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


class FlashAttention(MegatronModule):
    """flash-attn's varlen kernel on the packed tokens as they lie: no view by sample, no transpose.

    version: 2 (flash-attn), 3 (flash_attn_interface, Hopper) or 4 (flash_attn.cute, Hopper and later). All take these
    arguments by these names; by place they do not (the fourth of 4 is `qv`).
    """

    PACKAGES: ClassVar = {2: FLASH_2, 3: FLASH_3, 4: FLASH_4}

    def __init__(self, config: TransformerConfig, mask: AttnMaskType, *, version: int, **_: Any):
        super().__init__(config=config)
        self.causal = mask == AttnMaskType.causal
        self.attend = load(self.PACKAGES[version]).flash_attn_varlen_func

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens) -> Tensor:
        """[T, heads, d] in bf16 -> [T, heads x d]."""
        out = self.attend(
            q,
            k,
            v,
            cu_seqlens_q=tokens.cu_seqlens_q,
            cu_seqlens_k=tokens.cu_seqlens_kv,
            max_seqlen_q=tokens.max_seqlen_q,
            max_seqlen_k=tokens.max_seqlen_kv,
            causal=self.causal,
        )
        if isinstance(out, tuple):  # 4 and the first releases of 3 return the log-sum-exp, too
            out = out[0]
        return out.flatten(1)


class QkvWithBias(MegatronModule):
    """The fused qkv projection with biases on q and v only: [T, 1, H] -> [T, 1, 3 H / tp], per head q, k, v."""

    def __init__(
        self, input_size: int, output_size: int, *, column: Kernel, config, tp_group, bias: bool, **kwargs: Any
    ):
        super().__init__(config=config)
        self.linear = column(input_size, output_size, config=config, tp_group=tp_group, bias=False, **kwargs)
        self.bias = QkvBias(config, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Projection and bias."""
        return self.linear(x)[0] + self.bias(), None


class QkvBias(nn.Module):
    """q and v biases of this rank's heads, laid out per head as (q, 0, v)."""

    def __init__(self, config: TransformerConfig, tp_group):
        super().__init__()
        local = config.num_attention_heads * config.kv_channels // tp_group.size()
        self.head_width = config.kv_channels
        self.q = nn.Parameter(torch.zeros(local, dtype=config.params_dtype))
        self.v = nn.Parameter(torch.zeros(local, dtype=config.params_dtype))

    def forward(self) -> Tensor:
        """[3 H / tp]."""
        q, v = self.q.view(-1, self.head_width), self.v.view(-1, self.head_width)
        return torch.stack([q, torch.zeros_like(q), v], dim=1).flatten()


class SeparateQkv(MegatronModule):
    """Three weights (EVA-02 B/L) that answer in the fused layout: [T, 1, H] -> [T, 1, 3 H / tp], per head q, k, v."""

    def __init__(
        self, input_size: int, output_size: int, *, column: Kernel, config, tp_group, bias: bool, **kwargs: Any
    ):
        super().__init__(config=config)
        one = dict(config=config, tp_group=tp_group, bias=False, **kwargs)
        self.q, self.k, self.v = (column(input_size, output_size // 3, **one) for _ in range(3))
        self.bias = QkvBias(config, tp_group) if bias else None
        self.head_width = config.kv_channels

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Three projections, interleaved per head."""
        parts = [linear(x)[0] for linear in (self.q, self.k, self.v)]
        heads = [part.unflatten(-1, (-1, self.head_width)) for part in parts]
        mixed = torch.stack(heads, dim=-2).flatten(-3)
        return (mixed if self.bias is None else mixed + self.bias()), None
