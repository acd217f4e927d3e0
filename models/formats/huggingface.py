"""The Hugging Face layouts: EVA-CLIP (BAAI/EVA-CLIP-8B, -18B; names of their EvaCLIPModel), CLIPModel, SiglipModel.

q, k, v are three matrices in both towers, text_projection is a Linear (transposed), class token and position tables
have no leading 1s. Source: the mapping in a public conversion script for EVA02-CLIP-bigE-14-plus and a public port of
EvaCLIPModel; the repositories' own files were not at hand (docs/foreign_layouts.md says what follows from that).
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from models.formats.base import Layout

_DIRECT = {
    "logit_scale": "logit_scale",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.cls_token": "vision_model.embeddings.class_embedding",
    "visual.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual.norm.weight": "vision_model.post_layernorm.weight",
    "visual.norm.bias": "vision_model.post_layernorm.bias",
    "visual.head.weight": "visual_projection.weight",
    "visual.head.bias": "visual_projection.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
    "text.text_projection": "text_projection.weight",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.q_bias": "self_attn.q_proj.bias",
    "attn.v_bias": "self_attn.v_proj.bias",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.inner_attn_ln": "self_attn.inner_attn_ln",
    "attn.proj": "self_attn.out_proj",
    "mlp.w1": "mlp.fc1",
    "mlp.w2": "mlp.fc2",
    "mlp.w3": "mlp.fc3",
}
_TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.blocks|text\.transformer\.resblocks)\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.(?:qkv\.|in_proj_)(weight|bias)")


_SIGLIP = {
    "logit_bias": "logit_bias",
    "text.text_projection": "text_model.head.weight",
    "text.text_projection_bias": "text_model.head.bias",
    "visual.pool.probe": "vision_model.head.probe",
    "visual.pool.qkv.weight": "vision_model.head.attention.in_proj_weight",
    "visual.pool.qkv.bias": "vision_model.head.attention.in_proj_bias",
    **{
        f"visual.pool.{ours}.{leaf}": f"vision_model.head.{theirs}.{leaf}"
        for ours, theirs in (
            ("proj", "attention.out_proj"), ("norm", "layernorm"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
        )
        for leaf in ("weight", "bias")
    },
}  # fmt: skip


class _HuggingFace(Layout):
    name = "Hugging Face layout"
    direct = _DIRECT

    def names(self, eva: str) -> tuple[str, ...]:
        block = _BLOCK.fullmatch(eva)
        if block is None:
            # Masked-image-modelling tensors have no place here: their own name never occurs in such a file.
            return (self.direct.get(eva, eva),)
        tower = "vision_model" if block[1].startswith("visual") else "text_model"
        prefix = f"{tower}.encoder.layers.{block[2]}."
        fused = _FUSED.fullmatch(block[3])
        if fused:
            return tuple(f"{prefix}self_attn.{kind}_proj.{fused[1]}" for kind in "qkv")
        return (prefix + _block_name(block[3], _VISION_BLOCK if tower == "vision_model" else _TEXT_BLOCK),)

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if _is_fused(eva):
            return value.chunk(3)
        if eva == "text.text_projection":
            return (value.T,)
        if eva in ("visual.cls_token", "visual.pos_embed"):
            return (value.reshape(-1) if eva.endswith("cls_token") else value.squeeze(0),)
        return (value,)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if _is_fused(eva):
            return torch.cat(list(parts))
        if eva == "text.text_projection":
            return parts[0].T
        if eva in ("visual.cls_token", "visual.pos_embed"):
            return parts[0].reshape(1, 1, -1) if eva.endswith("cls_token") else parts[0].unsqueeze(0)
        return parts[0]

    def is_derived(self, name: str) -> bool:
        return name.endswith(".position_ids") or ".rope." in name


def _is_fused(eva: str) -> bool:
    block = _BLOCK.fullmatch(eva)
    return block is not None and _FUSED.fullmatch(block[3]) is not None


def _block_name(rest: str, table: dict[str, str]) -> str:
    if rest in table:
        return table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{table.get(module, module)}.{leaf}"


class _Siglip(_HuggingFace):
    """transformers' SiglipModel: attention pool in the image tower, a head with a bias in the text tower."""

    name = "layout of transformers' SiglipModel"
    direct = _DIRECT | _SIGLIP

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        if eva == "visual.pool.probe":
            return (value.reshape(1, 1, -1),)
        return (value.reshape(1),) if eva in ("logit_scale", "logit_bias") else super().split(eva, value)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        if eva == "visual.pool.probe":
            return parts[0].flatten()
        return parts[0].reshape(()) if eva in ("logit_scale", "logit_bias") else super().join(eva, parts)


HUGGINGFACE = _HuggingFace()
SIGLIP = _Siglip()
