"""Transformer Engine under the image tower: linears, norms, attention in thd form, fp8 (megatron-core's wrappers).

Notable choices:
- no LayerNormLinear: a post-norm block has its norm behind the linear, and without the fusion every parameter has the
  name and shape that it has on the local backend, so checkpoints know of no backend;
- fp8 quantises the GEMMs of the blocks only (qkv, proj, fc1, fc2 or gate, up, down). bf16 stay: patch embedding, core
  attention, norms, residual stream, head, caption tower, and the first and last `model.fp8_bf16_blocks` blocks;
- delayed scaling is not offered: its scales follow the history of forward passes, so a stage replayed from its stash
  would compute other numbers than it did in the encode phase, and the gradients would not be those of the loss. The
  recipes below scale by the tensor at hand, so a replay repeats the encode phase.

Never run on a GPU (docs/fp8.md).
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from models.blocks.norms import mark_sequence_parallel
from models.blocks.packed import PackedTokens
from models.config import ModelConfig

__all__ = ["TEColumnParallelLinear", "TERowParallelLinear", "TeAttention", "TeNorm", "settings"]

_FP8_RECIPES = {
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
"""model.fp8 -> megatron-core's format and recipe; hybrid is e4m3 forward and e5m2 for gradients."""


class TeAttention(MegatronModule):
    """cuDNN's or flash-attn's kernel, whichever Transformer Engine picks: q, k, v [T, heads, d] -> [T, heads x d]."""

    def __init__(self, config: TransformerConfig, mask: AttnMaskType, layer_number: int, groups):
        super().__init__(config=config)
        self.mask = mask
        self.attention = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=mask,
            attention_type="self",
            pg_collection=groups,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens) -> Tensor:
        """Attention within each sample, by the tokens' cu_seqlens."""
        return self.attention(q, k, v, None, attn_mask_type=self.mask, packed_seq_params=tokens)


class TeNorm:
    """RMSNorm or LayerNorm in one kernel; scales before the only cast, so in bf16 not bit-equal to the local one.

    A class, because megatron-core takes a function in the place of a norm for the norm itself.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> nn.Module:  # type: ignore[misc]
        """Transformer Engine's module."""
        module = TENorm(config=config, hidden_size=hidden_size, eps=eps)
        mark_sequence_parallel(module, config)
        return module


def settings(model: ModelConfig, layers: range) -> dict[str, Any]:
    """Settings of megatron-core's TransformerConfig for a stage that holds blocks `layers`."""
    return {
        "normalization": {"rms": "RMSNorm", "layer": "LayerNorm"}[model.vision.norm],
        # The wrappers take their device from here; under use_cpu_initialization it would be the CPU on every machine.
        "use_cpu_initialization": False,
        "init_model_with_meta_device": torch.get_default_device().type == "meta",
        **_fp8_settings(model, layers),
    }


def _fp8_settings(model: ModelConfig, layers: range) -> dict[str, Any]:
    if model.fp8 == "none":
        return {}
    edge, depth = model.fp8_bf16_blocks, model.vision.depth
    return {
        **_FP8_RECIPES[model.fp8],
        # A cached fp8 copy of a weight outlives the optimizer's update unless somebody drops it in time; quantising a
        # weight in every pass costs one read of it against 2 T FLOPs per element.
        "disable_parameter_transpose_cache": True,
        "first_last_layers_bf16": edge > 0,
        # megatron-core numbers the blocks of a stage from 0 and the last ones against the depth of the whole tower.
        "num_layers_at_start_in_bf16": min(len(layers), max(0, edge - layers.start)),
        "num_layers_at_end_in_bf16": min(depth, edge + layers.start) if edge else 0,
    }
