"""The mesh: which rank computes what. Axes tensor (fastest), data, pipeline (slowest); one frozen object, passed on.

Vision is split over tensor x pipeline and replicated over data; text is replicated over all ranks. No code uses the
default process group: every collective names one of the groups below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

Group = dist.ProcessGroup


class LayoutError(Exception):
    """A layout that the ranks, the model or the batch do not admit; the message prints every factor."""


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    size: int
    rank: int
    group: Group


@dataclass(frozen=True)
class Mesh:
    """Groups and coordinates of this rank."""

    tensor: Axis
    pipeline: Axis
    data: Axis
    world: Axis
    replica: Axis
    """The tensor x pipeline ranks that hold one copy of the vision tower; rank = stage x tensor size + tensor rank."""
    stage: Axis
    """The tensor x data ranks that hold the same blocks; the trust ratio of LAMB sums over them."""
    alone: Axis
    """This rank only."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the patch embedding and needs pixels."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the head and computes image embeddings."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def layout(self) -> str:
        """For people: TP 2 x PP 2 x DP 1."""
        return f"TP {self.tensor.size} × PP {self.pipeline.size} × DP {self.data.size}"

    def vision_groups(self) -> ProcessGroupCollection:
        """What megatron-core's layers and gradient buffers of the vision stage need."""
        return _collection(tp=self.tensor.group, dp=self.data.group, alone=self.alone.group)

    def text_groups(self) -> ProcessGroupCollection:
        """The same for the text tower: never split, replicated over all ranks."""
        return _collection(tp=self.alone.group, dp=self.world.group, alone=self.alone.group)


def _collection(*, tp: Group, dp: Group, alone: Group) -> ProcessGroupCollection:
    # Stages are cut by models/vision.py, so megatron-core is told of a pipeline of one.
    return ProcessGroupCollection(tp=tp, dp=dp, dp_cp=dp, cp=alone, pp=alone, ep=alone, expt_dp=alone)


def build_mesh(tensor: int, pipeline: int, world: Group) -> Mesh:
    """Cut `world` (all ranks of the job) into TP x PP x DP. Collective: every rank calls it with the same numbers."""
    ranks = dist.get_process_group_ranks(world)
    data, left = divmod(len(ranks), tensor * pipeline)
    if left:
        raise LayoutError(f"{len(ranks)} ranks are not a multiple of TP {tensor} x PP {pipeline} = {tensor * pipeline}")
    me = ranks.index(dist.get_rank())
    at = lambda tt, dd, pp: ranks[tt + tensor * (dd + data * pp)]  # noqa: E731

    def axis(sets: Sequence[Sequence[int]]) -> Axis:
        """Create all groups of one kind on every rank (creation is collective) and keep this rank's."""
        group, _ = dist.new_subgroups_by_enumeration([list(s) for s in sets])
        own = dist.get_process_group_ranks(group)
        return Axis(len(own), own.index(dist.get_rank()), group)

    rows = range
    return Mesh(
        tensor=axis([[at(i, dd, pp) for i in rows(tensor)] for dd in rows(data) for pp in rows(pipeline)]),
        data=axis([[at(tt, i, pp) for i in rows(data)] for tt in rows(tensor) for pp in rows(pipeline)]),
        pipeline=axis([[at(tt, dd, i) for i in rows(pipeline)] for tt in rows(tensor) for dd in rows(data)]),
        replica=axis([[at(tt, dd, pp) for pp in rows(pipeline) for tt in rows(tensor)] for dd in rows(data)]),
        stage=axis([[at(tt, dd, pp) for dd in rows(data) for tt in rows(tensor)] for pp in rows(pipeline)]),
        alone=axis([[r] for r in ranks]),
        world=Axis(len(ranks), me, world),
    )


def stage_layers(depth: int, stages: int, counts: list[int] | None = None) -> list[range]:
    """Blocks of each stage (in tower order; with virtual stages, of each chunk).

    counts: blocks of each, by hand. None: as even as can be, the remainder on the middle stages, since the first one
    also embeds patches and the last one projects.
    """
    if counts is None:
        base, extra = divmod(depth, stages)
        first = (stages - extra) // 2
        counts = [base + (first <= stage < first + extra) for stage in range(stages)]
    starts = [0, *accumulate(counts)]
    return [range(start, stop) for start, stop in pairwise(starts)]
