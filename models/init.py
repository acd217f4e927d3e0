"""Fresh values of every logical tensor, the same for every layout (authors' eva_vit_model.py and transformer.py).

A value depends on (seed, logical name) alone: each tensor has a generator of its own and a rank keeps its slice.
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.clip import LEARNED_SCALE_INIT, LOGIT_BIAS_INIT
from models.config import ModelConfig
from models.naming import LogicalTensor

_VISION_STD = 0.02
_HEAD_SCALE = 0.001  # init_scale of the authors
_SCALARS = {"logit_scale.log_scale": LEARNED_SCALE_INIT, "logit_bias.bias": LOGIT_BIAS_INIT}


def _normal(std: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda t, g: t.normal_(0.0, std, generator=g)


def _uniform(bound: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda t, g: t.uniform_(-bound, bound, generator=g)


def _fill(value: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda t, g: t.fill_(value)


def _vision_rule(name: str, model: ModelConfig):
    v = model.vision
    if name.startswith("vision.embed.") and name.endswith(("weight", "bias")):
        return _uniform(1 / math.sqrt(3 * v.patch_size**2))  # the convolution keeps torch's default
    if name.startswith("vision.embed."):
        return _normal(_VISION_STD)
    if name == "vision.head.projection.weight":
        return _normal(_VISION_STD * _HEAD_SCALE)
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "mlp.down.weight")):
        layer = int(name.split(".")[2]) + 1
        return _normal(_VISION_STD / math.sqrt(2 * layer))
    return _normal(_VISION_STD)


def _text_rule(name: str, model: ModelConfig):
    width, depth = model.text.width, model.text.depth
    if name == "text.token_embedding":
        return _normal(0.02)
    if name == "text.pos_embed":
        return _normal(0.01)
    if name.endswith("mlp.fc1.bias"):
        return _uniform(width**-0.5)  # torch's default for a Linear of this fan-in
    if name.endswith("mlp.fc2.bias"):
        return _uniform((4 * width) ** -0.5)
    if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        return _normal(width**-0.5 * (2 * depth) ** -0.5)
    if name.endswith("mlp.fc1.weight"):
        return _normal((2 * width) ** -0.5)
    return _normal(width**-0.5)  # qkv, projection


def _rule(name: str, model: ModelConfig):
    if name in _SCALARS:
        return _fill(_SCALARS[name])
    parts = name.split(".")
    if any(part.startswith("norm") for part in parts[:-1]):
        return _fill(1.0 if parts[-1] == "weight" else 0.0)
    if name.startswith("text.") and not name.endswith(("qkv.bias", "proj.bias")):
        return _text_rule(name, model)
    is_bias = parts[-1] == "bias" or "bias" in parts[:-1]
    if is_bias and not name.startswith("vision.embed."):
        return _fill(0.0)
    return _vision_rule(name, model)


def initial_value(tensor: LogicalTensor, model: ModelConfig, seed: int) -> Tensor:
    """The whole logical tensor, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    return _rule(tensor.name, model)(torch.empty(tensor.shape, dtype=torch.float32, device="cpu"), generator)


@torch.no_grad()
def initialise(
    module: nn.Module,
    tensors: dict[str, LogicalTensor],
    model: ModelConfig,
    seed: int,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fill every parameter with its slice of the logical tensor's fresh value."""
    for local, parameter in module.named_parameters():
        whole = initial_value(tensors[local], model, seed)
        parameter.copy_(whole[tensors[local].slice_of(tensor_rank, tensor_size)])
