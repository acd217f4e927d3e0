"""Tables of shards: parts of tensors that many ranks hold as equal slices of flat buckets.

A data-parallel group lays tensors out in flat buckets, of which each rank owns the slice at its place. Where a tensor
stands in a bucket is the same for all of them, so it is written once; what a rank holds follows from its place. So a
checkpoint's manifest grows by a file's name and hash a rank, not by a row for each piece of each kind.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice

Shapes = dict[str, tuple[int, ...]]
"""Logical name -> shape."""


def rank_file(rank: int) -> str:
    """Name of the file of a rank."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class TableRow:
    """A tensor, or a tensor rank's slice of it, in a bucket."""

    name: str
    """Logical name, without a kind."""
    first: int
    """Element of the bucket at which it begins."""
    where: FlatSlice
    """All of it, in the logical tensor."""


@dataclass(frozen=True)
class Bucket:
    """A flat buffer that is cut into slices of `length` elements, one for each rank of its table."""

    length: int
    rows: tuple[TableRow, ...]

    def part(self, row: TableRow, place: int) -> FlatSlice | None:
        """What of a row the rank at a place owns; None: nothing."""
        begin = place * self.length
        start, stop = max(row.first, begin), min(row.first + row.where.numel(), begin + self.length)
        return row.where.part(start - row.first, stop - row.first) if start < stop else None


@dataclass(frozen=True)
class ShardTable:
    """Buckets whose slices lie in the files of `ranks`, in their order."""

    ranks: tuple[int, ...]
    kinds: tuple[str, ...]
    """Kinds of tensors that lie so: each row stands for one of each."""
    buckets: tuple[Bucket, ...]

    def parts(self, bucket: Bucket, row: TableRow) -> Iterator[tuple[str, FlatSlice]]:
        """(file, what it holds) of every rank that owns some of a row."""
        last = row.first + row.where.numel() - 1
        for place in range(row.first // bucket.length, min(last // bucket.length + 1, len(self.ranks))):
            part = bucket.part(row, place)
            if part is not None:
                yield rank_file(self.ranks[place]), part

    def elements(self, bucket: Bucket, row: TableRow) -> int:
        """Elements of a row that some rank owns."""
        return max(0, min(row.where.numel(), bucket.length * len(self.ranks) - row.first))

    def rows(self) -> Iterator[tuple[Bucket, TableRow]]:
        """Every row with its bucket."""
        return ((bucket, row) for bucket in self.buckets for row in bucket.rows)

    def owned(self, rank: int) -> dict[str, FlatSlice]:
        """kind/name -> what the file of a rank holds."""
        place = self.ranks.index(rank)
        found = ((row, bucket.part(row, place)) for bucket, row in self.rows())
        return {f"{kind}/{row.name}": part for row, part in found if part is not None for kind in self.kinds}

    def shapes(self) -> Shapes:
        """Shapes of the logical tensors."""
        return {row.name: row.where.shape for _, row in self.rows()}


# --- to and from JSON ------------------------------------------------------------------------------------------------


def table_entry(table: ShardTable) -> dict[str, Any]:
    """JSON of a table without its shapes: ranks at equal distances as first, distance and number."""
    buckets = [
        {
            "length": bucket.length,
            "rows": [[r.name, r.first, r.where.dim, r.where.offset, r.where.length] for r in bucket.rows],
        }
        for bucket in table.buckets
    ]
    return {"ranks": _packed(table.ranks), "kinds": list(table.kinds), "buckets": buckets}


def digest_of(entry: dict[str, Any]) -> str:
    """What tells two tables apart."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:32]


def parse_table(entry: dict[str, Any], shapes: Shapes, most_ranks: int) -> ShardTable:
    """The inverse of `table_entry`. Raises CheckpointError for what is no table of that many ranks at most."""
    try:
        buckets = [
            Bucket(bucket["length"], tuple(_row(shapes, *row) for row in bucket["rows"])) for bucket in entry["buckets"]
        ]
        ranks = _unpacked(entry["ranks"], most_ranks)
        table = ShardTable(ranks, tuple(entry["kinds"]), tuple(buckets))
        sizes = [*ranks, *(size for bucket, row in table.rows() for size in (bucket.length - 1, row.first))]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("a negative size")
        return table
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"a table of shards cannot be read: {type(error).__name__} {error}") from error


def _row(shapes: Shapes, name: str, first: int, dim: int | None, offset: int, length: int) -> TableRow:
    shape = shapes[name]
    cut = shape if dim is None else (*shape[:dim], length, *shape[dim + 1 :])
    return TableRow(name, first, FlatSlice(shape, dim, offset, length, 0, math.prod(cut)))


def _packed(ranks: Sequence[int]) -> list[int] | dict[str, int]:
    distance = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if list(ranks) == [ranks[0] + distance * number for number in range(len(ranks))]:
        return {"first": ranks[0], "distance": distance, "number": len(ranks)}
    return list(ranks)


def _unpacked(packed: list[int] | dict[str, int], most: int) -> tuple[int, ...]:
    number = len(packed) if isinstance(packed, list) else packed["number"]
    if not 1 <= number <= most:
        raise ValueError(f"{number} ranks have slices, and there are {most} files")
    if isinstance(packed, list):
        return tuple(packed)
    return tuple(packed["first"] + packed["distance"] * place for place in range(number))
