"""The open_clip layouts: timm trunks (CustomTextCLIP: EVA, SigLIP, PE; `visual.trunk.*`, `text.*`) and its own ViT.

The text side has the authors' names. The trunk has timm's: sub-LN is attn.norm and mlp.norm, SwiGLU is fc1_g, fc1_x and
fc2, and where q, k, v are separate their biases belong to the projections; a fused qkv keeps q_bias and v_bias.
Source: timm's models/eva.py and vision_transformer.py, open_clip's transformer.py and model list. open_clip's own ViT
and OpenAI's files have the text tower at the top level; the OpenAI ones hold three numbers of the config beside.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import ModelConfig
from models.formats.base import Layout

_BLOCK = re.compile(r"visual\.(blocks\.\d+\.)(.+)")
_BLOCK_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln.weight": "attn.norm.weight",
    "attn.inner_attn_ln.bias": "attn.norm.bias",
    "mlp.w1.weight": "mlp.fc1_g.weight",
    "mlp.w1.bias": "mlp.fc1_g.bias",
    "mlp.w2.weight": "mlp.fc1_x.weight",
    "mlp.w2.bias": "mlp.fc1_x.bias",
    "mlp.w3.weight": "mlp.fc2.weight",
    "mlp.w3.bias": "mlp.fc2.bias",
    "mlp.ffn_ln.weight": "mlp.norm.weight",
    "mlp.ffn_ln.bias": "mlp.norm.bias",
}
_FUSED_BIASES = {"attn.q_bias", "attn.v_bias"}


class _OpenClip(Layout):
    name = "open_clip layout"

    def __init__(self, separate_qkv: bool):
        self.separate_qkv = separate_qkv

    def names(self, eva: str) -> tuple[str, ...]:
        if not eva.startswith("visual."):
            return (eva,)
        block = _BLOCK.fullmatch(eva)
        if block is None:
            return (eva.replace("visual.", "visual.trunk.", 1),)
        keeps = block[2] in _FUSED_BIASES and not self.separate_qkv
        rest = block[2] if keeps else _BLOCK_NAMES.get(block[2], block[2])
        return (f"visual.trunk.{block[1]}{rest}",)

    def is_derived(self, name: str) -> bool:
        return ".rope." in name


def open_clip_layout(separate_qkv: bool) -> Layout:
    """B and L have separate q, k, v (EVA-02); E has a fused one."""
    return _OpenClip(separate_qkv)


_POOL = {
    "qkv": ("q", "kv"), "proj": ("proj",), "norm": ("norm",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",),
}  # fmt: skip


class _PooledTrunk(_OpenClip):
    """A timm ViT whose attention pool keeps q apart from k and v."""

    def names(self, eva: str) -> tuple[str, ...]:
        if eva == "visual.pool.probe":
            return ("visual.trunk.attn_pool.latent",)
        if eva.startswith("visual.pool."):
            module, leaf = eva.removeprefix("visual.pool.").split(".")
            return tuple(f"visual.trunk.attn_pool.{theirs}.{leaf}" for theirs in _POOL[module])
        return super().names(eva)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if eva.startswith("visual.pool.qkv."):
            width = len(value) // 3
            return value[:width], value[width:]
        return (value.reshape(1, 1, -1),) if eva == "visual.pool.probe" else (value,)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if eva.startswith("visual.pool.qkv."):
            return torch.cat(list(parts))
        return parts[0].flatten() if eva == "visual.pool.probe" else parts[0]


class _TimmSiglip(_PooledTrunk):
    """SigLIP: the text head has a bias."""

    name = "open_clip layout of SigLIP"

    def names(self, eva: str) -> tuple[str, ...]:
        if eva.startswith("text.text_projection"):
            return (f"text.text_projection.{'bias' if eva.endswith('bias') else 'weight'}",)
        return super().names(eva)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        return (value.T,) if eva == "text.text_projection" else super().split(eva, value)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].T if eva == "text.text_projection" else super().join(eva, parts)


class _TimmPe(_PooledTrunk):
    """Perception Encoder Core."""

    name = "open_clip layout of Perception Encoder"

    def names(self, eva: str) -> tuple[str, ...]:
        return super().names(eva.replace("visual.ln_pre.", "visual.norm_pre.", 1))

    def derived(self, model: ModelConfig) -> dict[str, Tensor]:
        """A projection without bias is one with a bias of zeros in timm."""
        return {} if model.vision.head_bias else {"visual.trunk.head.bias": torch.zeros(model.embed_dim)}


_VIT = {
    "visual.cls_token": "visual.class_embedding",
    "visual.pos_embed": "visual.positional_embedding",
    "visual.patch_embed.proj.weight": "visual.conv1.weight",
    "visual.norm.weight": "visual.ln_post.weight",
    "visual.norm.bias": "visual.ln_post.bias",
    "visual.head.weight": "visual.proj",
}
_VIT_BLOCK = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}
_OF_THE_CONFIG = ("input_resolution", "context_length", "vocab_size")


class _OpenClipVit(Layout):
    """open_clip's CLIP class and OpenAI's: its own ViT, text tower at the top level."""

    name = "open_clip layout of a CLIP ViT"

    def names(self, eva: str) -> tuple[str, ...]:
        block = _BLOCK.fullmatch(eva)
        if block is not None:
            place = block[1].replace("blocks.", "visual.transformer.resblocks.", 1)
            return (place + _VIT_BLOCK.get(block[2], block[2]),)
        return (_VIT.get(eva, eva).removeprefix("text."),)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if eva == "visual.head.weight":
            return (value.T,)
        if eva in ("visual.cls_token", "visual.pos_embed"):
            return (value.reshape(-1) if eva.endswith("cls_token") else value.squeeze(0),)
        return (value,)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if eva == "visual.head.weight":
            return parts[0].T
        if eva in ("visual.cls_token", "visual.pos_embed"):
            return parts[0].reshape(1, 1, -1) if eva.endswith("cls_token") else parts[0].unsqueeze(0)
        return parts[0]

    def normalised(self, name: str) -> str:
        return name.removeprefix("text.")  # CustomTextCLIP's

    def is_derived(self, name: str) -> bool:
        return name in _OF_THE_CONFIG or name.endswith("attn_mask")


_PE_POOL = {
    "qkv.weight": "attn.in_proj_weight", "qkv.bias": "attn.in_proj_bias", "proj": "attn.out_proj", "norm": "layernorm",
    "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
}  # fmt: skip


class _OwnPe(_OpenClipVit):
    """The names of Perception Encoder's own code (its pe.py): those of a CLIP ViT, and an attention pool."""

    name = "layout of Perception Encoder's own code"

    def names(self, eva: str) -> tuple[str, ...]:
        if not eva.startswith("visual.pool."):
            return super().names(eva)
        rest = eva.removeprefix("visual.pool.")
        module, _, leaf = rest.partition(".")
        own = _PE_POOL[rest] if rest in _PE_POOL else f"{_PE_POOL[module]}.{leaf}" if leaf else rest
        return (f"visual.attn_pool.{own}",)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        return (value.reshape(1, 1, -1),) if eva == "visual.pool.probe" else super().split(eva, value)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].flatten() if eva == "visual.pool.probe" else super().join(eva, parts)


OPEN_CLIP_VIT = _OpenClipVit()
OWN_PE = _OwnPe()
TIMM_PE = _TimmPe(separate_qkv=False)
TIMM_SIGLIP = _TimmSiglip(separate_qkv=False)
