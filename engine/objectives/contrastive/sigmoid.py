"""The pairwise sigmoid loss over the ranks of a group, in the tiled form of the contrastive loss.

Source: SigLIP (Zhai et al. 2023, equation 1), with l_ij = σ I_i·T_j + β and z_ij = 1 for pairs, −1 otherwise:
    L = 1/B Σ_ij softplus(−z_ij l_ij),   ∂L/∂l_ij = 1/B [sigmoid(l_ij) − δ_ij]
No logit needs another, so one pass over the own images × all texts is enough for the loss; a second strip,
all images × own texts without the own block, completes the gradient of the texts with no gradient
communication.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from engine.objectives.contrastive.copies import Copies, shifted
from engine.objectives.contrastive.exchange import Block, RowExchange, Variant, check_variant
from engine.objectives.contrastive.tiles import (
    Tiling,
    accumulate,
    check_pairs,
    compute_dtype,
    inner,
    mask_pairs,
    scalar_beside,
    write_pairs,
)


@dataclass(frozen=True, kw_only=True)
class SigmoidLoss:
    """The global loss, and its gradients with respect to this rank's rows and to the common scale and bias.

    All are tensors on the device of the embeddings, float32 (float64 for float64 embeddings).
    """

    loss: Tensor
    """0-d: sum over all B × B logits divided by B; equal on all ranks."""
    grad_image: Tensor
    """[rows, D]: ∂loss/∂image of this rank's rows; nothing is left to be averaged over ranks."""
    grad_text: Tensor
    """[rows, D]: ∂loss/∂text of this rank's rows."""
    grad_logit_scale: Tensor
    """0-d: ∂loss/∂σ (σ itself, not its logarithm); equal on all ranks."""
    grad_bias: Tensor
    """0-d: ∂loss/∂β; equal on all ranks."""
    i2t_top1: Tensor
    """0-d: share of images whose own text has the highest logit of all texts; a tie counts as correct."""
    t2i_top1: Tensor
    """0-d: share of texts whose own image has the highest logit of all images; a tie counts as correct."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Parts of the loss by name, 0-d, where it is a sum of several."""


@torch.no_grad()
def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    group: dist.ProcessGroup | None = None,
    tile: int | None = None,
    variant: Variant = "gather",
    *,
    row_counts: Sequence[int] | None = None,
    copies: Tensor | None = None,
) -> SigmoidLoss:
    """Exact sigmoid loss of the global batch and its gradients; no autograd graph is read or made.

    image, text: this rank's L2-normalised embeddings [rows, D]; row i of both is one pair. logit_scale,
    logit_bias: σ and β as numbers or 0-d tensors, equal on all ranks. The other arguments, the groups and the
    errors are those of engine.loss.contrastive_loss.
    """
    check_pairs(image, text)
    check_variant(variant)
    exchange = RowExchange.create(image, group, row_counts)
    dtype = compute_dtype(image)
    pairs = _SigmoidStrips(
        exchange=exchange,
        image=image,
        text=text,
        scale=scalar_beside(image, logit_scale),
        bias=scalar_beside(image, logit_bias),
        tiling=Tiling.create(image, tile, own_rows=image.shape[0], largest_block=exchange.largest_block(variant)),
        copies=Copies.gather(exchange, copies),
    )
    sums = _Sums.empty(pairs)
    pairs.image_strip(exchange.blocks(text, variant), sums)
    pairs.text_strip(exchange.blocks(image, variant), sums)

    exchange.max_(sums.best_column)
    totals = (
        sums.loss,
        sums.weight,
        inner(sums.grad_image, image, pairs.tiling.tile),
        (sums.own >= sums.best_row).sum(),
        (sums.own >= sums.best_column[exchange.own_rows]).sum(),
    )
    means = exchange.sum_(torch.stack([value.to(dtype) for value in totals])) / exchange.total
    factor = pairs.scale / exchange.total
    return SigmoidLoss(
        loss=means[0],
        grad_image=sums.grad_image.mul_(factor),
        grad_text=sums.grad_text.mul_(factor),
        grad_logit_scale=means[2],
        grad_bias=means[1],
        i2t_top1=means[3],
        t2i_top1=means[4],
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What the tiles add up to on this rank."""

    loss: Tensor
    """0-d: Σ softplus(−z l)."""
    weight: Tensor
    """0-d: Σ ∂/∂l, the gradient of the bias."""
    grad_image: Tensor
    grad_text: Tensor
    own: Tensor
    """[rows]: logits of the own pairs."""
    best_row: Tensor
    """[rows]: highest logit of each own image with another's text."""
    best_column: Tensor
    """[B]: highest logit of each text with another's image among the own ones."""

    @classmethod
    def empty(cls, strips: "_SigmoidStrips") -> "_Sums":
        zero, (rows, _) = strips.scale.new_zeros(()), strips.image.shape
        return cls(
            loss=zero.clone(),
            weight=zero.clone(),
            grad_image=zero.new_zeros(strips.image.shape),
            grad_text=zero.new_zeros(strips.image.shape),
            own=zero.new_empty(rows),
            best_row=zero.new_full((rows,), float("-inf")),
            best_column=zero.new_full((strips.exchange.total,), float("-inf")),
        )

    def add_logits(self, tile: Tensor, i: slice, columns: Tensor, work: Tensor) -> None:
        """Loss and maxima of a tile whose pairs are masked; columns: its part of best_column."""
        self.loss.add_(torch.logaddexp(tile, tile.new_zeros(()), out=work).sum())
        torch.maximum(self.best_row[i], tile.amax(1), out=self.best_row[i])
        torch.maximum(columns, tile.amax(0), out=columns)


@dataclass(frozen=True, kw_only=True)
class _SigmoidStrips:
    """This rank's strips of the logit matrix: own images × all texts, and other images × own texts."""

    exchange: RowExchange
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    tiling: Tiling
    copies: Copies | None

    def image_strip(self, text_blocks: Iterable[Block], sums: _Sums) -> None:
        """Loss, maxima and all that the own images and the own block give."""
        for block in text_blocks:
            block_columns, texts = sums.best_column[block.rows], block.embeddings
            for i, j in self.tiling.cut(self.image.shape[0], texts.shape[0]):
                tile = self.tiling.logits_of(self.image[i], texts[j], self.scale).add_(self.bias)
                if block.is_own:
                    mask_pairs(tile, i, j, sums.own)
                self._leave_out(tile, shifted(self.exchange.own_rows, i), shifted(block.rows, j))
                sums.add_logits(tile, i, block_columns[j], self.tiling.work_like(tile))
                weights = tile.sigmoid_()
                if block.is_own:
                    write_pairs(weights, i, j, -(-sums.own).sigmoid())
                    accumulate(sums.grad_text[j], weights.t(), self.image[i])
                accumulate(sums.grad_image[i], weights, texts[j])
                sums.weight.add_(weights.sum())
        sums.loss.add_(torch.logaddexp(-sums.own, self.scale.new_zeros(())).sum())

    def text_strip(self, image_blocks: Iterable[Block], sums: _Sums) -> None:
        """What the other ranks' images give to the own texts."""
        for block in image_blocks:
            if block.is_own:
                continue
            images = block.embeddings
            for i, j in self.tiling.cut(images.shape[0], self.text.shape[0]):
                tile = self.tiling.logits_of(images[i], self.text[j], self.scale).add_(self.bias)
                self._leave_out(tile, shifted(block.rows, i), shifted(self.exchange.own_rows, j))
                accumulate(sums.grad_text[j], tile.sigmoid_().t(), images[i])

    def _leave_out(self, tile: Tensor, images: slice, texts: slice) -> None:
        if self.copies is not None:
            self.copies.leave_out(tile, images, texts)
