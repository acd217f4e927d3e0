"""What 1F1B runs: a chunk of the student on the current batch, up to its share of the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.pixels.transforms import normalise
from engine.objectives.mim.loss import distillation_loss
from models.towers.mim import StudentTower


@dataclass(frozen=True, kw_only=True)
class MaskedBatch:
    """One step's local batch as the student sees it."""

    images: Tensor | None
    """uint8 [b, 3, h, w] on the first stage."""
    masked: Tensor
    """bool [b, n] on the CPU."""
    targets: Tensor | None
    """[N, D] on the last stage: the teacher's features of the N masked patches, sample by sample, patch by patch."""
    masked_count: Tensor
    """Masked patches of the global batch, 0-d."""


class StudentRunner:
    """(chunk input, micro-batch) -> chunk output; where the tower ends its share of the global loss, 0-d fp32."""

    def __init__(self, tower: StudentTower, *, micro_batch: int, device: torch.device):
        self.tower, self.micro_batch, self.device = tower, micro_batch, device
        self.batch: MaskedBatch | None = None

    def __call__(self, hidden: Tensor | None, i: int) -> Tensor:
        """Run micro-batch i of the current batch."""
        batch = self.batch
        assert batch is not None
        rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
        inputs = self._pixels(batch, rows) if hidden is None else hidden
        output = self.tower(inputs, batch.masked[rows], samples=self.micro_batch)
        return self._loss(output, batch, rows) if self.tower.is_last else output

    def _pixels(self, batch: MaskedBatch, rows: slice) -> Tensor:
        assert batch.images is not None
        images = batch.images[rows].to(self.device, non_blocking=True)
        return normalise(images, self.tower.config.params_dtype, self.tower.vision.pixel_norm)

    def _loss(self, predictions: Tensor, batch: MaskedBatch, rows: slice) -> Tensor:
        assert batch.targets is not None
        first = int(batch.masked[: rows.start].sum())
        targets = batch.targets[first : first + len(predictions)]
        return distillation_loss(predictions, targets, batch.masked_count)
