"""Transformer blocks of the EVA towers as megatron-core ModuleSpecs, on the kernels of models/blocks/kernels.py.

Notable choices:
- activations are packed tokens [T, 1, H], T = M x S: sequence parallelism splits T, never S (257 is prime);
- the post-norm residual fills the bias-dropout-add slot of megatron-core's TransformerLayer, so post-norm and pre-norm
  towers share every other piece;
- q/v biases are parameters of their own: the trust ratio of LAMB and the authors' checkpoints see them as two tensors;
- the last block of a tower works for the tokens that its head reads (models/blocks/last_block.py);
- the sub-LN norms see channels that tensor parallelism splits: they gather, normalise and split again (B/L only).
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
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

from models.blocks.attention import CoreAttention, QkvWithBias, SdpaAttention, SeparateQkv
from models.blocks.fused.block import FusedBlock, FusedLastBlock
from models.blocks.fused.turning import turned
from models.blocks.kernels import Kernels
from models.blocks.last_block import LastBlock
from models.blocks.norms import NORMS, PostNormResidual, ScaledResidual, SplitChannelNorm
from models.blocks.outputs import ColumnLinear, RowLinear
from models.blocks.rope import rotate_both
from models.config import TextConfig, VisionConfig

Spec = Any  # ModuleSpec or class, as megatron-core's submodule tables take them
Groups: TypeAlias = ProcessGroupCollection
"""Process groups that a tower is built for."""
Span: TypeAlias = Literal["whole", "below", "above"]
"""What of a tower, or of a stage of it, a pass runs: all, the blocks at the input that are not trained, or the rest."""


class SwiGLU(MegatronModule):
    """down(norm(silu(gate x) * up x)): the EVA-02 B/L MLP with its sub-LN; three weights, with biases as configured."""

    def __init__(self, config: TransformerConfig, tp_group, kernels: Kernels, norm: bool):
        super().__init__(config=config)
        h, f = config.hidden_size, config.ffn_hidden_size
        bias = config.add_bias_linear
        common = dict(config=config, init_method=config.init_method, bias=bias, tp_group=tp_group, is_expert=False)
        self.gate, self.up = (
            kernels.column(h, f, **common, gather_output=False, skip_bias_add=False, tp_comm_buffer_name="fc1")
            for _ in range(2)
        )
        self.norm = SplitChannelNorm(config, f, tp_group) if norm else None
        self.down = kernels.row(f, h, **common, input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="fc2")

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> ([T, 1, H], bias [H])."""
        hidden = F.silu(self.gate(x)[0]) * self.up(x)[0]
        return self.down(hidden if self.norm is None else self.norm(hidden))


def _layer_spec(
    *,
    config: TransformerConfig,
    kernels: Kernels,
    post_norm: bool,
    layer_scale: bool = False,
    mask: AttnMaskType,
    linear_qkv: Spec,
    core_attention: Spec,
    mlp: Spec,
) -> ModuleSpec:
    residual: Spec = get_bias_dropout_add
    if post_norm:
        residual = ModuleSpec(module=PostNormResidual, params={"config": config, "norm": kernels.norm})
    elif layer_scale:
        residual = ModuleSpec(module=ScaledResidual, params={"config": config})
    return ModuleSpec(
        module=FusedBlock if kernels.fused else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if post_norm else kernels.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv, core_attention=core_attention, linear_proj=kernels.row
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=IdentityOp if post_norm else kernels.norm,
            mlp=mlp,
            mlp_bda=residual,
        ),
    )


def _gelu_mlp(config: TransformerConfig, kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": config.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=kernels.column, linear_fc2=kernels.row),
    )


def _swiglu_mlp(groups: Groups, kernels: Kernels, norm: bool) -> type[SwiGLU]:
    class SwiGLUMlp(SwiGLU):
        # A class, not a ModuleSpec: megatron-core warns of every MLP spec whose module is not its own.
        # Since 0.18 it is also told of groups, multi-token prediction and a name.
        def __init__(self, config: TransformerConfig, **_: Any):
            super().__init__(config, groups.tp, kernels, norm=norm)

    return SwiGLUMlp


def vision_layer_spec(vision: VisionConfig, config: TransformerConfig, groups: Groups, kernels: Kernels) -> ModuleSpec:
    """One block of the image tower."""

    return _layer_spec(
        config=config,
        kernels=kernels,
        post_norm=vision.post_norm,
        layer_scale=vision.layer_scale is not None,
        mask=AttnMaskType.no_mask,
        linear_qkv=_linear_qkv(vision, kernels),
        core_attention=partial(
            CoreAttention,
            kernel=kernels.attention,
            norm=vision.attention_norm,
            qk_norm=vision.qk_norm,
            turn=turned if kernels.fused else rotate_both,
        ),
        mlp=_swiglu_mlp(groups, kernels, vision.mlp_norm) if vision.mlp == "swiglu" else _gelu_mlp(config, kernels),
    )


def _linear_qkv(vision: VisionConfig, kernels: Kernels) -> Callable[..., nn.Module]:
    module: Callable[..., nn.Module] = kernels.column
    if vision.separate_qkv:
        module = partial(SeparateQkv, column=kernels.column)
    elif vision.qkv_bias and not vision.key_bias:
        module = partial(QkvWithBias, column=kernels.column)

    def build(*args: Any, bias: bool, **kwargs: Any) -> nn.Module:
        # megatron-core asks for a bias wherever its linears have one; here qkv_bias alone decides.
        return module(*args, bias=vision.qkv_bias, **kwargs)

    return build


def text_layer_spec(text: TextConfig, config: TransformerConfig, groups: Groups, *, fused: bool) -> ModuleSpec:
    """One block of the caption tower, pre-norm, on our linears and torch's attention and norms, fused or not."""
    kernels = Kernels(column=ColumnLinear, row=RowLinear, norm=NORMS[text.norm], attention=SdpaAttention, fused=fused)
    return _layer_spec(
        config=config,
        kernels=kernels,
        post_norm=False,
        mask=AttnMaskType.causal if text.causal else AttnMaskType.no_mask,
        linear_qkv=ColumnLinear,
        core_attention=partial(CoreAttention, kernel=SdpaAttention, turn=turned if fused else rotate_both),
        mlp=_swiglu_mlp(groups, kernels, norm=False) if text.mlp == "swiglu" else _gelu_mlp(config, kernels),
    )


def build_block(
    spec: ModuleSpec, layers: int, config: TransformerConfig, groups: Groups, *, ends_tower: bool
) -> TransformerBlock:
    """`layers` blocks of one pipeline stage; the final norm belongs to the tower's head, not to the block."""
    specs = [spec] * layers
    if ends_tower and specs:
        last = FusedLastBlock if spec.module is FusedBlock else LastBlock
        specs[-1] = ModuleSpec(module=last, submodules=spec.submodules)
    block = TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=None),
        post_process=False,
        pg_collection=groups,
    )
    for layer in block.layers:
        # megatron-core adds the residual under enable_grad even when the caller asked for none; the encode phase
        # runs without grad, and a graph there would keep every activation alive.
        layer.bias_dropout_add_exec_handler = nullcontext
        if isinstance(layer, FusedBlock):
            layer.ends_stack = layer is block.layers[-1]
    return block


class Divided:
    """A block of layers in two spans: what a step runs once, and what it runs again with a graph."""

    def __init__(self, block: TransformerBlock, below: int):
        """below: layers of the first span; the layers stay those of `block`, under their names."""
        layers = list(block.layers)
        self.spans: dict[Span, list[nn.Module]] = {"whole": layers, "below": layers[:below], "above": layers[below:]}
        self._blocks = {span: _with_layers(block, own) for span, own in self.spans.items() if own}

    def __call__(self, hidden: Tensor, tokens: Any, span: Span) -> Tensor:
        """[T or T / tp, 1, H] through the layers of a span, which may have none."""
        if span not in self._blocks:
            return hidden
        block = self._blocks[span]
        # A checkpointed layer has no gradients at all where its input wants none (reentrant autograd).
        if torch.is_grad_enabled() and block.config.recompute_granularity == "full" and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return block(hidden, None, packed_seq_params=tokens)


class DividedTower(nn.Module):
    """A tower whose blocks of this stage are run in two spans where the first ones are frozen."""

    block: TransformerBlock

    def divide(self, below: int) -> None:
        """Let span `below` be what leads to the first `below` blocks and those, `above` what follows."""
        self._divided = Divided(self.block, below)

    @property
    def blocks_above(self) -> nn.ModuleList:
        """Blocks of span `above`: all where the tower is not divided."""
        return nn.ModuleList(self._divided.spans["above"])

    @property
    def is_divided(self) -> bool:
        """Whether span `below` has a block."""
        return bool(self._divided.spans["below"])


def _with_layers(block: TransformerBlock, layers: list[nn.Module]) -> TransformerBlock:
    """A view of a block that runs some of its layers; it is not a module of the tower, so it has no names."""
    if len(layers) == len(block.layers):
        return block
    view = copy.copy(block)
    view._modules = dict(block._modules)
    view.layers = nn.ModuleList(layers)
    view.num_layers_per_pipeline_rank = len(layers)
    return view
