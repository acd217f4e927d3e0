"""The contrastive loss over the ranks of a group: exact, tiled, and with no gradient communication.

Source: the symmetric InfoNCE loss of CLIP (Radford et al. 2021, figure 3), here with s_ij = σ I_i·T_j:
    L = 1/B Σ_i [(r_i + c_i)/2 − s_ii],   r_i = logsumexp_j s_ij,   c_j = logsumexp_i s_ij
    ∂L/∂I_i = σ/(2B) Σ_j [exp(s_ij − r_i) + exp(s_ij − c_j) − 2 δ_ij] T_j,   and ∂L/∂T_j its mirror image.
Notable choices:
* Two passes over tiles of logits, no B × B and no rows × B matrix: O(tile² + B·D) memory for "gather",
  O(tile² + B·D/W) for "ring". The second pass computes the logits again, unless they are few enough to keep.
* The first pass reads own images × all texts only. Column sums are completed by two all-reduces of B floats,
  so it needs no second strip; in the second pass the own block serves images and texts at once.
* The pair's own logit stays out of the sums: with n_i the log-sum-exp over j ≠ i, r_i − s_ii = softplus(n_i −
  s_ii) and the pair's weight is −sigmoid(n_i − s_ii). Neither cancels, so the loss keeps its digits where
  pairs are matched almost perfectly and r_i ≈ s_ii ≈ 100. Maxima are subtracted: fp32 exp overflows above 88.
* Embeddings travel, gradients never: every rank computes the whole gradient of its own rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from engine.objectives.contrastive.copies import Copies, shifted
from engine.objectives.contrastive.exchange import Block, RowExchange, Variant, check_variant
from engine.objectives.contrastive.tiles import (
    KEEP_BYTES,
    KeptTiles,
    Tiling,
    accumulate,
    check_pairs,
    compute_dtype,
    inner,
    mask_pairs,
    scalar_beside,
    softmaxes,
    write_pairs,
)


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """The global mean loss, and its gradients with respect to this rank's rows and to the common scale.

    All are tensors on the device of the embeddings, float32 (float64 for float64 embeddings).
    """

    loss: Tensor
    """0-d: mean over the global batch; equal on all ranks."""
    grad_image: Tensor
    """[rows, D]: ∂loss/∂image of this rank's rows; nothing is left to be averaged over ranks."""
    grad_text: Tensor
    """[rows, D]: ∂loss/∂text of this rank's rows."""
    grad_logit_scale: Tensor
    """0-d: ∂loss/∂σ (σ itself, not its logarithm); equal on all ranks."""
    i2t_top1: Tensor
    """0-d: share of images whose own text has the highest logit of all texts; a tie counts as correct."""
    t2i_top1: Tensor
    """0-d: share of texts whose own image has the highest logit of all images; a tie counts as correct."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Parts of the loss by name, 0-d, where it is a sum of several."""


@torch.no_grad()
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    group: dist.ProcessGroup | None = None,
    tile: int | None = None,
    variant: Variant = "gather",
    *,
    row_counts: Sequence[int] | None = None,
    copies: Tensor | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> ContrastiveLoss:
    """Exact contrastive loss of the global batch and its gradients; no autograd graph is read or made.

    image, text: this rank's L2-normalised embeddings [rows, D]; row i of both is one pair. Ranks may hold
    different numbers of rows, also none. logit_scale: σ as a number or 0-d tensor, equal on all ranks.
    group: the ranks whose rows are negatives of each other; None is this process alone, never the default
    group. tile: largest side of a logit tile, in rows; None picks one for the device. variant: "gather" holds
    the embeddings of one tower at a time, "ring" two blocks of them, whose transfer overlaps the compute.
    row_counts: rows of every rank, where known; otherwise one small collective asks, and a GPU waits for it.
    copies: int64 [rows, k], identifiers of this rank's pairs (`engine.objectives.contrastive.copies`): two pairs that
    share one are no negatives of each other, and their logits take no part in sums and accuracies.
    keep_bytes: up to this size, the logits of rows × B are kept for the second pass; beyond, computed again.
    Raises ValueError for shapes, dtypes, counts or options that do not fit.
    """
    check_pairs(image, text)
    check_variant(variant)
    exchange, dtype = RowExchange.create(image, group, row_counts), compute_dtype(image)
    strips = _Strips(
        exchange=exchange,
        image=image,
        text=text,
        scale=scalar_beside(image, logit_scale),
        tiling=Tiling.create(image, tile, own_rows=image.shape[0], largest_block=exchange.largest_block(variant)),
        copies=Copies.gather(exchange, copies),
        kept=KeptTiles(active=image.shape[0] * exchange.total * dtype.itemsize <= keep_bytes),
    )
    text_blocks = exchange.blocks(text, variant)
    rows, columns, own = strips.sums(text_blocks)
    i2t, t2i = _Direction.of(rows, own), _Direction.of(columns.part(exchange.own_rows), own)

    # The weights of a tile are exp(s − r) + exp(s − c), so every rank needs r and c of all pairs.
    normalisers = exchange.gather(torch.stack((i2t.log_sum_exp, t2i.log_sum_exp), dim=1))
    pair_weights = -(i2t.miss + t2i.miss)
    grad_image, grad_text = strips.image_strip(text_blocks, normalisers, pair_weights)
    del text_blocks  # before the images come: one gathered tower at a time
    strips.text_strip(exchange.blocks(image, variant), normalisers, grad_text)

    sums = (0.5 * (i2t.loss + t2i.loss)).sum(), i2t.correct.sum(), t2i.correct.sum()
    slope = 0.5 * inner(grad_image, image, strips.tiling.tile)
    means = exchange.sum_(torch.stack([value.to(own.dtype) for value in (*sums, slope)])) / exchange.total
    factor = strips.scale / (2 * exchange.total)
    return ContrastiveLoss(
        loss=means[0],
        grad_image=grad_image.mul_(factor),
        grad_text=grad_text.mul_(factor),
        grad_logit_scale=means[3],
        i2t_top1=means[1],
        t2i_top1=means[2],
    )


@dataclass(frozen=True, kw_only=True)
class ExpSums:
    """Running sums of exponentials over the rows or columns of logits."""

    maximum: Tensor
    """Highest logit so far."""
    total: Tensor
    """Σ exp(logit − maximum)."""

    @classmethod
    def empty(cls, count: int, like: Tensor) -> "ExpSums":
        """Nothing yet; `like` gives dtype and device."""
        # The lowest finite number and not −inf: −inf − (−inf) is NaN where a tile holds nothing but a pair.
        lowest = torch.finfo(like.dtype).min
        return cls(maximum=like.new_full((count,), lowest), total=like.new_zeros(count))

    def part(self, where: slice) -> "ExpSums":
        """A view of some rows."""
        return ExpSums(maximum=self.maximum[where], total=self.total[where])

    def add(self, tile: Tensor, dim: int, work: Tensor) -> None:
        """Take in a tile of logits, reduced over `dim`; `work` is overwritten."""
        maximum = torch.maximum(self.maximum, tile.amax(dim))
        torch.sub(tile, maximum.unsqueeze(dim), out=work).exp_()
        self.total.mul_((self.maximum - maximum).exp_()).add_(work.sum(dim))
        self.maximum.copy_(maximum)

    def log_sum_exp(self) -> Tensor:
        """log Σ exp(logit); −inf where there is none."""
        return self.total.log() + self.maximum

    def merge(self, exchange: RowExchange) -> None:
        """Combine the sums of all ranks, in place."""
        before = self.maximum.clone()
        exchange.max_(self.maximum)
        exchange.sum_(self.total.mul_(before.sub_(self.maximum).exp_()))


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """Image to text, or text to image: what the sums say of each of this rank's pairs; all [rows]."""

    log_sum_exp: Tensor
    """r (or c): over all logits of the row (column)."""
    miss: Tensor
    """1 − softmax at the pair."""
    loss: Tensor
    """r − s_ii."""
    correct: Tensor
    """Whether the pair's logit is at least every other one."""

    @classmethod
    def of(cls, others: ExpSums, own: Tensor) -> "_Direction":
        """own: s_ii."""
        margin = others.log_sum_exp() - own  # n_i − s_ii; −inf where there is no other
        loss = torch.logaddexp(margin, torch.zeros_like(margin))
        return cls(log_sum_exp=own + loss, miss=margin.sigmoid(), loss=loss, correct=own >= others.maximum)


@dataclass(frozen=True, kw_only=True)
class _Strips:
    """This rank's strips of the logit matrix: own images × all texts, and all images × own texts.

    They meet in the rank's own block, which the image strip computes for both.
    """

    exchange: RowExchange
    image: Tensor
    text: Tensor
    scale: Tensor
    tiling: Tiling
    copies: Copies | None
    kept: KeptTiles

    def sums(self, text_blocks: Iterable[Block]) -> tuple[ExpSums, ExpSums, Tensor]:
        """First pass: sums of the own rows [rows], of all columns [B] over all ranks, and s_ii [rows]."""
        own = self.scale.new_empty(self.image.shape[0])
        rows, columns = ExpSums.empty(len(own), own), ExpSums.empty(self.exchange.total, own)
        for block in text_blocks:
            block_columns, texts = columns.part(block.rows), block.embeddings
            for i, j in self.tiling.cut(len(own), texts.shape[0]):
                keep = self.kept.reserve((i.start, block.rows.start + j.start), i, j, like=own)
                tile = self.tiling.logits_of(self.image[i], texts[j], self.scale, out=keep)
                if block.is_own:
                    mask_pairs(tile, i, j, own)
                self._leave_out(tile, shifted(self.exchange.own_rows, i), shifted(block.rows, j))
                work = self.tiling.work_like(tile)
                rows.part(i).add(tile, 1, work)
                block_columns.part(j).add(tile, 0, work)
        columns.merge(self.exchange)
        return rows, columns, own

    def image_strip(
        self, text_blocks: Iterable[Block], normalisers: Tensor, pair_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Second pass over own images × all texts, normalisers [B, (r, c)].

        Returns Σ weight × embedding of the own images, complete, and of the own texts, over the own images
        only.
        """
        grad_image, grad_text = (self.scale.new_zeros(self.image.shape) for _ in range(2))
        own_r = normalisers[self.exchange.own_rows, 0]
        for block in text_blocks:
            c, texts = normalisers[block.rows, 1], block.embeddings
            for i, j in self.tiling.cut(len(own_r), texts.shape[0]):
                tile = self.kept.take((i.start, block.rows.start + j.start))
                if tile is None:
                    tile = self.tiling.logits_of(self.image[i], texts[j], self.scale)
                    self._leave_out(tile, shifted(self.exchange.own_rows, i), shifted(block.rows, j))
                weights = softmaxes(tile, own_r[i], c[j], self.tiling.work_like(tile))
                if block.is_own:
                    write_pairs(weights, i, j, pair_weights)
                    accumulate(grad_text[j], weights.t(), self.image[i])
                accumulate(grad_image[i], weights, texts[j])
        return grad_image, grad_text

    def text_strip(self, image_blocks: Iterable[Block], normalisers: Tensor, grad_text: Tensor) -> None:
        """Second pass over the other ranks' images × own texts, added to `grad_text`."""
        own_c = normalisers[self.exchange.own_rows, 1]
        for block in image_blocks:
            if block.is_own:
                continue
            r, images = normalisers[block.rows, 0], block.embeddings
            for i, j in self.tiling.cut(images.shape[0], len(own_c)):
                tile = self.tiling.logits_of(images[i], self.text[j], self.scale)
                self._leave_out(tile, shifted(block.rows, i), shifted(self.exchange.own_rows, j))
                weights = softmaxes(tile, r[i], own_c[j], self.tiling.work_like(tile))
                accumulate(grad_text[j], weights.t(), images[i])

    def _leave_out(self, tile: Tensor, images: slice, texts: slice) -> None:
        if self.copies is not None:
            self.copies.leave_out(tile, images, texts)
