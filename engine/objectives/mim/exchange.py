"""What travels within a replica behind the teacher: targets to the last stage, whose tensor ranks all compute the loss.

Rank r of the replica teaches the rows `own_rows` of the local batch; its pixels come by `deal_from_first_stage`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.parallel.rows import padded


def collect_targets(own: Tensor, counts: Sequence[int], mesh: Mesh) -> Tensor | None:
    """Targets [N_r, D] of every rank's own rows -> on the last stage those of the local batch, [N, D], in its order.

    counts: N_r of each rank of the replica. None on other stages. Collective over the replica.
    """
    longest = max(counts)
    blocks = _gather_to_last_stage(padded(own, longest), mesh)
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
