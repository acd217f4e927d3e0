"""Fresh values of every logical tensor, the same for every layout.

A value depends on (seed, logical name, rule) alone: each tensor has a generator of its own and a rank keeps its slice.
Rules: `clip_rule` (authors' eva_vit_model.py and transformer.py) and `student_rule` (EVA-01's modeling_pretrain.py).
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.clip import LEARNED_SCALE_INIT, LOGIT_BIAS_INIT
from models.config import ModelConfig
from models.tensors.naming import LogicalTensor

Fill = Callable[[Tensor, torch.Generator], Tensor]
"""Fills a tensor in place from a generator."""
Rule = Callable[[str, ModelConfig], Fill]
"""(logical name, model) -> how the tensor starts."""

_VISION_STD = 0.02
_STUDENT_STD = 0.015  # EVA-01 g; the paper does not say what the 18B's MIM stage starts from
_HEAD_SCALE = 0.001  # init_scale of the authors
_SCALARS = {"logit_scale.log_scale": LEARNED_SCALE_INIT, "logit_bias.bias": LOGIT_BIAS_INIT}


def _normal(std: float) -> Fill:
    return lambda t, g: t.normal_(0.0, std, generator=g)


def _truncated_normal(std: float) -> Fill:
    """Fill from a normal with this std, only what lies within one std."""
    return lambda t, g: nn.init.trunc_normal_(t, 0.0, std, -std, std, generator=g)


def _uniform(bound: float) -> Fill:
    return lambda t, g: t.uniform_(-bound, bound, generator=g)


def _fill(value: float) -> Fill:
    return lambda t, g: t.fill_(value)


def _depth_divisor(name: str) -> float:
    """sqrt(2 i) for the matrices of block i (from 1) that write to the residual stream, 1 for all others."""
    if not name.endswith(("attn.proj.weight", "mlp.fc2.weight", "mlp.down.weight")):
        return 1.0
    return math.sqrt(2 * (int(name.split(".")[2]) + 1))


def _vision_rule(name: str, model: ModelConfig) -> Fill:
    v = model.vision
    if name.startswith("vision.embed.") and name.endswith(("weight", "bias")):
        return _uniform(1 / math.sqrt(3 * v.patch_size**2))  # the convolution keeps torch's default
    if name.startswith("vision.embed."):
        return _normal(_VISION_STD)
    if name == "vision.head.projection.weight":
        return _normal(_VISION_STD * _HEAD_SCALE)
    return _normal(_VISION_STD / _depth_divisor(name))


def _text_rule(name: str, model: ModelConfig) -> Fill:
    width, depth = model.text.width, model.text.depth
    if name == "text.token_embedding":
        return _normal(0.02)
    if name == "text.pos_embed":
        return _normal(0.01)
    if name.endswith(("mlp.fc1.bias", "mlp.gate.bias", "mlp.up.bias")):
        return _uniform(width**-0.5)  # torch's default for a Linear of this fan-in
    if name.endswith(("mlp.fc2.bias", "mlp.down.bias")):
        return _uniform((4 * width) ** -0.5)
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "mlp.down.weight")):
        return _normal(width**-0.5 * (2 * depth) ** -0.5)
    if name.endswith(("mlp.fc1.weight", "mlp.gate.weight", "mlp.up.weight")):
        return _normal((2 * width) ** -0.5)
    return _normal(width**-0.5)  # qkv, projection


def _is_norm(name: str) -> bool:
    return any(part.startswith(("norm", "q_norm", "k_norm")) for part in name.split(".")[:-1])


def _is_bias(name: str) -> bool:
    return "bias" in name.split(".")


def clip_rule(name: str, model: ModelConfig) -> Fill:
    """Both towers of a CLIP and its scalars."""
    if name in _SCALARS:
        return _fill(_SCALARS[name])
    if _is_norm(name):
        return _fill(1.0 if name.endswith(".weight") else 0.0)
    if name.endswith(".gain"):
        return _fill(model.vision.layer_scale or 0.0)
    if name.startswith("text.") and not name.endswith(("qkv.bias", "proj.bias")):
        return _text_rule(name, model)
    if _is_bias(name) and not name.startswith("vision.embed."):
        return _fill(0.0)
    return _vision_rule(name, model)


def student_rule(name: str, model: ModelConfig) -> Fill:
    """A student of the MIM stage: truncated normals, patch kernel and prediction head included, and no other spread.

    With post-norm the gains of the blocks start at zero, so that every block starts as the identity.
    """
    if _is_norm(name):
        is_block_norm = name.startswith("vision.blocks.") and name.split(".")[3] in ("norm1", "norm2")
        zero = _is_bias(name) or (model.vision.post_norm and is_block_norm)
        return _fill(0.0 if zero else 1.0)
    if name.endswith(".gain"):
        return _fill(model.vision.layer_scale or 0.0)
    return _fill(0.0) if _is_bias(name) else _truncated_normal(_STUDENT_STD / _depth_divisor(name))


def initial_value(tensor: LogicalTensor, model: ModelConfig, seed: int, rule: Rule = clip_rule) -> Tensor:
    """The whole logical tensor, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    return rule(tensor.name, model)(torch.empty(tensor.shape, dtype=torch.float32, device="cpu"), generator)


def every_name(name: str) -> bool:
    """All tensors are drawn."""
    return True


@torch.no_grad()
def initialise(
    module: nn.Module,
    tensors: dict[str, LogicalTensor],
    model: ModelConfig,
    seed: int,
    tensor_rank: int,
    tensor_size: int,
    rule: Rule = clip_rule,
    drawn: Callable[[str], bool] = every_name,
) -> None:
    """Fill every parameter with its slice of the logical tensor's fresh value.

    drawn: whether the tensor of this name needs one; the others are NaN, so that one which nothing fills later is seen.
    """
    for local, parameter in module.named_parameters():
        if not drawn(tensors[local].name):
            parameter.fill_(math.nan)
            continue
        whole = initial_value(tensors[local], model, seed, rule)
        parameter.copy_(whole[tensors[local].slice_of(tensor_rank, tensor_size)])
