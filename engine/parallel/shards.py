"""Flat, sharded views of a tower's weights and gradients, and sums over whole logical tensors.

megatron-core's DistributedDataParallel lays all parameters of a module out in flat buckets, reduce-scatters their
fp32 gradients and all-gathers the weights. A rank of the data-parallel group owns one contiguous shard of every
bucket, whose borders fall inside tensors. `TowerShards` maps those shards back to logical tensors, so that an
optimizer can keep its state for the owned elements only and still sum over each whole tensor: one all-reduce of a
short vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.parallel.mesh import Axis
from engine.parallel.replicas import Buckets, FrozenBuffer
from engine.parallel.sharded import ShardedPart, own_slice
from models.tensors.naming import LogicalTensor


@dataclass(frozen=True)
class Piece:
    """The part of one local parameter that this rank owns."""

    tensor: int
    """Index into TowerShards.tensors."""
    start: int
    stop: int
    """Elements [start, stop) of the shard it lies in."""
    offset: int
    """Element of the (local, flattened) parameter that stands at `start`."""


@dataclass(frozen=True)
class Shard:
    """This rank's contiguous part of one bucket."""

    weight: Tensor
    """1-D view into the bucket in the model's dtype; the all-gather sends it to the other ranks."""
    gradient: Tensor
    """1-D fp32 view, complete after the reduce-scatter; empty for what is not trained."""
    pieces: list[Piece]
    tensors: list[Piece]
    """Tensors of the whole bucket, the same for every owner: elements [start, stop) of it, offset 0."""
    length: int
    """Elements of each owner's part."""


class TowerShards:
    """Shards of one module in buckets: of what is trained, or of what is not."""

    def __init__(
        self,
        ddp: Buckets,
        logical: dict[str, LogicalTensor],
        *,
        owners: Axis,
        holders: Axis,
        tensor_rank: int,
        sharded: ShardedPart | None = None,
        frozen: Sequence[FrozenBuffer] | None = None,
    ):
        """owners: the data-parallel axis that shards the buckets; holders: all ranks with a slice of these tensors.

        sharded: whose own slices these are; None: views into the buckets. frozen: what is not trained, instead of the
        rest.
        """
        self.ddp = ddp
        self.holders, self.owners = holders, owners
        self.tensors = list(logical.values())
        index = {name: i for i, name in enumerate(logical)}
        names = {parameter: name for name, parameter in ddp.module.named_parameters()}
        parameter_index = {parameter: index[names[parameter]] for parameter in names}
        buffers = ddp.buffers if frozen is None else frozen
        buckets = [(buffer, bucket) for buffer in buffers for bucket in buffer.buckets]
        slices = [
            (_own_weights(bucket, owners, sharded), _own_gradients(bucket, owners, sharded)) for _, bucket in buckets
        ]
        self.shards = [
            _shard(weight, gradient, _tensors(buffer, bucket, parameter_index), owners)
            for (buffer, bucket), (weight, gradient) in zip(buckets, slices, strict=True)
        ]
        numbers = [piece.tensor for _, piece in self.owned()]
        device = next(ddp.module.parameters()).device
        self._tensor_of_piece = torch.tensor(numbers, dtype=torch.int64, device=device)
        # A tensor that every tensor rank holds whole counts once in sums over holders.
        counted = [tensor.split_dim is not None or tensor_rank == 0 for tensor in self.tensors]
        self.counted = torch.tensor(counted, dtype=torch.float64, device=device)

    def squares(self, flats: list[Tensor]) -> Tensor:
        """float64 [tensors]: sum of squares of the owned elements; `flats` holds one 1-D tensor a shard.

        Local: `over_holders` adds the other ranks.
        """
        total = torch.zeros(len(self.tensors), dtype=torch.float64, device=self.counted.device)
        views = [
            flat[piece.start : piece.stop]
            for flat, shard in zip(flats, self.shards, strict=True)
            for piece in shard.pieces
        ]
        if views:
            norms = torch.stack(torch._foreach_norm(views)).double()
            total.index_add_(0, self._tensor_of_piece, norms.square())
        return total * self.counted

    def over_holders(self, sums: Tensor) -> Tensor:
        """Add the sums of every rank that holds a slice: then each entry is a sum over a whole logical tensor."""
        dist.all_reduce(sums, group=self.holders.group)
        return sums

    def owned(self) -> Iterator[tuple[int, Piece]]:
        """(shard index, piece) of everything this rank owns."""
        for i, shard in enumerate(self.shards):
            for piece in shard.pieces:
                yield i, piece


def _own_weights(bucket, owners: Axis, sharded: ShardedPart | None) -> Tensor:
    return own_slice(bucket.param_data, owners) if sharded is None else sharded.own_weights(bucket)


def _own_gradients(bucket, owners: Axis, sharded: ShardedPart | None) -> Tensor:
    if isinstance(bucket, FrozenBuffer):
        return torch.empty(0, device=bucket.param_data.device)
    return own_slice(bucket.grad_data, owners) if sharded is None else sharded.own_gradients(bucket)


def _tensors(buffer, bucket, parameter_index: dict[nn.Parameter, int]) -> list[Piece]:
    """Where the tensors of a bucket stand in it."""
    places = [(parameter_index[parameter], *buffer.param_index_map[parameter][:2]) for parameter in bucket.params_list]
    pieces = [Piece(number, start - bucket.offset, stop - bucket.offset, 0) for number, start, stop in places]
    return sorted(pieces, key=lambda piece: piece.start)


def _shard(weight: Tensor, gradient: Tensor, tensors: list[Piece], owners: Axis) -> Shard:
    length = weight.numel()
    first = owners.rank * length
    pieces = []
    for tensor in tensors:
        low, high = max(tensor.start, first), min(tensor.stop, first + length)
        if low < high:
            pieces.append(Piece(tensor.tensor, low - first, high - first, low - tensor.start))
    return Shard(weight, gradient, pieces, tensors, length)
