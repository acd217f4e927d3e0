"""The relational loss: the student's similarities within the global batch shall be distributed as the teacher's.

Source: contrastive relational distillation of CLIP-KD (Yang et al. 2024, arXiv 2307.12732, section 3). With the
student's logits s_ij = σ I_i·T_j, the teacher's t_ij = τ I'_i·T'_j, their softmaxes by row p, q and by column p', q':
    L = 1/(2B) [Σ_i KL(q_i· ‖ p_i·) + Σ_j KL(q'_·j ‖ p'_·j)]
      = 1/(2B) [Σ_ij (q_ij + q'_ij) (t_ij − s_ij) + Σ_i (r_i − r'_i) + Σ_j (c_j − c'_j)],
    ∂L/∂s_ij = 1/(2B) (p_ij + p'_ij − q_ij − q'_ij),
where r, c are the log-sum-exps of the student's rows and columns, r', c' the teacher's. Two passes over tiles as in
softmax.py: no B × B matrix, and embeddings travel, gradients never. Embeddings of student and teacher travel side by
side, so their widths may differ.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.objectives.contrastive.copies import Copies, shifted
from engine.objectives.contrastive.exchange import Block, RowExchange, Variant, check_variant
from engine.objectives.contrastive.softmax import ExpSums
from engine.objectives.contrastive.tiles import (
    Tiling,
    accumulate,
    check_pairs,
    inner,
    mask_pairs,
    scalar_beside,
    softmaxes,
    write_pairs,
)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term beside the contrastive loss, and its gradients with respect to this rank's rows and to the scale σ."""

    loss: Tensor
    """0-d: of the global batch; equal on all ranks."""
    grad_image: Tensor
    """[rows, D]: ∂loss/∂image of this rank's rows; nothing is left to be averaged over ranks."""
    grad_text: Tensor
    """[rows, D]: ∂loss/∂text of this rank's rows."""
    grad_logit_scale: Tensor
    """0-d: ∂loss/∂σ; equal on all ranks."""


@torch.no_grad()
def relational_loss(
    image: Tensor,
    text: Tensor,
    teacher: tuple[Tensor, Tensor],
    logit_scale: Tensor | float,
    teacher_scale: float,
    group: dist.ProcessGroup | None = None,
    tile: int | None = None,
    variant: Variant = "gather",
    *,
    row_counts: Sequence[int] | None = None,
    copies: Tensor | None = None,
) -> Term:
    """Exact relational loss of the global batch and its gradients; no autograd graph is read or made.

    image, text: the student's L2-normalised embeddings [rows, D]. teacher: its (images, texts) of the same pairs
    [rows, E]. logit_scale, teacher_scale: σ and τ. The other arguments, the groups and the errors are those of
    `contrastive_loss`; pairs that share an identifier of `copies` are left out of both distributions.
    """
    check_pairs(image, text)
    check_pairs(*teacher)
    check_variant(variant)
    exchange = RowExchange.create(image, group, row_counts)
    student, taught = (
        _Side(
            image=images,
            text=texts,
            scale=scalar_beside(image, scale),
            columns=slice(first, first + images.shape[1]),
            tiling=Tiling.create(image, tile, own_rows=image.shape[0], largest_block=exchange.largest_block(variant)),
        )
        for images, texts, scale, first in ((image, text, logit_scale, 0), (*teacher, teacher_scale, image.shape[1]))
    )
    strips = _Strips.of(exchange, (student, taught), copies)
    all_texts = exchange.blocks(strips.texts, variant)
    sums = strips.sums(all_texts)
    normalisers = exchange.gather(torch.stack(sums, dim=1))  # [B, (r, c, r', c')]
    loss, grad_image, grad_text = strips.image_strip(all_texts, normalisers)
    del all_texts  # before the images come: one gathered tower at a time
    strips.text_strip(exchange.blocks(strips.images, variant), normalisers, grad_text)

    r, c, of_teacher_r, of_teacher_c = sums
    loss += (r - of_teacher_r + c - of_teacher_c).sum()
    slope = inner(grad_image, image, student.tiling.tile)
    totals = exchange.sum_(torch.stack([loss, slope])) / (2 * exchange.total)
    factor = student.scale / (2 * exchange.total)
    return Term(
        loss=totals[0],
        grad_image=grad_image.mul_(factor),
        grad_text=grad_text.mul_(factor),
        grad_logit_scale=totals[1],
    )


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Student or teacher: this rank's rows, the scale of its logits, and the buffers of its tiles."""

    image: Tensor
    text: Tensor
    scale: Tensor
    columns: slice
    """Where its embeddings lie in rows side by side."""
    tiling: Tiling


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tile lies."""

    i: slice
    j: slice
    """Rows and columns within the block."""
    rows: slice
    columns: slice
    """The same in the global order."""
    is_own: bool
    """Whether images and texts are both this rank's: the pairs themselves are among them."""


@dataclass(frozen=True, kw_only=True)
class _Strips:
    """This rank's strips of both logit matrices: own images × all texts, and all images × own texts."""

    exchange: RowExchange
    sides: tuple[_Side, _Side]
    """Student, teacher."""
    images: Tensor
    texts: Tensor
    """This rank's rows of both, side by side [rows, D + E]."""
    copies: Copies | None

    @classmethod
    def of(cls, exchange: RowExchange, sides: tuple[_Side, _Side], copies: Tensor | None) -> "_Strips":
        """copies: this rank's. Collective where there are some."""
        dtype = sides[0].image.dtype
        return cls(
            exchange=exchange,
            sides=sides,
            images=torch.cat([side.image.to(dtype) for side in sides], dim=1),
            texts=torch.cat([side.text.to(dtype) for side in sides], dim=1),
            copies=Copies.gather(exchange, copies),
        )

    def sums(self, text_blocks: Iterable[Block]) -> list[Tensor]:
        """First pass: r, c, r', c' of this rank's pairs, each [rows]."""
        like, own = self.sides[0].scale, self.exchange.own_rows
        by_row = [ExpSums.empty(len(self.images), like) for _ in self.sides]
        by_column = [ExpSums.empty(self.exchange.total, like) for _ in self.sides]
        for block in text_blocks:
            for at in self._strip_of_images(block):
                tiles = self._logits(self.images[at.i], block.embeddings[at.j])
                for side, tile, rows, columns in zip(self.sides, tiles, by_row, by_column, strict=True):
                    self._leave_out(tile, at)
                    work = side.tiling.work_like(tile)
                    rows.part(at.i).add(tile, 1, work)
                    columns.part(at.columns).add(tile, 0, work)
        for columns in by_column:
            columns.merge(self.exchange)
        both = zip(by_row, by_column, strict=True)
        return [sums.log_sum_exp() for rows, columns in both for sums in (rows, columns.part(own))]

    def image_strip(self, text_blocks: Iterable[Block], normalisers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second pass over own images × all texts: Σ (q + q')(t − s), Σ weight × embedding of the own images, complete,
        and of the own texts, over the own images only.
        """
        student = self.sides[0]
        grad_image, grad_text = (student.scale.new_zeros(student.image.shape) for _ in range(2))
        loss = student.scale.new_zeros(())
        for block in text_blocks:
            for at in self._strip_of_images(block):
                gap, weights = self._divergence(self.images[at.i], block.embeddings[at.j], at, normalisers)
                loss += gap
                if block.is_own:
                    accumulate(grad_text[at.j], weights.t(), student.image[at.i])
                accumulate(grad_image[at.i], weights, block.embeddings[at.j, student.columns])
        return loss, grad_image, grad_text

    def text_strip(self, image_blocks: Iterable[Block], normalisers: Tensor, grad_text: Tensor) -> None:
        """Second pass over the other ranks' images × own texts, added to `grad_text`."""
        student = self.sides[0]
        for block in image_blocks:
            if block.is_own:
                continue
            for i, j in student.tiling.cut(len(block.embeddings), len(self.texts)):
                rows, columns = shifted(block.rows, i), shifted(self.exchange.own_rows, j)
                at = _Place(i=i, j=j, rows=rows, columns=columns, is_own=False)
                _, weights = self._divergence(block.embeddings[i], self.texts[j], at, normalisers)
                accumulate(grad_text[j], weights.t(), block.embeddings[i, student.columns])

    def _strip_of_images(self, block: Block) -> Iterator[_Place]:
        for i, j in self.sides[0].tiling.cut(len(self.images), len(block.embeddings)):
            rows, columns = shifted(self.exchange.own_rows, i), shifted(block.rows, j)
            yield _Place(i=i, j=j, rows=rows, columns=columns, is_own=block.is_own)

    def _logits(self, images: Tensor, texts: Tensor) -> list[Tensor]:
        """s and t of one tile from its rows and columns of both."""
        return [
            side.tiling.logits_of(images[:, side.columns], texts[:, side.columns], side.scale) for side in self.sides
        ]

    def _divergence(self, images: Tensor, texts: Tensor, at: _Place, normalisers: Tensor) -> tuple[Tensor, Tensor]:
        """Σ (q + q')(t − s) of one tile, 0-d, and its p + p' − q − q'. normalisers: [B, (r, c, r', c')]."""
        student, teacher = self._logits(images, texts)
        works = [side.tiling.work_like(student) for side in self.sides]
        gap = torch.sub(teacher, student, out=works[1])
        for tile in (student, teacher):  # behind the gap, which is finite where a logit that is left out is not
            self._leave_out(tile, at)
        q = softmaxes(teacher, normalisers[at.rows, 2], normalisers[at.columns, 3], works[0])
        total = gap.mul_(q).sum()
        p = softmaxes(student, normalisers[at.rows, 0], normalisers[at.columns, 1], works[0])
        return total, p.sub_(q)

    def _leave_out(self, tile: Tensor, at: _Place) -> None:
        """Two pairs that share an identifier are left out; a pair and itself is not."""
        if self.copies is None:
            return
        if not at.is_own:
            self.copies.leave_out(tile, at.rows, at.columns)
            return
        own = tile.new_empty(len(self.images))
        mask_pairs(tile, at.i, at.j, own)
        self.copies.leave_out(tile, at.rows, at.columns)
        write_pairs(tile, at.i, at.j, own)
