"""Coordinates: any cut of a tensor, read from any other cut of it."""

import random
from itertools import pairwise

import pytest
import torch

from engine.checkpoint.format import flat_slice
from engine.checkpoint.format.flat_slice import FlatSlice, copy_overlap


def cuts(shape: tuple[int, ...], dim: int, ranks: int, borders: int, draw: random.Random) -> list[FlatSlice]:
    """The tensor cut over tensor ranks, and each slice at random places of its flattened elements."""
    out = []
    for rank in range(ranks):
        whole = FlatSlice.of_rank(shape, dim, rank, ranks)
        at = sorted({0, whole.numel(), *(draw.randrange(whole.numel()) for _ in range(borders))})
        out += [whole.part(a, b) for a, b in pairwise(at)]
    return out


@pytest.mark.parametrize("span_bytes", [4, 64, 2**20])
@pytest.mark.parametrize("long_row_bytes", [4, 2**20])
def test_any_cut_is_read_from_any_other(span_bytes: int, long_row_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes at which reading goes by span or by row."""
    monkeypatch.setattr(flat_slice, "_SPAN_BYTES", span_bytes)
    monkeypatch.setattr(flat_slice, "_WORTH_A_READ_BYTES", long_row_bytes)
    draw = random.Random(span_bytes + long_row_bytes)
    for _ in range(60):
        shape = draw.choice([(8, 12), (12,), (4, 8, 12), (24, 4)])
        dim = draw.randrange(len(shape))
        degrees = [n for n in (1, 2, 4) if shape[dim] % n == 0]
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        wanted = cuts(shape, dim, draw.choice(degrees), draw.randrange(4), draw)
        stored = cuts(shape, dim, draw.choice(degrees), draw.randrange(4), draw)
        for part in wanted:
            out = torch.full((part.numel(),), -1)
            copied = sum(copy_overlap(out, part, other, reader(other, tensor)) for other in stored)
            assert copied == part.numel() and out.equal(part.extract(tensor))


def reader(stored: FlatSlice, tensor: torch.Tensor):
    values = stored.extract(tensor).clone()

    def read(out: torch.Tensor, start: int) -> None:
        out.copy_(values[start : start + len(out)])

    return read


def test_two_cuts_along_different_dimensions_are_refused() -> None:
    one, other = FlatSlice.of_rank((4, 4), 0, 0, 2), FlatSlice.of_rank((4, 4), 1, 0, 2)
    with pytest.raises(ValueError, match="dimension 0 here and 1 there"):
        copy_overlap(torch.empty(8), one, other, lambda out, start: None)
