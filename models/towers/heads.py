"""What stands behind the image tower's blocks: final norm, pooling by the config, projection to the shared space."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.activations import ACTIVATION
from models.blocks.last_block import own_rows
from models.blocks.norms import NORMS
from models.blocks.packed import PackedTokens, sum_over_ranks, whole_tokens
from models.config import ModelConfig, VisionConfig
from models.tensors.sums import SummedLinear, multiplied_apart

Read = Literal["features", "pooled", "tokens"]
"""What is asked of an image tower: its features, what they are projected from, or the normed tokens."""


class TowerHead(nn.Module):
    """What heads of the image tower share: the final norm, if any, which sees rows whole on each tensor rank."""

    def __init__(self, vision: VisionConfig, config, tp_group):
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        norm = NORMS[vision.norm] if vision.final_norm else None
        self.norm = norm(config=config, hidden_size=vision.width, eps=vision.norm_eps) if norm else nn.Identity()
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # sees gathered rows, not a slice

    def gather_rows(self, hidden: Tensor, row: Tensor) -> Tensor:
        """[T or T / tp, 1, H] -> rows `row` (int64 [R]) of all T, [R, H], equal on every tensor rank.

        Sequence parallelism all-reduces R rows instead of gathering T.
        """
        rows = hidden.squeeze(1)
        if not self.sequence_parallel:
            return rows.index_select(0, row)
        return sum_over_ranks(own_rows(rows, row, self.tp_group), self.tp_group)


class VisionHead(TowerHead):
    """Norm, pooling, projection: packed tokens -> features [M, D], equal on every tensor rank."""

    def __init__(self, model: ModelConfig, config, tp_group):
        super().__init__(model.vision, config, tp_group)
        vision, dtype = model.vision, config.params_dtype
        self.pools, self.prefix_tokens = vision.pool, vision.prefix_tokens
        self.pool = AttentionPool(vision, dtype) if vision.pool == "attention" else None
        sizes = vision.width, model.embed_dim
        self.projection = SummedLinear(*sizes, bias=vision.head_bias, dtype=dtype) if vision.projection else None

    def forward(self, hidden: Tensor, tokens: PackedTokens, read: Read = "features") -> Tensor:
        """hidden: [R or R / tp, 1, H], what the last block answers with: class tokens and padding, or all T tokens.

        read: `pooled` stops before the projection, [M, H]; `tokens` before the pooling, [M, S, H], which takes all T.
        """
        if self.sequence_parallel:
            hidden = whole_tokens(hidden, self.tp_group)
        rows = hidden.squeeze(1)
        if read == "tokens":
            return tokens.by_sample(self.norm(rows))
        pooled = self._pooled(rows, tokens)
        return pooled if read == "pooled" else self.projected(pooled)

    def _pooled(self, rows: Tensor, tokens: PackedTokens) -> Tensor:
        if self.pools == "class":
            return self.norm(rows[: tokens.samples])
        every = tokens.by_sample(self.norm(rows))
        if self.pool is not None:
            return self.pool(every)
        return every[:, self.prefix_tokens :].mean(dim=1)

    def projected(self, rows: Tensor) -> Tensor:
        """[..., H] -> [..., D]."""
        return rows if self.projection is None else self.projection(rows)


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens of a sample, then x + MLP(norm(x)): [M, S, H] -> [M, H].

    Whole on every tensor rank. Source: the multi-head attention pooling of SigLIP (big_vision's vit.py, MAPHead), which
    Perception Encoder has with heads and an MLP of its own size.
    """

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        h, hidden = vision.width, vision.pool_hidden
        self.heads, self.activation = vision.pool_heads or vision.heads, ACTIVATION[vision.mlp]
        self.probe = nn.Parameter(torch.empty(h, dtype=dtype))
        self.qkv, self.proj = SummedLinear(h, 3 * h, dtype=dtype), SummedLinear(h, h, dtype=dtype)
        self.norm = nn.LayerNorm(h, eps=vision.norm_eps, dtype=dtype)
        self.fc1, self.fc2 = SummedLinear(h, hidden, dtype=dtype), SummedLinear(hidden, h, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, S, H] -> [M, H]."""
        width = len(self.probe)
        of_probe, of_tokens = (self.probe, slice(0, width)), (tokens, slice(width, None))  # rows [q; k; v]
        q, keys_values = multiplied_apart(self.qkv.weight, self.qkv.bias, of_probe, of_tokens)
        q = q.unflatten(-1, (self.heads, -1))  # [heads, d]
        k, v = keys_values.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [M, heads, S, d]
        q = q[None, :, None].expand(len(tokens), -1, -1, -1)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))
