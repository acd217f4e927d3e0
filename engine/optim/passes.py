"""Passes over long vectors: by parts that stay near a CPU core, and sums of their bits while such a part is there.

A bit that memory forgets changes the sum of a vector's bits. To read a whole vector for it costs what memory costs; of
the parts that an update has just written it costs a third.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CACHED_ELEMENTS = 1 << 18
"""Three fp32 vectors of so many elements (3 MB) stay near one CPU core; more and smaller parts cost more calls."""

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_NEAR_BYTES = 1 << 20
"""What has been written last stays near one CPU core up to about this size."""


def in_cache(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of vectors of one length, short enough for the passes over them to hit the cache (GPU: one part)."""
    size = _CACHED_ELEMENTS if _is_near_a_core(flats[0]) else max(1, flats[0].numel())
    return zip(*(flat.split(size) for flat in flats), strict=True)


def _is_near_a_core(flat: Tensor) -> bool:
    """Whether parts of it can be: not on a GPU, and not of what only stands for a vector of one, as in a dry run."""
    return flat.is_cpu and type(flat) is Tensor


def sum_of_bits(values: Tensor) -> Tensor:
    """Sum of the bits as integers, modulo 2^64, 0-d: a flipped bit changes it by a power of two."""
    return words_of(values).sum(dtype=torch.int64)


def words_of(values: Tensor, part: slice = slice(None)) -> Tensor:
    """The bits as integers, 1-D: eight bytes each where they lie so, whose sums take a tenth of the time.

    part: elements that have to be among them; a word more may be at either end.
    """
    flat = values.detach().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    words = flat.view(torch.int64 if whole else _WORDS[size])
    elements = words.element_size() // size
    start, stop, _ = part.indices(flat.numel())
    return words[start // elements : -(-stop // elements)]


class Tally:
    """Sums the bits of a vector along with a pass over it, from its beginning to its end."""

    def __init__(self, flat: Tensor, words: Tensor | None = None, *, wanted: bool = True):
        """words: of the vector, where they are known. wanted: otherwise nothing is read."""
        self._words = words = words_of(flat) if words is None else words
        self._elements = words.element_size() // flat.element_size()
        self._near = _NEAR_BYTES // words.element_size() if _is_near_a_core(flat) else words.numel()
        self._wanted, self._summed = wanted, 0
        self.sums: list[Tensor] = []
        """Sums of the parts so far, 0-d."""

    def up_to(self, elements: int, *, all_of_them: bool = False) -> None:
        """The first so many elements may be read from now on. all_of_them: and not much longer."""
        stop = elements // self._elements
        if self._wanted and (all_of_them or stop - self._summed >= self._near):
            self._add(stop)

    def end(self) -> None:
        """All of them may."""
        if self._wanted and (self._summed < self._words.numel() or not self.sums):
            self._add(self._words.numel())

    def _add(self, stop: int) -> None:
        self.sums.append(self._words[self._summed : stop].sum(dtype=torch.int64))
        self._summed = stop


def total(tallies: Sequence[Tally]) -> Tensor:
    """The sum of all their vectors as `sum_of_bits` has it, 0-d: passes over them have ended."""
    for tally in tallies:
        tally.end()
    return torch.stack([part for tally in tallies for part in tally.sums]).sum()
