"""2-D rotary position embedding of EVA-02 B/L, Perception Encoder and DINOv3.

d = head_width / 2 channels turn by the row, the other d by the column: frequency f_j = base^(-2j/d). Neighbouring
channels (2m, 2m+1) form a pair; DINOv3's files pair m with m + d, and its channels are reordered when they are read.
Tokens in front of the patches do not turn. Grid line p of G has the position

- eva: p / G x rope_grid, base 10000 (authors' rope.py; arXiv 2303.11331, section 2);
- pe: (p + 1) / G x rope_grid with a class token, which takes line 0, else as eva; columns first (arXiv 2504.13181);
- dinov3: 2 pi x (2 (p + 1/2) / G - 1), base 100 (arXiv 2508.10104, section 3.2).
"""

import math

import torch
from torch import Tensor

from models.config import VisionConfig


def rope_tables(vision: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [1 + grid^2, head_width]; row 0 is a prefix token (angle 0), then the grid row by row."""
    grid, head_width, kind = vision.grid, vision.head_width, vision.rope_kind
    d = head_width // 2
    base = 100.0 if kind == "dinov3" else 10000.0
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)  # [d/2]
    line = torch.arange(grid, dtype=torch.float64, device=device)
    if kind == "dinov3":
        position = 2 * math.pi * (2 * (line + 0.5) / grid - 1)
    else:
        position = (line + (kind == "pe" and vision.class_token)) / grid * vision.rope_grid
    angle = (position[:, None] * frequency).repeat_interleave(2, dim=1)  # [G, d]
    rows = angle[:, None, :].expand(grid, grid, d)
    columns = angle[None, :, :].expand(grid, grid, d)
    table = torch.cat([columns, rows] if kind == "pe" else [rows, columns], dim=-1).reshape(grid * grid, head_width)
    table = torch.cat([torch.zeros(1, head_width, dtype=table.dtype, device=device), table])
    return table.cos().float(), table.sin().float()


def text_rope_tables(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [1, 1, length, head_width]: pair m of place p turns by p x 10000^(-2m / head_width)."""
    even = torch.arange(0, head_width, 2, dtype=torch.float64, device=device)
    place = torch.arange(length, dtype=torch.float64, device=device)
    angle = (place[:, None] * 10000.0 ** (-even / head_width)).repeat_interleave(2, dim=1)[None, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn q or k [M, heads, S, d]; tables [1 or M, 1, S, d]. (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, turned by the same tables."""
    return rotate(q, cos, sin), rotate(k, cos, sin)
