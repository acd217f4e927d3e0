"""How the losses move rows between the ranks of a group: counts, uneven gathers, rings, reductions.

Rank k of the group owns `counts[k]` rows of the global batch, in rank order; counts may differ and may be
zero. `RowExchange` with group=None is one process alone: every method returns at once and no collective runs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Variant = Literal["gather", "ring"]
# torch 2.13 renamed all_gather_into_tensor and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def check_variant(variant: str) -> None:
    """Raise ValueError for a variant that does not exist."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant is {variant!r}; choose one of {get_args(Variant)}")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive rows of the global batch, of one rank or of several."""

    rows: slice
    """Where they lie in the global order."""
    embeddings: Tensor
    """[rows, D]."""
    is_own: bool
    """Whether they are this rank's, all of them and no others."""


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """The rows of a group of ranks and the collectives over them."""

    group: dist.ProcessGroup | None
    """The ranks that share the batch; None: this process alone."""
    rank: int
    """This rank within the group."""
    counts: tuple[int, ...]
    """Rows of every rank, in rank order."""

    @classmethod
    def create(
        cls, rows: Tensor, group: dist.ProcessGroup | None, counts: Sequence[int] | None = None
    ) -> "RowExchange":
        """Learn the row counts of all ranks: given by the caller, or by one collective that waits for the
        device.

        rows: this rank's rows [rows, D]. Raises ValueError when `counts` does not fit or the batch is empty.
        """
        rank = 0 if group is None else dist.get_rank(group)
        world = 1 if group is None else dist.get_world_size(group)
        known = list(counts) if counts is not None else _ask_counts(rows, world, group)
        if len(known) != world or known[rank] != rows.shape[0]:
            raise ValueError(
                f"row_counts {known} do not fit: the group has {world} ranks and rank {rank} holds "
                f"{rows.shape[0]} rows; give one count per rank"
            )
        if sum(known) == 0:
            raise ValueError("the global batch has no rows on any rank; give at least one image-text pair")
        return cls(group=group, rank=rank, counts=tuple(known))

    @property
    def total(self) -> int:
        """Rows of all ranks: the global batch B."""
        return sum(self.counts)

    @cached_property
    def slices(self) -> list[slice]:
        """Where each rank's rows lie in the global order."""
        stops = accumulate(self.counts)
        return [slice(stop - count, stop) for stop, count in zip(stops, self.counts, strict=True)]

    @property
    def own_rows(self) -> slice:
        """Where this rank's rows lie in the global order."""
        return self.slices[self.rank]

    def largest_block(self, variant: Variant) -> int:
        """Most rows that a block of `blocks` can have."""
        return max(self.counts) if variant == "ring" else self.total

    def max_(self, values: Tensor) -> Tensor:
        """All-reduce `values` in place to the maximum over the ranks."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """All-reduce `values` in place to the sum over the ranks."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather rows [rows, ...] of every rank -> [B, ...], in the global order.

        Ranks with fewer rows than the fullest one send padding, since collectives want equal sizes; it is cut out
        by a copy.
        """
        if self.group is None:
            return rows
        height = max(self.counts)
        padded = rows.contiguous()
        if rows.shape[0] < height:
            padded = rows.new_zeros(height, *rows.shape[1:])
            padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(len(self.counts) * height, *rows.shape[1:])
        _all_gather(gathered, padded, group=self.group)
        if min(self.counts) == height:
            return gathered
        return torch.cat([block[:count] for block, count in zip(gathered.split(height), self.counts, strict=True)])

    def blocks(self, rows: Tensor, variant: Variant) -> Iterable[Block]:
        """Blocks that hold every row of all ranks once, this rank's own first.

        "gather" holds all B rows at once, and those of the ranks behind this one, and before it, are a block each:
        hundreds of ranks have few rows each, and a tile of a few rows is too small a piece of work for a GPU.
        "ring" moves the rows of each rank anew at each iteration, and holds two blocks beside the own one: one at
        work, one arriving. Every rank must iterate equally often, and to the end.
        """
        if variant == "ring" and len(self.counts) > 1:
            return _Ring(exchange=self, rows=rows.contiguous())
        own, everyone = self.own_rows, self.gather(rows)
        parts = [own, slice(own.stop, self.total), slice(0, own.start)]
        return [Block(rows=part, embeddings=everyone[part], is_own=part is own) for part in parts]


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """Blocks travel from rank to rank - 1, so that rank r meets the owners r, r + 1, … r - 1."""

    exchange: RowExchange
    rows: Tensor

    def __iter__(self) -> Iterator[Block]:
        counts, rank = self.exchange.counts, self.exchange.rank
        rows = self.rows
        for step in range(len(counts) - 1):
            owner = (rank + step) % len(counts)
            arriving = rows.new_empty(counts[(owner + 1) % len(counts)], *rows.shape[1:])
            transfers = self._post(rows, arriving)
            yield self._block(owner, rows)
            for transfer in transfers:
                transfer.wait()
            rows = arriving
        yield self._block((rank - 1) % len(counts), rows)

    def _block(self, owner: int, rows: Tensor) -> Block:
        return Block(rows=self.exchange.slices[owner], embeddings=rows, is_own=owner == self.exchange.rank)

    def _post(self, leaving: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Start the transfers of one ring step; empty blocks are known from the counts and never sent."""
        group, world = self.exchange.group, len(self.exchange.counts)
        assert group is not None  # a ring has at least two ranks
        before = dist.get_global_rank(group, (self.exchange.rank - 1) % world)
        after = dist.get_global_rank(group, (self.exchange.rank + 1) % world)
        operations = []
        if len(leaving):
            operations.append(dist.P2POp(dist.isend, leaving, before, group))
        if len(arriving):
            operations.append(dist.P2POp(dist.irecv, arriving, after, group))
        return dist.batch_isend_irecv(operations) if operations else []


def _ask_counts(rows: Tensor, world: int, group: dist.ProcessGroup | None) -> list[int]:
    if group is None:
        return [rows.shape[0]]
    counts = torch.empty(world, dtype=torch.int64, device=rows.device)
    own = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    _all_gather(counts, own, group=group)
    return counts.tolist()
