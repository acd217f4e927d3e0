"""A digest of a tower's weights that no layout changes: the ranks' sums add up to that of the whole.

Each element's bfloat16 bits are multiplied by an odd number that follows from its tensor's name and its place in the
unsplit tensor, and summed modulo 2^64. Rounded to bfloat16, so that a tower is the same in either precision.
"""

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor

from models.tensors.naming import LogicalTensor

_STEP = 0x1E3779B97F4A7C15
"""An odd multiplier: neighbouring places get numbers that have no bits in common but by chance."""


@torch.no_grad()
def own_digest(tensors: Iterable[tuple[LogicalTensor, Tensor]], rank: int, size: int) -> Tensor:
    """int64 [1]: what this tensor rank of `size` adds; a tensor that is not split counts on rank 0 alone.

    The sum over the tensor ranks and stages of a replica is the tower's.
    """
    total: Tensor | None = None
    for logical, own in tensors:
        if logical.split_dim is None and rank > 0:
            own = own[:0]
        weights = (_places(logical, own.shape, rank, size, own.device) * _STEP + _seed(logical.name)) | 1
        summed = (own.detach().bfloat16().view(torch.int16).long() * weights).sum().view(1)
        total = summed if total is None else total + summed
    return torch.zeros(1, dtype=torch.int64) if total is None else total


def _places(logical: LogicalTensor, own: Iterable[int], rank: int, size: int, device: torch.device) -> Tensor:
    """Number of each own element in the unsplit tensor."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    starts = [part.start or 0 for part in logical.slice_of(rank, size)]
    for whole, length, start in zip(logical.shape, own, starts, strict=True):
        places = places.unsqueeze(-1) * whole + torch.arange(start, start + length, device=device)
    return places


def _seed(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
