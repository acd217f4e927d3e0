"""2-D rotary position embedding of the EVA-02 B/L towers (authors' rope.py; arXiv 2303.11331, section 2).

d = head_width / 2 channels turn by the row, the other d by the column: frequency f_j = 10000^(-2j/d), position of
grid line p of G is p / G x rope_grid. Neighbouring channels (2m, 2m+1) form a pair. The class token does not turn.
"""

import torch
from torch import Tensor


def rope_tables(grid: int, rope_grid: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [1 + grid^2, head_width]; row 0 is the class token (angle 0), then the grid row by row."""
    d = head_width // 2
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)  # [d/2]
    position = torch.arange(grid, dtype=torch.float64, device=device) / grid * rope_grid
    angle = (position[:, None] * frequency).repeat_interleave(2, dim=1)  # [G, d]
    rows = angle[:, None, :].expand(grid, grid, d)
    columns = angle[None, :, :].expand(grid, grid, d)
    table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_width)
    table = torch.cat([torch.zeros(1, head_width, dtype=table.dtype, device=device), table])
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn q or k [M, heads, S, d]; tables [1 or M, 1, S, d]. (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, turned by the same tables."""
    return rotate(q, cos, sin), rotate(k, cos, sin)
