"""What a rank puts into collectives and messages, by axis of the mesh: seen where c10d operators are dispatched.

A TorchDispatchMode asks `TrafficReader.read` about each operator of namespace c10d. Groups of one rank send nothing.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.mesh import Mesh

AXES = ("tensor", "pipeline", "data", "replica", "stage", "world")
# Operator -> (name for people, argument that holds what this rank puts in).
_COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "broadcast_": ("broadcast", 0),
    "scatter_": ("scatter", 1),
    "gather_": ("gather", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}
_NO_PAYLOAD = {"barrier", "monitored_barrier_"}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective or message of this rank."""

    axis: str
    """Axis of the mesh whose group it uses."""
    ranks: int
    """Size of that group."""
    kind: str
    """all-reduce | reduce-scatter | all-to-all | all-gather | broadcast | scatter | gather | send | receive."""
    tensor_bytes: int
    """Bytes of the tensors that go in, or that come out of a receive and of a broadcast from elsewhere."""
    puts_in: bool
    """Whether this rank puts those bytes in, or only gets them."""

    @property
    def sent_bytes(self) -> int:
        """What this rank puts in, whatever the algorithm."""
        return self.tensor_bytes if self.puts_in else 0

    @property
    def wire_bytes(self) -> float:
        """What leaves this rank: n - 1 of n parts once (reduce-scatter, all-to-all, all-gather), twice (all-reduce)."""
        others = self.ranks - 1
        part = others / self.ranks
        share = {
            "all-reduce": 2 * part,
            "reduce-scatter": part,
            "all-to-all": part,
            "scatter": part,
            "all-gather": others,
        }
        return self.sent_bytes * share.get(self.kind, 1)


class TrafficReader:
    """Reads c10d operators of one mesh."""

    def __init__(self, mesh: Mesh):
        axes = {name: getattr(mesh, name) for name in AXES}
        groups = [(axis.group, name, axis.size) for name, axis in axes.items()]
        links = (*mesh.links.forward, *mesh.links.backward)
        groups += [(group, "pipeline", mesh.pipeline.size) for group in links]
        gathering = [
            (axis.group, name, axis.size)
            for (name, _), gather in mesh.gathering.items()
            for axis in (gather.inner, gather.outer)
            if axis is not None
        ]
        groups += gathering
        owning = [mesh.data.group, mesh.world.group, *(group for group, _, _ in gathering)]
        self._owning = {group.group_name for group in owning}
        """Groups of ranks that own slices: where they broadcast, each rank its own, it is a gather (start_gather)."""
        self._axis_of = {group.group_name: (name, size) for group, name, size in groups if size > 1}

    def read(self, operator: Any, args: tuple[Any, ...]) -> Transfer | None:
        """The transfer of an operator of namespace c10d; None for barriers, for groups that are no axis of several
        ranks, and for others' parts of a gather. Raises NotImplementedError for an operator that it does not know.
        """
        name = operator.overloadpacket.__name__
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        axis = self._axis_of.get(group.group_name)
        if axis is None or name in _NO_PAYLOAD:
            return None
        if name not in _COLLECTIVES:
            raise NotImplementedError(
                f"the traffic of c10d.{name} is not counted yet: add it to engine/parallel/traffic.py"
            )
        kind, payload = _COLLECTIVES[name]
        puts_in = kind != "receive" and (kind != "broadcast" or args[2] == dist.get_rank(group))
        if kind == "broadcast" and group.group_name in self._owning:
            if not puts_in:
                return None  # another rank's part of a gather, which is counted where this one sends its own
            kind = "all-gather"
        return Transfer(
            axis=axis[0], ranks=axis[1], kind=kind, tensor_bytes=_size_bytes(args[payload]), puts_in=puts_in
        )


class TrafficCounter(TorchDispatchMode):
    """Bytes that this rank puts into the collectives and messages of each axis."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.reader = TrafficReader(mesh)
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Sees every operator, collectives included."""
        if func.namespace == "c10d":
            transfer = self.reader.read(func, args)
            if transfer is not None:
                self.bytes[transfer.axis] += transfer.sent_bytes
        return func(*args, **(kwargs or {}))


def _size_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size_bytes(part) for part in value)
