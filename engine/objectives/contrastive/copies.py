"""Pairs of a global batch that say the same, and therefore are no negatives of each other.

A batch of a hundred thousand pairs from the web holds the same caption, or the same picture, more than once. The loss
would push a picture away from a caption that describes it. With `train.mask_false_negatives` pairs are told by
identifiers of 64 bits, one column a kind: two pairs that share one leave each other's logits out of the sums, exactly
over the global batch, whichever ranks they lie on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.order.stateless import bits
from engine.objectives.contrastive.exchange import RowExchange


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The identifiers of all pairs of the global batch."""

    of_all: Tensor
    """int64 [k, B], one row a kind."""

    @classmethod
    def gather(cls, exchange: RowExchange, own: Tensor | None) -> "Copies | None":
        """own: int64 [rows, k] of this rank's pairs, or None on every rank. Collective. Raises ValueError for another
        shape.
        """
        if own is None:
            return None
        rows = exchange.counts[exchange.rank]
        if own.ndim != 2 or own.shape[0] != rows or own.dtype != torch.int64:
            raise ValueError(f"copies is {own.dtype} {tuple(own.shape)}; give int64 [{rows}, kinds]")
        return cls(of_all=exchange.gather(own).t().contiguous())

    def leave_out(self, tile: Tensor, images: slice, texts: slice) -> None:
        """Set the logits of pairs that share an identifier to -inf, in place; the pair's own logit is among them.

        tile: [m, n]. images, texts: where its rows and columns lie in the global order.
        """
        for kind in self.of_all:
            tile.masked_fill_(kind[images, None] == kind[None, texts], float("-inf"))


def shifted(block: slice, part: slice) -> slice:
    """The rows `part` of a block, in the global order."""
    return slice(block.start + part.start, block.start + part.stop)


def caption_ids(tokens: Tensor) -> Tensor:
    """tokens: int64 [rows, context] -> int64 [rows], equal for equal captions (as far as the context reaches).

    A sum of the tokens with random 64-bit weights: two other captions share one with a chance of about 2^-48 at most.
    """
    weights = bits(0, "caption identifier", np.arange(tokens.shape[1]), 1)[:, 0] | np.uint64(1)
    return (tokens * torch.from_numpy(weights.view(np.int64)).to(tokens.device)).sum(1)
