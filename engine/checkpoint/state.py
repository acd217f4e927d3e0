"""What a rank has to write, copied to host memory: the training it copies from may go on at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.tables import Bucket, ShardTable, TableRow
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh
from engine.parallel.shards import Piece, TowerShards


@dataclass(frozen=True)
class SnapshotPart:
    """One tensor to write."""

    key: str
    """kind/logical name."""
    where: FlatSlice
    values: Tensor
    """1-D on the CPU."""


def owned_slice(shards: TowerShards, piece: Piece, mesh: Mesh) -> FlatSlice:
    """Coordinates of an owned piece in its logical tensor."""
    whole = _local_slice(shards, piece, mesh)
    return whole.part(piece.offset, piece.offset + piece.stop - piece.start)


def _local_slice(shards: TowerShards, piece: Piece, mesh: Mesh) -> FlatSlice:
    """All that this tensor rank has of a piece's tensor."""
    tensor = shards.tensors[piece.tensor]
    return FlatSlice.of_rank(tensor.shape, tensor.split_dim, mesh.tensor.rank, mesh.tensor.size)


class Snapshot:
    """Copies of the owned optimizer state. The host buffers are kept between saves (pinned for a GPU)."""

    def __init__(self, optimizer: ShardedOptimizer, mesh: Mesh):
        self.optimizer, self.mesh = optimizer, mesh
        self._buffers: dict[tuple[int, str, int], Tensor] = {}

    def take(self) -> list[SnapshotPart]:
        """Copy now. Each element of the job is in the parts of exactly one rank."""
        return list(self._parts())

    def _parts(self) -> Iterator[SnapshotPart]:
        for t, tower in enumerate(self.optimizer.held):
            # Of tensors that every tensor rank holds whole, only the counted copy is written.
            writes = (tower.shards.counted > 0).tolist()
            for kind, flats in tower.kinds().items():
                host = [self._copy((t, kind, s), flat) for s, flat in enumerate(flats)]
                for s, piece in tower.shards.owned():
                    if writes[piece.tensor]:
                        name = tower.shards.tensors[piece.tensor].name
                        where = owned_slice(tower.shards, piece, self.mesh)
                        yield SnapshotPart(f"{kind}/{name}", where, host[s][piece.start : piece.stop])

    def tables(self) -> list[ShardTable]:
        """Where the parts lie that this rank and the other owners of its buckets write. Local."""
        world = dist.get_process_group_ranks(self.mesh.world.group)
        found: dict[tuple[tuple[int, ...], tuple[str, ...]], list[Bucket]] = {}
        for tower in self.optimizer.held:
            writes = (tower.shards.counted > 0).tolist()
            owners = dist.get_process_group_ranks(tower.shards.owners.group)
            ranks = tuple(world.index(rank) for rank in owners)
            buckets = found.setdefault((ranks, tuple(tower.kinds())), [])
            for shard in tower.shards.shards:
                rows = [
                    TableRow(
                        tower.shards.tensors[piece.tensor].name,
                        piece.start,
                        _local_slice(tower.shards, piece, self.mesh),
                    )
                    for piece in shard.tensors
                    if writes[piece.tensor]
                ]
                if rows:
                    buckets.append(Bucket(shard.length, tuple(rows)))
        return [ShardTable(ranks, kinds, tuple(buckets)) for (ranks, kinds), buckets in found.items() if buckets]

    def _copy(self, key: tuple[int, str, int], flat: Tensor) -> Tensor:
        if key not in self._buffers:
            # fp32 as every stored weight, also of what is frozen and has no fp32 master.
            self._buffers[key] = torch.empty(flat.shape, dtype=torch.float32, device="cpu", pin_memory=flat.is_cuda)
        return self._buffers[key].copy_(flat.detach())
