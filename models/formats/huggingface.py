"""The Hugging Face EVA-CLIP layout (BAAI/EVA-CLIP-8B, -18B): names of their EvaCLIPModel.

q, k, v are three matrices in both towers, text_projection is a Linear (transposed), class token and position tables
have no leading 1s. Source: the mapping in a public conversion script for EVA02-CLIP-bigE-14-plus and a public port of
EvaCLIPModel; the repositories' own files were not at hand (docs/checkpoints.md says what follows from that).
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from models.formats.base import Layout

_DIRECT = {
    "logit_scale": "logit_scale",
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


class _HuggingFace(Layout):
    name = "Hugging Face layout"

    def names(self, eva: str) -> tuple[str, ...]:
        block = _BLOCK.fullmatch(eva)
        if block is None:
            # Masked-image-modelling tensors have no place here: their own name never occurs in such a file.
            return (_DIRECT.get(eva, eva),)
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


HUGGINGFACE = _HuggingFace()
