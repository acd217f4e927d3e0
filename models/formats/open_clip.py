"""The open_clip layout of EVA-02 models (CustomTextCLIP with a timm Eva trunk): `visual.trunk.*`, `text.*`.

The text side has the authors' names. The trunk has timm's: sub-LN is attn.norm and mlp.norm, SwiGLU is fc1_g, fc1_x and
fc2, and where q, k, v are separate their biases belong to the projections; a fused qkv keeps q_bias and v_bias.
Source: timm's models/eva.py and open_clip's model list (EVA02-B-16, L-14, L-14-336, E-14, E-14-plus).
"""

import re

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
