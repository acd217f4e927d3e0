"""Position embeddings and patch kernels between resolutions (the authors' utils.py, resize_eva_pos_embed)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(pos_embed: Tensor, grid: int, prefix: int = 1) -> Tensor:
    """[prefix + g^2, H] -> [prefix + grid^2, H]: the rows of the prefix are copied, the grid is resized as a picture.

    Bicubic, align_corners false, no antialias, computed in fp32 whatever the dtype.
    """
    old_grid = math.isqrt(pos_embed.shape[0] - prefix)
    if old_grid**2 != pos_embed.shape[0] - prefix:
        raise ValueError(
            f"position embedding has {pos_embed.shape[0]} rows: not {prefix} prefix tokens and a square grid"
        )
    if old_grid == grid:
        return pos_embed
    picture = pos_embed[prefix:].T.reshape(1, -1, old_grid, old_grid)
    resized = _bicubic(picture, grid).reshape(-1, grid * grid).T
    return torch.cat([pos_embed[:prefix], resized])


def resize_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """[H, 3, p, p] -> [H, 3, patch_size, patch_size], bicubic as above."""
    return kernel if kernel.shape[-1] == patch_size else _bicubic(kernel, patch_size)


def _bicubic(picture: Tensor, side: int) -> Tensor:
    out = F.interpolate(picture.float(), size=(side, side), mode="bicubic", align_corners=False)
    return out.to(picture.dtype)
