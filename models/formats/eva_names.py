"""The authors' checkpoint layout (CustomCLIP state dict) <-> logical tensors, both ways and exactly.

Layout differences: their fused qkv stacks [q; k; v] while ours is per head (q, k, v), as megatron-core splits it; their
patch kernel is [H, 3, p, p], ours a matrix; class token, mask token and position table lose their leading 1s;
text_projection is used as x @ P there and as a Linear here. Parts that other families have beside (norm in front of the
blocks, attention pool, biases) have names in the authors' style here, since models/formats goes through them. Tables:
spec of the authors' eva_clip package, state dict of CustomCLIP; of MIM students, EVA-02's modeling_pretrain.py.
"""

import re
from collections.abc import Callable

from torch import Tensor

from models.config import ModelConfig


class LayoutMismatch(Exception):
    """A state dict whose keys or shapes are not those of the model; the message lists them."""


_POOL = ("probe", *(f"{m}.{leaf}" for m in ("qkv", "proj", "norm", "fc1", "fc2") for leaf in ("weight", "bias")))
_DIRECT = {
    "logit_scale": "logit_scale.log_scale",
    "logit_bias": "logit_bias.bias",
    "visual.ln_pre.weight": "vision.embed.norm.weight",
    "visual.ln_pre.bias": "vision.embed.norm.bias",
    "visual.registers": "vision.embed.registers",
    "text.text_projection_bias": "text.projection.bias",
    **{f"visual.pool.{name}": f"vision.head.pool.{name}" for name in _POOL},
    "visual.cls_token": "vision.embed.cls_token",
    "visual.pos_embed": "vision.embed.pos_embed",
    "visual.patch_embed.proj.weight": "vision.embed.weight",
    "visual.patch_embed.proj.bias": "vision.embed.bias",
    "visual.norm.weight": "vision.head.norm.weight",
    "visual.norm.bias": "vision.head.norm.bias",
    "visual.head.weight": "vision.head.projection.weight",
    "visual.head.bias": "vision.head.projection.bias",
    "visual.mask_token": "vision.embed.mask_token",
    "visual.lm_head.weight": "vision.head.prediction.weight",
    "visual.lm_head.bias": "vision.head.prediction.bias",
    "text.token_embedding.weight": "text.token_embedding",
    "text.positional_embedding": "text.pos_embed",
    "text.ln_final.weight": "text.norm.weight",
    "text.ln_final.bias": "text.norm.bias",
    "text.text_projection": "text.projection.weight",
}
_VISION_BLOCK = {
    "gamma_1": "scale1.gain",
    "gamma_2": "scale2.gain",
    "attn.q_bias": "attn.bias.q",
    "attn.v_bias": "attn.bias.v",
    "attn.q_proj.weight": "attn.q.weight",
    "attn.k_proj.weight": "attn.k.weight",
    "attn.v_proj.weight": "attn.v.weight",
    "attn.inner_attn_ln.weight": "attn.norm.weight",
    "attn.inner_attn_ln.bias": "attn.norm.bias",
    "mlp.w1.weight": "mlp.gate.weight",
    "mlp.w1.bias": "mlp.gate.bias",
    "mlp.w2.weight": "mlp.up.weight",
    "mlp.w2.bias": "mlp.up.bias",
    "mlp.w3.weight": "mlp.down.weight",
    "mlp.w3.bias": "mlp.down.bias",
    "mlp.ffn_ln.weight": "mlp.norm.weight",
    "mlp.ffn_ln.bias": "mlp.norm.bias",
}
_TEXT_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_INVERSE = {
    "direct": {ours: theirs for theirs, ours in _DIRECT.items()},
    "vision": {ours: theirs for theirs, ours in _VISION_BLOCK.items()},
    "text": {ours: theirs for theirs, ours in _TEXT_BLOCK.items()},
}
_SCALARS = ("logit_scale.log_scale", "logit_bias.bias")
_TOKENS = ("vision.embed.cls_token", "vision.embed.mask_token")
_THEIR_BLOCK = re.compile(r"(visual\.blocks|text\.transformer\.resblocks)\.(\d+)\.(.+)")
_OUR_BLOCK = re.compile(r"(vision|text)\.blocks\.(\d+)\.(.+)")


def is_derived(name: str) -> bool:
    """Tables in the authors' files that are computed from the config, not learned (rope)."""
    return ".rope." in name or name.startswith("rope.")


def logical_name(theirs: str) -> str:
    """visual.blocks.3.attn.q_bias -> vision.blocks.3.attn.bias.q."""
    block = _THEIR_BLOCK.fullmatch(theirs)
    if block is None:
        if theirs not in _DIRECT:
            raise LayoutMismatch(f"unknown tensor {theirs!r} in the authors' layout")
        return _DIRECT[theirs]
    tower = "vision" if block[1].startswith("visual") else "text"
    table = _VISION_BLOCK if tower == "vision" else _TEXT_BLOCK
    return f"{tower}.blocks.{block[2]}.{table.get(block[3], block[3])}"


def authors_name(ours: str) -> str:
    """The inverse of `logical_name`."""
    block = _OUR_BLOCK.fullmatch(ours)
    if block is None:
        return _INVERSE["direct"][ours]
    prefix = "visual.blocks" if block[1] == "vision" else "text.transformer.resblocks"
    return f"{prefix}.{block[2]}.{_INVERSE[block[1]].get(block[3], block[3])}"


def _per_head(value: Tensor, heads: int) -> Tensor:
    """Rows [3][heads][d] -> [heads][3][d]."""
    return value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def _stacked(value: Tensor, heads: int) -> Tensor:
    """Rows [heads][3][d] -> [3][heads][d]."""
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _heads(name: str, model: ModelConfig) -> int:
    return model.vision.heads if name.startswith("vision.") else model.text.heads


def _convert(name: str, value: Tensor, model: ModelConfig, qkv: Callable[[Tensor, int], Tensor]) -> Tensor:
    if ".attn.qkv." in name:
        value = qkv(value, _heads(name, model))
    elif name == "text.projection.weight":
        value = value.T
    return value.contiguous()


def to_logical(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Authors' state dict -> logical tensors; derived tables are left out."""
    out = {}
    for theirs, value in state.items():
        if is_derived(theirs):
            continue
        name = logical_name(theirs)
        value = _convert(name, value, model, _per_head)
        if name == "vision.embed.weight":
            value = value.flatten(1)
        elif name in _TOKENS:
            value = value.flatten()
        elif name == "vision.embed.pos_embed":
            value = value.squeeze(0)
        elif name in _SCALARS:
            value = value.reshape(1)
        out[name] = value
    return out


def from_logical(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors -> the authors' state dict."""
    out = {}
    patch = model.vision.patch_size
    for name, value in tensors.items():
        value = _convert(name, value, model, _stacked)
        if name == "vision.embed.weight":
            value = value.reshape(-1, 3, patch, patch)
        elif name in _TOKENS:
            value = value.reshape(1, 1, -1)
        elif name == "vision.embed.pos_embed":
            value = value.unsqueeze(0)
        elif name in _SCALARS:
            value = value.reshape(())
        out[authors_name(name)] = value
    return out
