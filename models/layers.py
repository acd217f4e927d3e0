"""Transformer layers of the EVA towers as megatron-core ModuleSpecs (local kernels: torch).

Notable choices:
- activations are packed tokens [T, 1, H], T = M x S: sequence parallelism splits T, never S (257 is prime);
- the post-norm residual fills the bias-dropout-add slot of megatron-core's TransformerLayer, so post-norm and pre-norm
  towers share every other piece;
- q/v biases are parameters of their own: the trust ratio of LAMB and the authors' checkpoints see them as two tensors;
- the sub-LN norms see channels that tensor parallelism splits: they gather, normalise and split again (B/L only).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from models.config import TextConfig, VisionConfig
from models.rope import rotate

Spec = Any  # ModuleSpec or class, as megatron-core's submodule tables take them


@dataclass
class PackedTokens(PackedSeqParams):
    """How T packed tokens fall into samples: M samples of S tokens each (thd format with equal lengths)."""

    samples: int = 0
    tokens_per_sample: int = 0
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, each [1 or M, 1, S, head_width]; None for towers without rope."""

    @staticmethod
    def of(samples: int, tokens_per_sample: int, device: torch.device, rope=None) -> "PackedTokens":
        """Describe `samples` x `tokens_per_sample` tokens."""
        bounds = torch.arange(samples + 1, dtype=torch.int32, device=device) * tokens_per_sample
        return PackedTokens(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=tokens_per_sample,
            max_seqlen_kv=tokens_per_sample,
            samples=samples,
            tokens_per_sample=tokens_per_sample,
            rope=rope,
        )


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast to the weight's dtype, then scaled (the authors' order; paper section 2)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(self.weight.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm under megatron-core's constructor; megatron-core's own wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Mark parameters whose gradients are sums over a rank's own tokens: the tensor axis has to add them up."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SplitChannelNorm(nn.Module):
    """LayerNorm over channels that tensor parallelism splits: [T, 1, C/tp] -> [T, 1, C/tp].

    Every rank of the tensor group normalises the gathered row, so its weight gradient is complete on each.
    """

    def __init__(self, config: TransformerConfig, channels: int, tp_group):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all C channels."""
        if self.tp_group.size() == 1:
            return self.norm(x)
        full = gather_from_tensor_model_parallel_region(x, group=self.tp_group)
        return scatter_to_tensor_model_parallel_region(self.norm(full), group=self.tp_group)


class PostNormResidual(nn.Module):
    """residual + norm(branch + bias): the residual form of the 18B and E/14 towers."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., nn.Module]):
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """megatron-core asks for the function first and calls it with ((branch, bias), residual, dropout rate)."""
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _rate: float) -> Tensor:
        branch, bias = branch_and_bias
        return residual + self.norm(branch if bias is None else branch + bias)


class QkvWithBias(MegatronModule):
    """The fused qkv projection with biases on q and v only: [T, 1, H] -> [T, 1, 3 H / tp], per head q, k, v."""

    def __init__(self, input_size: int, output_size: int, *, config, tp_group, bias: bool, **kwargs: Any):
        super().__init__(config=config)
        self.linear = ColumnParallelLinear(
            input_size, output_size, config=config, tp_group=tp_group, bias=False, **kwargs
        )
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

    def __init__(self, input_size: int, output_size: int, *, config, tp_group, bias: bool, **kwargs: Any):
        super().__init__(config=config)
        one = dict(config=config, tp_group=tp_group, bias=False, **kwargs)
        self.q, self.k, self.v = (ColumnParallelLinear(input_size, output_size // 3, **one) for _ in range(3))
        self.bias = QkvBias(config, tp_group) if bias else None
        self.head_width = config.kv_channels

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Three projections, interleaved per head."""
        parts = [linear(x)[0] for linear in (self.q, self.k, self.v)]
        heads = [part.unflatten(-1, (-1, self.head_width)) for part in parts]
        mixed = torch.stack(heads, dim=-2).flatten(-3)
        return (mixed if self.bias is None else mixed + self.bias()), None


class SdpaAttention(MegatronModule):
    """Core attention on packed tokens through torch's scaled_dot_product_attention: [T, heads, d] -> [T, heads x d]."""

    def __init__(
        self, config: TransformerConfig, attn_mask_type: AttnMaskType, pg_collection=None, norm=False, **_: Any
    ):
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal
        channels = config.num_attention_heads * config.kv_channels
        self.inner_norm = SplitChannelNorm(config, channels, pg_collection.tp) if norm else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, packed_seq_params: PackedTokens, **__: Any) -> Tensor:
        """Attention within each sample; rope on q and k when the tokens carry it."""
        tokens = packed_seq_params
        q, k, v = (t.unflatten(0, (tokens.samples, tokens.tokens_per_sample)).transpose(1, 2) for t in (q, k, v))
        if tokens.rope is not None:
            q, k = rotate(q, *tokens.rope), rotate(k, *tokens.rope)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)
        return out if self.inner_norm is None else self.inner_norm(out.unsqueeze(1)).squeeze(1)


class SwiGLU(MegatronModule):
    """down(norm(silu(gate x) * up x)): the EVA-02 B/L MLP with its sub-LN; three weights, all with biases."""

    def __init__(self, config: TransformerConfig, tp_group, norm: bool, **_: Any):
        super().__init__(config=config)
        h, f = config.hidden_size, config.ffn_hidden_size
        common = dict(config=config, init_method=config.init_method, bias=True, tp_group=tp_group)
        self.gate = ColumnParallelLinear(h, f, **common)
        self.up = ColumnParallelLinear(h, f, **common)
        self.norm = SplitChannelNorm(config, f, tp_group) if norm else None
        self.down = RowParallelLinear(f, h, **common, input_is_parallel=True, skip_bias_add=True)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> ([T, 1, H], bias [H])."""
        hidden = F.silu(self.gate(x)[0]) * self.up(x)[0]
        return self.down(hidden if self.norm is None else self.norm(hidden))


def _layer_spec(
    *,
    config: TransformerConfig,
    norm: type[nn.Module],
    post_norm: bool,
    mask: AttnMaskType,
    linear_qkv: Spec,
    core_attention: Spec,
    mlp: Spec,
) -> ModuleSpec:
    residual: Spec = get_bias_dropout_add
    if post_norm:
        residual = ModuleSpec(module=PostNormResidual, params={"config": config, "norm": norm})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if post_norm else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv, core_attention=core_attention, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=IdentityOp if post_norm else norm,
            mlp=mlp,
            mlp_bda=residual,
        ),
    )


def _gelu_mlp(config: TransformerConfig) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": config.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )


def vision_layer_spec(vision: VisionConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> ModuleSpec:
    """One block of the image tower with local kernels."""

    def linear_qkv(*args: Any, bias: bool, **kwargs: Any) -> nn.Module:
        # megatron-core asks for a bias wherever its linears have one; here qkv_bias alone decides.
        module: type[nn.Module] = ColumnParallelLinear
        if vision.separate_qkv:
            module = SeparateQkv
        elif vision.qkv_bias:
            module = QkvWithBias
        return module(*args, bias=vision.qkv_bias, **kwargs)

    def core_attention(**kwargs: Any) -> nn.Module:
        return SdpaAttention(norm=vision.attention_norm, **kwargs)

    class SwiGLUMlp(SwiGLU):
        # A class, not a ModuleSpec: megatron-core warns of every MLP spec whose module is not its own.
        def __init__(self, config: TransformerConfig):
            super().__init__(config, groups.tp, norm=vision.mlp_norm)

    return _layer_spec(
        config=config,
        norm=NORMS[vision.norm],
        post_norm=vision.post_norm,
        mask=AttnMaskType.no_mask,
        linear_qkv=linear_qkv,
        core_attention=core_attention,
        mlp=SwiGLUMlp if vision.mlp == "swiglu" else _gelu_mlp(config),
    )


def text_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One block of the caption tower with local kernels: pre-norm, causal, every linear with a bias."""
    return _layer_spec(
        config=config,
        norm=LayerNorm,
        post_norm=False,
        mask=AttnMaskType.causal,
        linear_qkv=ColumnParallelLinear,
        core_attention=SdpaAttention,
        mlp=_gelu_mlp(config),
    )


def build_block(
    spec: ModuleSpec, layers: int, config: TransformerConfig, groups: ProcessGroupCollection
) -> TransformerBlock:
    """`layers` blocks of one pipeline stage; the final norm belongs to the tower's head, not to the block."""
    block = TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=None),
        post_process=False,
        pg_collection=groups,
    )
    for layer in block.layers:
        # megatron-core adds the residual under enable_grad even when the caller asked for none; the encode phase
        # runs without grad, and a graph there would keep every activation alive.
        layer.bias_dropout_add_exec_handler = nullcontext
    return block


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def vision_transformer_config(
    vision: VisionConfig, *, tensor_size: int, sequence_parallel: bool, dtype: torch.dtype, recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's settings of the image tower; recompute: none, selective (core attention) or full (layers)."""
    return _transformer_config(
        **_RECOMPUTE[recompute],
        num_layers=vision.depth,
        hidden_size=vision.width,
        num_attention_heads=vision.heads,
        kv_channels=vision.head_width,
        ffn_hidden_size=vision.mlp_hidden,
        layernorm_epsilon=vision.norm_eps,
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel,
        dtype=dtype,
    )


def text_transformer_config(text: TextConfig, *, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's settings of the caption tower, which is never split."""
    return _transformer_config(
        num_layers=text.depth,
        hidden_size=text.width,
        num_attention_heads=text.heads,
        ffn_hidden_size=4 * text.width,
        layernorm_epsilon=text.norm_eps,
        dtype=dtype,
    )


def _transformer_config(*, dtype: torch.dtype, **sizes: Any) -> TransformerConfig:
    return TransformerConfig(
        **sizes,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        activation_func=F.gelu,  # exact (erf), as both towers have it
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,  # gradients are summed over ranks: the loss is already the global mean
        use_cpu_initialization=True,  # no explicit device, so `with torch.device(...)` decides, meta included
        perform_initialization=False,  # models/init.py: values must not depend on the layout
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
