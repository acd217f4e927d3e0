"""One name per tensor of the whole model, whatever rank, stage or backend holds a slice of it.

A *logical tensor* is the unsplit tensor: `vision.blocks.17.attn.qkv.weight`. Initial values, layer decay, the trust
ratio of LAMB, checkpoints and conversions speak of logical tensors only; this table says which local parameter is
which slice.
"""

import re
from dataclasses import dataclass

from torch import nn

from models.tensors.inventory import split_dim

# megatron-core's (and our) module paths inside one layer -> logical name
_LAYER_NAMES = {
    "input_layernorm": "norm1",
    "self_attn_bda.norm": "norm1",
    "pre_mlp_layernorm": "norm2",
    "mlp_bda.norm": "norm2",
    "self_attn_bda": "scale1",
    "mlp_bda": "scale2",
    "self_attention.core_attention.qk_norm.q": "attn.q_norm",
    "self_attention.core_attention.qk_norm.k": "attn.k_norm",
    "self_attention.linear_qkv": "attn.qkv",
    "self_attention.linear_qkv.linear": "attn.qkv",
    "self_attention.linear_qkv.q": "attn.q",
    "self_attention.linear_qkv.k": "attn.k",
    "self_attention.linear_qkv.v": "attn.v",
    "self_attention.linear_qkv.bias": "attn.bias",
    "self_attention.core_attention.inner_norm.norm": "attn.norm",
    "self_attention.linear_proj": "attn.proj",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
    "mlp.gate": "mlp.gate",
    "mlp.up": "mlp.up",
    "mlp.down": "mlp.down",
    "mlp.norm.norm": "mlp.norm",
}
_LAYER = re.compile(r"block\.layers\.(\d+)\.(.+)\.(\w+)$")


@dataclass(frozen=True)
class LogicalTensor:
    """An unsplit tensor of the model and the dimension along which the tensor axis cuts it."""

    name: str
    shape: tuple[int, ...]
    split_dim: int | None

    def slice_of(self, rank: int, size: int) -> tuple[slice, ...]:
        """The index of tensor rank `rank` of `size` into the whole."""
        index = [slice(None)] * len(self.shape)
        if self.split_dim is not None:
            step = self.shape[self.split_dim] // size
            index[self.split_dim] = slice(rank * step, (rank + 1) * step)
        return tuple(index)


def logical_name(local: str, tower: str, first_layer: int = 0) -> str:
    """Name of the logical tensor behind parameter `local` of a tower whose first block is block `first_layer`."""
    match = _LAYER.match(local)
    if match is None:
        return f"{tower}.{local}"
    layer, module, leaf = match.groups()
    return f"{tower}.blocks.{first_layer + int(layer)}.{_LAYER_NAMES[module]}.{leaf}"


def logical_tensors(module: nn.Module, tower: str, first_layer: int, tensor_size: int) -> dict[str, LogicalTensor]:
    """Local parameter name -> logical tensor, for every parameter of a tower or of a stage of it."""
    table = {}
    for local, parameter in module.named_parameters():
        name = logical_name(local, tower, first_layer)
        dim = split_dim(name)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= tensor_size
        table[local] = LogicalTensor(name, tuple(shape), dim)
    return table
