"""What travels within a replica around the teacher: pixels to every rank, targets to the last stage.

The first stage's tensor ranks all hold the pixels of the local batch (engine/feed.py); the last stage's all compute the
loss. Rank r of the replica teaches the rows `own_rows` of the local batch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows, split_rows


def deal_images(images: Tensor | None, rows: int, side: int, mesh: Mesh, device: torch.device) -> Tensor:
    """First stage: uint8 [rows, 3, side, side] -> every rank of the replica: its own rows. Collective over pipeline."""
    own = own_rows(rows, mesh)
    if mesh.pipeline.size == 1:
        assert images is not None
        return images[own].to(device, non_blocking=True)
    parts = split_rows(rows, mesh.replica.size)[mesh.tensor.rank :: mesh.tensor.size]  # of this pipeline's stages
    longest = max(part.stop - part.start for part in parts)
    block = torch.empty(longest, 3, side, side, dtype=torch.uint8, device=device)
    blocks = (
        None if images is None else [_padded(images[part].to(device, non_blocking=True), longest) for part in parts]
    )
    dist.scatter(block, blocks, group_src=0, group=mesh.pipeline.group)
    return block[: own.stop - own.start]


def collect_targets(own: Tensor, counts: Sequence[int], mesh: Mesh) -> Tensor | None:
    """Targets [N_r, D] of every rank's own rows -> on the last stage those of the local batch, [N, D], in its order.

    counts: N_r of each rank of the replica. None on other stages. Collective over the replica.
    """
    longest = max(counts)
    blocks = _gather_to_last_stage(_padded(own, longest), mesh)
    if blocks is None:
        return None
    everyone = _all_gather(blocks, mesh)  # [tensor, pipeline, longest, D]
    ranks = [(stage, t) for stage in range(mesh.pipeline.size) for t in range(mesh.tensor.size)]
    return torch.cat([everyone[t, stage, :count] for (stage, t), count in zip(ranks, counts, strict=True)])


def _gather_to_last_stage(own: Tensor, mesh: Mesh) -> Tensor | None:
    """[longest, D] -> [pipeline, longest, D] on the last stage."""
    stages = mesh.pipeline.size
    if stages == 1:
        return own.unsqueeze(0)
    out = own.new_empty(stages, *own.shape) if mesh.is_last_stage else None
    dist.gather(own, None if out is None else list(out), group_dst=stages - 1, group=mesh.pipeline.group)
    return out


def _all_gather(own: Tensor, mesh: Mesh) -> Tensor:
    """[…] -> [tensor, …]."""
    if mesh.tensor.size == 1:
        return own.unsqueeze(0)
    out = own.new_empty(mesh.tensor.size * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(out, own, group=mesh.tensor.group)
    return out.view(mesh.tensor.size, *own.shape)


def _padded(block: Tensor, length: int) -> Tensor:
    """Zeros behind, so that every rank's block has the same shape."""
    padded = block.new_zeros(length, *block.shape[1:])
    padded[: len(block)] = block
    return padded
