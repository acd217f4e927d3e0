"""Tiles of the logit matrix: how a block of image rows × text rows is cut, multiplied and reduced.

No collective in this file. A block is two sets of rows, images [m, D] and texts [n, D]; a tile is the logits
of at most `tile` × `tile` of their pairs, in the compute dtype (float64 for float64 embeddings, else
float32). Two reused buffers hold a tile and its work space, because a fresh allocation of megabytes costs
page faults each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Sides at which a tile stays in the cache of a CPU core while the products still run at full speed; a GPU
# wants fewer and larger kernels.
DEFAULT_TILE_CPU = 1024
DEFAULT_TILE_CUDA = 8192
KEEP_BYTES = 64 * 2**20


def compute_dtype(embeddings: Tensor) -> torch.dtype:
    """float64 stays float64; the rest gets float32 logits (bfloat16 has steps of 0.5 near 100)."""
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def scalar_beside(embeddings: Tensor, value: float | Tensor | None) -> Tensor:
    """A number in the logits' dtype, 0-d; one of the host goes along with a launch: no copy that the host waits for."""
    if isinstance(value, Tensor):
        return value.to(embeddings.device, compute_dtype(embeddings))
    assert value is not None, "what is not learned is fixed"
    return torch.full((), value, dtype=compute_dtype(embeddings), device=embeddings.device)


def check_pairs(image: Tensor, text: Tensor) -> None:
    """Raise ValueError unless image and text are both [rows, D] with one dtype and device."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must both be [rows, D] of the pairs")
    if image.dtype != text.dtype or image.device != text.device:
        raise ValueError(
            f"image is {image.dtype} on {image.device}, text {text.dtype} on {text.device}; make them equal"
        )
    if not image.is_floating_point():
        raise ValueError(f"embeddings must be floating point, not {image.dtype}")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The cut of a block into tiles, and the two buffers they are computed in."""

    tile: int
    """Largest number of image rows, and of text rows, of one tile; one of the two is of this rank alone."""
    logits: Tensor
    """Flat buffer for the logits of one tile."""
    work: Tensor
    """Flat buffer of the same size for exponentials."""

    @classmethod
    def create(cls, image: Tensor, tile: int | None, *, own_rows: int, largest_block: int) -> "Tiling":
        """Buffers for own_rows × blocks of up to `largest_block` rows; tile=None picks it for the device."""
        if tile is None:
            tile = DEFAULT_TILE_CUDA if image.is_cuda else DEFAULT_TILE_CPU
        if tile < 1:
            raise ValueError(f"tile is {tile}; give the rows of a tile, at least 1")
        elements = min(tile, own_rows) * min(tile, largest_block)
        buffers = torch.empty(2, elements, dtype=compute_dtype(image), device=image.device)
        return cls(tile=tile, logits=buffers[0], work=buffers[1])

    def cut(self, image_rows: int, text_rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield (image rows, text rows) of every tile of a block."""
        for text_start in range(0, text_rows, self.tile):
            columns = slice(text_start, min(text_start + self.tile, text_rows))
            for image_start in range(0, image_rows, self.tile):
                yield slice(image_start, min(image_start + self.tile, image_rows)), columns

    def work_like(self, tile: Tensor) -> Tensor:
        """The work buffer in the shape of a tile."""
        return self.work[: tile.numel()].view(tile.shape)

    def logits_of(self, image: Tensor, text: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """scale · image · textᵀ [m, n] in `out`, or in the reused buffer, which the next call overwrites."""
        if out is None:
            out = self.logits[: image.shape[0] * text.shape[0]].view(image.shape[0], text.shape[0])
        if image.is_cuda and out.dtype == torch.float32:
            _add_products(out.zero_(), image, text.t())
        else:
            torch.mm(image.to(out.dtype), text.to(out.dtype).t(), out=out)
        return out.mul_(scale)


@dataclass(frozen=True, kw_only=True)
class KeptTiles:
    """Logits of the first pass that the second pass takes over: the whole strip where it is small, else none."""

    active: bool
    """Whether tiles are kept at all."""
    tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Logits by (first image row, first text row of the global batch)."""

    def reserve(self, key: tuple[int, int], rows: slice, columns: slice, like: Tensor) -> Tensor | None:
        """A tensor for a tile to be computed into and kept, or None when nothing is kept."""
        if not self.active:
            return None
        self.tiles[key] = like.new_empty(rows.stop - rows.start, columns.stop - columns.start)
        return self.tiles[key]

    def take(self, key: tuple[int, int]) -> Tensor | None:
        """The kept logits, handed over for good, or None."""
        return self.tiles.pop(key, None)


def accumulate(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """total [m, D] += weights [m, n] · rows [n, D], in the dtype of `total`.

    On a GPU the weights of bfloat16 embeddings are rounded to bfloat16 for the tensor cores; the sum is
    float32.
    """
    if rows.is_cuda and total.dtype == torch.float32:
        _add_products(total, weights.to(rows.dtype), rows)
    else:
        total.addmm_(weights, rows.to(total.dtype))


def inner(a: Tensor, b: Tensor, step: int) -> Tensor:
    """Σ a_id · b_id over [rows, D], 0-d; `step` rows at a time, so that no [rows, D] product is made."""
    total = torch.zeros((), dtype=a.dtype, device=a.device)
    for start in range(0, a.shape[0], step):
        total += (a[start : start + step] * b[start : start + step]).sum()
    return total


def softmaxes(tile: Tensor, r: Tensor, c: Tensor, work: Tensor) -> Tensor:
    """exp(s − r) + exp(s − c) of a tile of logits, written over them; r [m], c [n]: log-sum-exps of rows and columns.

    work: of the tile's shape, overwritten.
    """
    by_row = torch.sub(tile, r.unsqueeze(1), out=work).exp_()
    return tile.sub_(c).exp_().add_(by_row)


def mask_pairs(tile: Tensor, image_rows: slice, text_rows: slice, own: Tensor) -> None:
    """Move the logits of the pairs (i, i) inside a tile of the rank's own block to `own`, leaving −inf."""
    diagonal, pairs = _pairs(tile, image_rows, text_rows)
    own[pairs] = diagonal
    diagonal.fill_(float("-inf"))


def write_pairs(tile: Tensor, image_rows: slice, text_rows: slice, values: Tensor) -> None:
    """Set the entries of the pairs (i, i) inside a tile of the rank's own block to values[i]."""
    diagonal, pairs = _pairs(tile, image_rows, text_rows)
    diagonal.copy_(values[pairs])


def _pairs(tile: Tensor, image_rows: slice, text_rows: slice) -> tuple[Tensor, slice]:
    """A view of the pairs' entries in a tile, and which rows they are; both may be empty."""
    start = max(image_rows.start, text_rows.start)
    stop = max(start, min(image_rows.stop, text_rows.stop))
    rows = slice(start - image_rows.start, stop - image_rows.start)
    columns = slice(start - text_rows.start, stop - text_rows.start)
    return tile[rows, columns].diagonal(), slice(start, stop)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32 on a GPU's tensor cores, which multiply bfloat16 exactly."""
    for left, right in bfloat16_factors(a, b):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def bfloat16_factors(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Factors in bfloat16 whose products add up to a b: a and b themselves, or for float32 three pairs of halves.

    A float32 number is its bfloat16 and that of the rest, but for 2^-17 of it; the product of two rests is left out. At
    a scale of 100 that is an error of 6e-5 in a logit, where a float32 product has 2e-5 (tests/engine/test_loss.py).
    """
    if a.dtype == torch.bfloat16:
        return [(a, b)]
    (a_high, a_rest), (b_high, b_rest) = _halves(a), _halves(b)
    return [(a_rest, b_high), (a_high, b_rest), (a_high, b_high)]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()
