"""Layouts of image towers that come without a caption tower: DINOv3 (transformers' names and its own), InternViT.

DINOv3 turns channel m of a head together with m + d / 2, the towers here turn neighbours (models/blocks/rope.py): rows
of q and k are reordered, which changes no score. Source: transformers' DINOv3ViTModel; DINOv3's vision_transformer.py;
the modeling_intern_vit.py in InternViT's repositories.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import ModelConfig
from models.formats.base import Layout

_BLOCK = re.compile(r"visual\.blocks\.(\d+)\.(.+)")


class _ImageTower(Layout):
    """One tower: what belongs to captions, loss or the shared space has no place in it."""

    direct: dict[str, str]
    """Authors' name -> name here, outside the blocks."""
    modules: dict[str, str | tuple[str, ...]]
    """Module of a block in the authors' names -> its own, or those of q, k and v."""
    block = ""
    """Where block {} stands."""

    def has_place(self, eva: str) -> bool:
        return eva in self.direct or _BLOCK.fullmatch(eva) is not None

    def names(self, eva: str) -> tuple[str, ...]:
        block = _BLOCK.fullmatch(eva)
        if block is None:
            return (self.direct.get(eva, eva),)  # an authors' name never occurs in such a file
        place = self.block.format(block[1])
        if block[2] in self.modules:
            found, leaf = self.modules[block[2]], ""
        else:
            module, _, last = block[2].rpartition(".")
            found, leaf = self.modules.get(module, module), f".{last}"
        return tuple(f"{place}{one}{leaf}" for one in ((found,) if isinstance(found, str) else found))

    def is_derived(self, name: str) -> bool:
        return False

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        return (value.unsqueeze(0),) if eva == "visual.registers" else (value,)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].squeeze(0) if eva == "visual.registers" else parts[0]


def _as_halves(value: Tensor, heads: int) -> Tensor:
    """Rows [heads][d / 2][2] -> [heads][2][d / 2]."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _as_neighbours(value: Tensor, heads: int) -> Tensor:
    """The inverse."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class _DinoV3(_ImageTower):
    """What both layouts of DINOv3 share: the order of channels in q and k."""

    def __init__(self, heads: int):
        self.heads = heads

    def _split_qkv(self, value: Tensor) -> list[Tensor]:
        q, k, v = value.chunk(3)
        return [_as_halves(q, self.heads), _as_halves(k, self.heads), v]

    def _join_qkv(self, parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        return torch.cat([_as_neighbours(q, self.heads), _as_neighbours(k, self.heads), v])


class DinoV3Transformers(_DinoV3):
    """transformers' DINOv3ViTModel."""

    name = "layout of transformers' DINOv3ViTModel"
    block = "layer.{}."
    direct = {  # noqa: RUF012
        "visual.cls_token": "embeddings.cls_token",
        "visual.mask_token": "embeddings.mask_token",
        "visual.registers": "embeddings.register_tokens",
        "visual.patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "visual.patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "visual.norm.weight": "norm.weight",
        "visual.norm.bias": "norm.bias",
    }
    modules = {  # noqa: RUF012
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "attn.proj": "attention.o_proj",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }

    def normalised(self, name: str) -> str:
        return name.removeprefix("model.") if name.startswith("model.layer.") else name

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if ".attn.qkv." in eva:
            return tuple(self._split_qkv(value))
        return (_as_halves(value, self.heads),) if eva.endswith("q_bias") else super().split(eva, value)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if ".attn.qkv." in eva:
            return self._join_qkv(parts)
        return _as_neighbours(parts[0], self.heads) if eva.endswith("q_bias") else super().join(eva, parts)


class DinoV3Original(_DinoV3):
    """The names of DINOv3's own code, without q, k, v biases (the 7B)."""

    name = "layout of DINOv3's own code"
    block = "blocks.{}."
    direct = {  # noqa: RUF012
        "visual.cls_token": "cls_token",
        "visual.mask_token": "mask_token",
        "visual.registers": "storage_tokens",
        "visual.patch_embed.proj.weight": "patch_embed.proj.weight",
        "visual.patch_embed.proj.bias": "patch_embed.proj.bias",
        "visual.norm.weight": "norm.weight",
        "visual.norm.bias": "norm.bias",
    }
    modules = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}  # noqa: RUF012

    def is_derived(self, name: str) -> bool:
        return name.startswith(("rope_embed.", "local_cls_norm."))

    def why_left_out(self, name: str) -> str:
        return "for small crops in DINO's own training" if name.startswith("local_cls") else super().why_left_out(name)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if ".attn.qkv." in eva:
            return (torch.cat(self._split_qkv(value)),)
        return (value.reshape(1, -1),) if eva == "visual.mask_token" else super().split(eva, value)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if ".attn.qkv." in eva:
            return self._join_qkv(parts[0].chunk(3))
        return parts[0].reshape(1, 1, -1) if eva == "visual.mask_token" else super().join(eva, parts)


class _InternVit(_ImageTower):
    """The folders of InternViT on the hub."""

    name = "layout of InternViT"
    block = "encoder.layers.{}."
    direct = {  # noqa: RUF012
        "visual.cls_token": "embeddings.class_embedding",
        "visual.pos_embed": "embeddings.position_embedding",
        "visual.patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "visual.patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    }
    modules = {"gamma_1": "ls1", "gamma_2": "ls2"}  # noqa: RUF012


INTERNVIT = _InternVit()


def dinov3_layout(model: ModelConfig, *, original: bool) -> Layout:
    """Layout of a DINOv3 tower, in transformers' names or its own."""
    return (DinoV3Original if original else DinoV3Transformers)(model.vision.heads)
