"""Coordinates of the parts that checkpoints store: a flat range of a rectangular slice of a logical tensor.

Tensor parallelism gives a rank the slice [offset, offset + length) along one dimension; the sharded optimizer gives it
elements [start, stop) of that slice, flattened. Both are coordinates in the logical tensor, so a part written at one
layout can be read at any other: parts of one tensor are compared as sets of rectangles of a matrix [rows before the
split dimension, everything after].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_SPAN_BYTES = 16 * 2**20
"""Largest span of a strided source that is read at once."""
_WORTH_A_READ_BYTES = 64 * 2**10
"""Row pieces at least this long are read one by one; shorter ones are cut from a span that holds many."""


class Rectangle(NamedTuple):
    """Rows [top, bottom) x columns [left, right) of the matrix view of a logical tensor."""

    top: int
    bottom: int
    left: int
    right: int

    def overlap(self, other: "Rectangle") -> "Rectangle | None":
        """The common rectangle, None if it is empty."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rectangle(top, bottom, left, right) if top < bottom and left < right else None


@dataclass(frozen=True)
class FlatSlice:
    """Elements [start, stop) of the flattened slice [offset, offset + length) along `dim` of a tensor of `shape`."""

    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    dim: int | None
    """Dimension that is cut; None: the slice is the whole tensor, offset and length 0."""
    offset: int
    length: int
    start: int
    stop: int

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "FlatSlice":
        """All of a tensor."""
        return FlatSlice(shape, None, 0, 0, 0, math.prod(shape))

    @staticmethod
    def of_rank(shape: tuple[int, ...], dim: int | None, rank: int, size: int) -> "FlatSlice":
        """All of the slice of tensor rank `rank` of `size`; the whole tensor where it is not cut."""
        if dim is None or size == 1:
            return FlatSlice.whole(shape)
        length = shape[dim] // size
        return FlatSlice(shape, dim, rank * length, length, 0, math.prod(shape) // size)

    def part(self, start: int, stop: int) -> "FlatSlice":
        """Elements [start, stop) of the same slice."""
        return FlatSlice(self.shape, self.dim, self.offset, self.length, start, stop)

    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    def extract(self, tensor: Tensor) -> Tensor:
        """These elements of the whole logical tensor, 1-D."""
        if self.dim is not None:
            tensor = tensor.narrow(self.dim, self.offset, self.length)
        return tensor.reshape(-1)[self.start : self.stop]

    def columns(self, dim: int | None) -> tuple[int, int]:
        """(first column, number of columns) of the slice in the matrix view cut before `dim`."""
        if self.dim is None:
            return 0, math.prod(self.shape[dim or 0 :])
        inner = math.prod(self.shape[self.dim + 1 :])
        return self.offset * inner, self.length * inner

    def rectangles(self, dim: int | None) -> list[Rectangle]:
        """At most three: the end of a row, whole rows, the beginning of a row."""
        left, width = self.columns(dim)
        out, position = [], self.start
        while position < self.stop:
            row, column = divmod(position, width)
            rows = 1 if column else max(1, (self.stop - position) // width)
            end = min(self.stop, row * width + width * rows)
            last = (end - 1) % width + 1 if rows == 1 else width
            out.append(Rectangle(row, row + rows, left + column, left + last))
            position = end
        return out


class RangeReader(Protocol):
    """Fills `out` with stored elements from `start` on, counted within the stored part."""

    def __call__(self, out: Tensor, start: int) -> None: ...


def _view_dim(a: FlatSlice, b: FlatSlice) -> int | None:
    if a.dim is not None and b.dim is not None and a.dim != b.dim:
        raise ValueError(f"a tensor of shape {a.shape} is cut along dimension {a.dim} here and {b.dim} there")
    return a.dim if a.dim is not None else b.dim


def copy_overlap(out: Tensor, wanted: FlatSlice, stored: FlatSlice, read: RangeReader) -> int:
    """Copy the elements that `wanted` and `stored` share into `out`; returns how many.

    out: 1-D [wanted.numel()], contiguous on the CPU, of the stored dtype. read: reads within the stored part.
    """
    dim, copied = _view_dim(wanted, stored), 0
    for mine in wanted.rectangles(dim):
        for theirs in stored.rectangles(dim):
            common = mine.overlap(theirs)
            if common is not None:
                _copy_rectangle(out, wanted, stored, read, common, dim)
                copied += (common.bottom - common.top) * (common.right - common.left)
    return copied


def _position(part: FlatSlice, row: int, column: int, dim: int | None) -> int:
    left, width = part.columns(dim)
    return row * width + column - left - part.start


def _copy_rectangle(
    out: Tensor, wanted: FlatSlice, stored: FlatSlice, read: RangeReader, common: Rectangle, dim: int | None
) -> None:
    width = common.right - common.left
    target_stride, source_stride = wanted.columns(dim)[1], stored.columns(dim)[1]
    for top, bottom in _row_blocks(common, target_stride, source_stride, out.element_size()):
        rows = bottom - top
        target = _position(wanted, top, common.left, dim)
        source = _position(stored, top, common.left, dim)
        if rows == 1 or target_stride == source_stride == width:
            read(out[target : target + rows * width], source)
            continue
        span = torch.empty((rows - 1) * source_stride + width, dtype=out.dtype)
        read(span, source)
        out[target:].as_strided((rows, width), (target_stride, 1)).copy_(
            span.as_strided((rows, width), (source_stride, 1))
        )


def _row_blocks(common: Rectangle, target_stride: int, source_stride: int, item: int) -> Iterator[tuple[int, int]]:
    """Rows that one read covers."""
    width, rows = common.right - common.left, common.bottom - common.top
    if target_stride == source_stride == width:
        step = rows
    elif width < source_stride and width * item >= _WORTH_A_READ_BYTES:
        step = 1
    else:
        step = max(1, _SPAN_BYTES // (source_stride * item))
    for top in range(common.top, common.bottom, step):
        yield top, min(top + step, common.bottom)
