"""The elements that a rank owns of a tower, block by block: views made once, which an update passes in turn.

To cut a dozen vectors anew costs an update on a CPU as much as summing megabytes of them.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.optim.passes import BLOCK_ELEMENTS, is_near_a_core, words_of
from engine.parallel.shards import Shard

_WHOLE_VECTORS = 1 << 10
"""A kernel takes a tensor by vectors of a core's width, and what is left at its end with another rounding (torch 2.13):
where a multiple of them ends, cutting a tensor changes no bit.
"""


@dataclass(frozen=True, slots=True)
class Elements:
    """Some elements of a shard, 1-D views."""

    gradient: Tensor
    """Empty of what is not trained."""
    weight: Tensor
    """Weights in the model's dtype; where that is fp32, the masters themselves."""
    held: Mapping[str, Tensor]
    """Kind of state -> its elements."""


@dataclass(frozen=True, slots=True)
class Segment(Elements):
    """What a block holds of one tensor."""

    tensor: int
    """Index into TowerShards.tensors."""


@dataclass(frozen=True, slots=True)
class Block(Elements):
    """A part of a shard that stays near a CPU core while it is passed; elsewhere all of the shard."""

    number: int
    """Among all blocks of the tower."""
    shard: int
    start: int
    stop: int
    """Elements [start, stop) of the shard."""
    words: Mapping[str, Tensor]
    """Kind of state -> its bits as integers (engine/optim/passes.py)."""
    segments: Sequence[Segment]
    """Tensors in it, in order; padding belongs to none."""


class BlockSums:
    """Sums of the bits of every kind of state of a tower, int64 [kinds, blocks]; used again and again."""

    def __init__(self, blocks: Sequence[Block], device: torch.device):
        """blocks: of the tower, all of them."""
        self.blocks = blocks
        self.kinds = list(blocks[0].words) if blocks else []
        self._sums = torch.zeros(len(self.kinds), len(blocks), dtype=torch.int64, device=device)
        self._cells = {kind: of_kind.unbind() for kind, of_kind in zip(self.kinds, self._sums.unbind(), strict=True)}
        """Kind -> 0-d views, one a block, made once: each would cost what summing a megabyte costs."""
        self.taken: set[str] = set()
        """Kinds that are summed, or are being summed block by block."""

    def begin(self) -> "BlockSums":
        """Nothing is summed yet."""
        self.taken.clear()
        return self

    def take(self, kind: str, block: Block) -> None:
        """Sum what a block has of a kind of state."""
        self.taken.add(kind)
        torch.sum(block.words[kind], 0, out=self._cells[kind][block.number])

    def take_the_rest(self, but: Collection[str] = ()) -> "BlockSums":
        """Sum all kinds of state that nobody has. but: without these."""
        for kind in [kind for kind in self._cells if kind not in self.taken and kind not in but]:
            for block in self.blocks:
                self.take(kind, block)
        return self

    def add(self, kind: str, block: Block, bits: Tensor) -> None:
        """A kind of state of a block has changed by so much."""
        self._cells[kind][block.number].add_(bits)

    def differences(self, others: "BlockSums", kinds: Collection[str]) -> Tensor:
        """Which kinds have other sums there: bool, one a kind of the tower. kinds: False for those not among them."""
        differ = (self._sums != others._sums).any(1)
        looked_at = [kind in kinds and kind in self.taken for kind in self.kinds]
        return differ if all(looked_at) else differ & torch.tensor(looked_at, device=differ.device)


def cut(shards: Sequence[Shard], kinds: Mapping[str, Sequence[Tensor]], elements: int = BLOCK_ELEMENTS) -> list[Block]:
    """All blocks of a tower. kinds: kind of state -> its 1-D tensors, one a shard. elements: of a block, about."""
    blocks: list[Block] = []
    for i, shard in enumerate(shards):
        flats = {kind: of_kind[i] for kind, of_kind in kinds.items()}
        for part in parts_of(shard, elements):
            whole = _elements(shard, flats, part)
            blocks.append(
                Block(
                    *whole,
                    number=len(blocks),
                    shard=i,
                    start=part.start,
                    stop=part.stop,
                    words={kind: words_of(flat[part]) for kind, flat in flats.items()},
                    segments=[
                        Segment(*(whole if own == part else _elements(shard, flats, own)), piece.tensor)
                        for piece in shard.pieces
                        for own in [slice(max(piece.start, part.start), min(piece.stop, part.stop))]
                        if own.start < own.stop
                    ],
                )
            )
    return blocks


def parts_of(shard: Shard, elements: int) -> list[slice]:
    """A shard by parts of about so many elements, short enough for the passes over one to hit the cache (GPU: one
    part); none of an empty one. A part ends where whole vectors of a tensor end, or where the next tensor begins.
    """
    length, starts = shard.weight.numel(), [piece.start for piece in shard.pieces]
    if not is_near_a_core(shard.weight):
        elements = max(1, length)
    parts, start = [], 0
    while start < length:
        stop = start + elements
        after = bisect_right(starts, stop)
        if after:
            stop += (starts[after - 1] - stop) % _WHOLE_VECTORS
        stop = min(stop, *starts[after : after + 1], length)
        parts.append(slice(start, stop))
        start = stop
    return parts


def _elements(shard: Shard, flats: Mapping[str, Tensor], part: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return shard.gradient[part], shard.weight[part], {kind: flat[part] for kind, flat in flats.items()}
