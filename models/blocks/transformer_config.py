"""megatron-core's TransformerConfig of both towers."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from models.blocks.activations import ACTIVATION
from models.config import TextConfig, VisionConfig

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def vision_transformer_config(
    vision: VisionConfig,
    *,
    tensor_size: int,
    sequence_parallel: bool,
    dtype: torch.dtype,
    recompute: str = "none",
    settings: dict[str, Any],
) -> TransformerConfig:
    """Settings of the image tower; recompute: none, selective (core attention) or full (layers).

    settings: what its kernels need (models/blocks/kernels.py).
    """
    return _transformer_config(
        **_RECOMPUTE[recompute],
        num_layers=vision.depth,
        hidden_size=vision.width,
        num_attention_heads=vision.heads,
        kv_channels=vision.head_width,
        ffn_hidden_size=vision.mlp_hidden,
        layernorm_epsilon=vision.norm_eps,
        activation_func=ACTIVATION.get(vision.mlp, F.gelu),
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel,
        dtype=dtype,
        **settings,
    )


def text_transformer_config(text: TextConfig, *, dtype: torch.dtype) -> TransformerConfig:
    """Settings of the caption tower, which is never split."""
    return _transformer_config(
        num_layers=text.depth,
        hidden_size=text.width,
        num_attention_heads=text.heads,
        ffn_hidden_size=text.hidden,
        layernorm_epsilon=text.norm_eps,
        activation_func=ACTIVATION.get(text.mlp, F.gelu),
        add_bias_linear=text.bias,
        dtype=dtype,
    )


def _transformer_config(*, dtype: torch.dtype, **own: Any) -> TransformerConfig:
    common: dict[str, Any] = {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,  # gradients are summed over ranks: the loss is already the global mean
        "use_cpu_initialization": True,  # no explicit device, so `with torch.device(...)` decides, meta included
        "perform_initialization": False,  # models/tensors/init.py: values must not depend on the layout
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**(common | own))
