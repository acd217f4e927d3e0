"""The authors' layout: CustomCLIP names (`visual.`, `text.`); table and arithmetic in models/formats/eva_names.py.

Files come whole, as a bare image tower without `visual.`, or with the text tower at the top level (their non-custom
CLIP class): `normalised` undoes all of that.
"""

import torch
from torch import Tensor

from models.config import ModelConfig, VisionConfig
from models.formats.base import Layout
from models.formats.eva_names import is_derived

_VISION_ROOTS = (
    "cls_token",
    "pos_embed",
    "patch_embed.",
    "blocks.",
    "norm.",
    "head.",
    "mask_token",
    "lm_head.",
    "rope.",
)
_TEXT_ROOTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


class _Authors(Layout):
    name = "authors' layout"

    def names(self, eva: str) -> tuple[str, ...]:
        return (eva,)

    def normalised(self, name: str) -> str:
        if name == "text.logit_scale":
            return "logit_scale"
        if name.startswith(_TEXT_ROOTS):
            return f"text.{name}"
        return f"visual.{name}" if name.startswith(_VISION_ROOTS) else name

    def is_derived(self, name: str) -> bool:
        return is_derived(name)

    def derived(self, model: ModelConfig) -> dict[str, Tensor]:
        """Rope tables of the authors, which are saved once for the tower and again in every block."""
        if not model.vision.rope:
            return {}
        owners = ["visual", *(f"visual.blocks.{i}.attn" for i in range(model.vision.depth))]
        tables = zip(("cos", "sin"), _rope_tables(model.vision), strict=True)
        return {f"{owner}.rope.freqs_{kind}": table for kind, table in tables for owner in owners}


def _rope_tables(vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [grid^2, head_width], rounded as their rope.py rounds (models/blocks/rope.py is more exact)."""
    d = vision.head_width // 2
    frequency = 1.0 / (10000 ** (torch.arange(0, d, 2).float() / d))
    position = torch.arange(vision.grid) / vision.grid * vision.rope_grid
    angle = (position[:, None] * frequency).repeat_interleave(2, dim=-1)
    rows = angle[:, None].expand(vision.grid, vision.grid, d)
    columns = angle[None].expand(vision.grid, vision.grid, d)
    table = torch.cat([rows, columns], dim=-1).reshape(-1, 2 * d)
    return table.cos(), table.sin()


AUTHORS = _Authors()
