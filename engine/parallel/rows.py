"""How the rows of a replica's batch are dealt over its ranks, and how they get there and back.

The last stage computes the image embeddings of the whole local batch; the loss wants each rank of the replica to own a
part of the rows, and its gradients are wanted back on the last stage. A rank owns captions and images of the same rows.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.mesh import Axis, Mesh


def split_rows(rows: int, parts: int) -> list[slice]:
    """Consecutive parts of range(rows), as even as can be (longer ones first; empty where rows < parts)."""
    base, longer = divmod(rows, parts)
    starts = [part * base + min(part, longer) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def own_rows(rows: int, mesh: Mesh) -> slice:
    """This rank's part of its replica's local batch."""
    return split_rows(rows, mesh.replica.size)[mesh.replica.rank]


def rows_of_every_rank(rows: int, mesh: Mesh) -> list[int]:
    """Length of `own_rows` on each rank of the world, in rank order (tensor fastest, pipeline slowest)."""
    parts = [part.stop - part.start for part in split_rows(rows, mesh.replica.size)]
    tensor = mesh.tensor.size
    return [
        parts[stage * tensor + t]
        for stage in range(mesh.pipeline.size)
        for _ in range(mesh.data.size)
        for t in range(tensor)
    ]


def deal_from_last_stage(embeddings: Tensor | None, rows: int, width: int, mesh: Mesh, device: torch.device) -> Tensor:
    """Last stage: embeddings fp32 [rows, width] -> every rank of the replica: its own rows."""
    if embeddings is None:
        embeddings = torch.empty(rows, width, device=device)
    if mesh.pipeline.size > 1:
        last = dist.get_global_rank(mesh.pipeline.group, mesh.pipeline.size - 1)
        dist.broadcast(embeddings, src=last, group=mesh.pipeline.group)
    return embeddings[own_rows(rows, mesh)]


def deal_from_first_stage(
    batch: Tensor | None,
    rows: int,
    shape: tuple[int, ...],
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """First stage: [rows, *shape], the local batch on each of its tensor ranks (engine/feed.py) -> every rank of the
    replica: its own rows. Collective over the pipeline.
    """
    own = own_rows(rows, mesh)
    if mesh.pipeline.size == 1:
        assert batch is not None
        return batch[own].to(device, non_blocking=True)
    parts = split_rows(rows, mesh.replica.size)[mesh.tensor.rank :: mesh.tensor.size]  # of this pipeline's stages
    longest = max(part.stop - part.start for part in parts)
    block = torch.empty(longest, *shape, dtype=dtype, device=device)
    blocks = None if batch is None else [padded(batch[part].to(device, non_blocking=True), longest) for part in parts]
    dist.scatter(block, blocks, group_src=0, group=mesh.pipeline.group)
    return block[: own.stop - own.start]


def padded(block: Tensor, length: int) -> Tensor:
    """Zeros behind the rows of a block, so that every rank's has the same shape."""
    rows = block.new_zeros(length, *block.shape[1:])
    rows[: len(block)] = block
    return rows


def gather_rows(own: Tensor, rows: int, axis: Axis) -> Tensor:
    """The consecutive parts of `rows` rows that the ranks of `axis` hold (`split_rows`) -> all of them on each rank."""
    parts = split_rows(rows, axis.size)
    if len(parts) == 1:
        return own
    longest = parts[0].stop - parts[0].start
    everyone = own.new_empty(axis.size * longest, *own.shape[1:])
    dist.all_gather_into_tensor(everyone, padded(own, longest), group=axis.group)
    blocks = everyone.view(axis.size, longest, *own.shape[1:])
    return torch.cat([block[: part.stop - part.start] for block, part in zip(blocks, parts, strict=True)])
