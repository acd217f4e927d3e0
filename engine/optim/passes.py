"""Passes over long vectors: by blocks that stay near a CPU core, and their bits as words that can be summed.

A bit that memory forgets changes the sum of a vector's bits. To read a whole vector for it costs what memory costs; of
a block that an update needs anyway, or has just written, it costs a third.
"""

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Four fp32 vectors of so many elements (4 MB) stay near one CPU core; more and smaller blocks cost more calls."""

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def is_near_a_core(flat: Tensor) -> bool:
    """Whether parts of it can be: not on a GPU, and not of what only stands for a vector of one, as in a dry run."""
    return flat.is_cpu and type(flat) is Tensor


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
