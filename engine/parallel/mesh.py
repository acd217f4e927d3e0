"""The mesh: which rank computes what. Axes tensor (fastest), data, pipeline (slowest); one frozen object, passed on.

Vision is split over tensor x pipeline and replicated over data; text is replicated over all ranks. No code uses the
default process group: every collective names one of the groups below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.device import priority_options
from engine.parallel.replicas import Groups, groups_of

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
class GatherAxes:
    """Ranks that bring whole weights together from slices, in groups that nothing else uses."""

    inner: Axis
    """Neighbours (of one node, best) that gather at every turn."""
    outer: Axis | None
    """Ranks of the same place in the other groups of neighbours, which exchange slices once a step; None: no others."""


@dataclass(frozen=True)
class Links:
    """Groups for messages between neighbouring stages: the ranks of the pipeline, by direction and sender.

    On NCCL two ranks exchange what one group holds in the order in which they ask for it, so a receive that is posted
    ahead would hold back every send of the other direction; and gloo matches messages by sender, so activations and
    gradients of the same sender (two stages in a ring) need to be told apart.
    """

    forward: tuple[Group, Group]
    """To the next stage, from even and from odd stages."""
    backward: tuple[Group, Group]
    """To the previous stage, from even and from odd stages."""


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
    links: Links
    """Links of the pipeline axis."""
    control: Axis
    """All ranks over gloo, for what concerns the hosts: errors, wishes, agreement. Its collectives wait for no device,
    and none of them is ever under way when another starts."""
    hosts: Axis
    """The ranks of `replica` over gloo, for captions: what they are cut to is a shape, so hosts have to know them."""
    timeout: timedelta | None = None
    """Time-out of collectives in groups that are made later."""
    gathering: dict[tuple[str, int], GatherAxes] = field(default_factory=dict)
    """Made so far: (axis of the owners, ranks that gather together) -> groups for it."""

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

    def gather_axes(self, owners: str, together: int) -> GatherAxes:
        """Groups in which the ranks of axis `owners` (data | world) gather weights, `together` neighbours each.

        Collective over that axis; the groups are made once.
        """
        if (owners, together) not in self.gathering:
            axis: Axis = getattr(self, owners)
            ranks = dist.get_process_group_ranks(axis.group)
            block, place = divmod(axis.rank, together)
            near, far = ranks[block * together : (block + 1) * together], ranks[place::together]
            inner = own_axis(f"gather {owners}", near, self.timeout)
            outer = own_axis(f"gather {owners}, outer", far, self.timeout) if together < axis.size else None
            self.gathering[owners, together] = GatherAxes(inner, outer)
        return self.gathering[owners, together]

    def vision_groups(self) -> Groups:
        """What megatron-core's layers and gradient buffers of the vision stage need."""
        return groups_of(tensor=self.tensor.group, data=self.data.group, alone=self.alone.group)

    def text_groups(self) -> Groups:
        """The same for the text tower: never split, replicated over all ranks."""
        return groups_of(tensor=self.alone.group, data=self.world.group, alone=self.alone.group)


def meet(axis: Axis, device: torch.device) -> None:
    """Wait on the host until every rank of the axis is here. Collective over the axis."""
    here = torch.ones(1, device=device)
    dist.all_reduce(here, group=axis.group)
    here.item()  # on a GPU the all-reduce is only queued


def own_axis(
    name: str, members: Sequence[int], timeout: timedelta | None, options: Any = None, backend: str | None = None
) -> Axis:
    """An axis of these ranks, this one among them. Only they create its group, all in the same order of axes.

    So no rank waits for groups of others: every one of the hundreds of groups of a large job would otherwise be a
    barrier of all its ranks. name: what torch's flight recorder calls the group (engine/resilience/failures.py).
    """
    own = list(members)
    group = dist.new_group(
        own, timeout=timeout, backend=backend, pg_options=options, use_local_synchronization=True, group_desc=name
    )
    return Axis(len(own), own.index(dist.get_rank()), group)


def build_mesh(tensor: int, pipeline: int, world: Group, *, timeout: timedelta | None = None) -> Mesh:
    """Cut `world` (all ranks of the job) into TP x PP x DP. Collective: every rank calls it with the same numbers.

    timeout: of the groups' collectives; they do not inherit the world's. None: torch's (10 minutes on NCCL).
    """
    ranks = dist.get_process_group_ranks(world)
    data, left = divmod(len(ranks), tensor * pipeline)
    if left:
        raise LayoutError(f"{len(ranks)} ranks are not a multiple of TP {tensor} x PP {pipeline} = {tensor * pipeline}")
    me = ranks.index(dist.get_rank())
    at = lambda tt, dd, pp: ranks[tt + tensor * (dd + data * pp)]  # noqa: E731
    t, d, p = me % tensor, me // tensor % data, me // (tensor * data)

    alone = own_axis("alone", [ranks[me]], timeout)

    def axis(name: str, members: list[int], **more: Any) -> Axis:
        """One rank's axes share a group: an idle group is three threads that wake a hundred times a second (gloo)."""
        return alone if len(members) == 1 and "backend" not in more else own_axis(name, members, timeout, **more)

    stages = [at(t, d, pp) for pp in range(pipeline)]
    urgent = priority_options(dist.get_backend(world))
    by_host = {"backend": "gloo"} if dist.get_backend(world) == "nccl" else {}
    pipeline_axis = axis("pipeline", stages, options=urgent)
    replica_ranks = [at(tt, d, pp) for pp in range(pipeline) for tt in range(tensor)]
    replica = axis("replica", replica_ranks)
    return Mesh(
        tensor=axis("tensor", [at(tt, d, p) for tt in range(tensor)]),
        data=axis("data", [at(t, dd, p) for dd in range(data)]),
        pipeline=pipeline_axis,
        replica=replica,
        stage=axis("stage", [at(tt, dd, p) for dd in range(data) for tt in range(tensor)]),
        alone=alone,
        world=Axis(len(ranks), me, world),
        links=_links(pipeline_axis, lambda: axis("link", stages, options=urgent).group),
        control=axis("control", ranks, **by_host),
        hosts=axis("hosts", replica_ranks, **by_host) if by_host and len(replica_ranks) > 1 else replica,
        timeout=timeout,
    )


def _links(pipeline: Axis, another: Callable[[], Group]) -> Links:
    """another: makes one more group of the same ranks. Only of two stages is one rank both neighbours of the other."""
    even = pipeline.group
    if pipeline.size == 1:
        return Links((even, even), (even, even))
    if pipeline.size > 2:
        back = another()
        return Links((even, even), (back, back))
    return Links((even, another()), (another(), another()))
