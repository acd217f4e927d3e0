"""What the schedule runs: this rank's vision chunks and text tower on the current batch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.order.stateless import kept_patches
from data.pixels.transforms import normalise
from engine.feed import LocalBatch
from models.clip import embedding
from models.towers.text import TextTower
from models.towers.vision import VisionTower


class VisionRunner:
    """(chunk input, micro-batch) -> chunk output, with the pixels and kept patches of the current batch.

    Kept patches follow from (seed, sample position, frame), so every stage, the replay included, sees the same ones.
    """

    def __init__(
        self,
        tower: VisionTower,
        *,
        micro_batch: int,
        patch_dropout: float,
        seed: int,
        device: torch.device,
        frames: int = 1,
    ):
        """micro_batch: images, a multiple of the `frames` of each sample."""
        self.tower, self.micro_batch, self.seed, self.device = tower, micro_batch, seed, device
        self.frames = frames
        self.kept_count = tower.vision.kept_patches(patch_dropout)
        self.batch: LocalBatch | None = None

    def __call__(self, hidden: Tensor | None, i: int) -> Tensor:
        """Run micro-batch i of the current batch."""
        assert self.batch is not None
        samples = self.micro_batch // self.frames
        rows = slice(i * samples, (i + 1) * samples)
        inputs = hidden
        if self.tower.is_first:
            assert self.batch.images is not None
            pixels = self.batch.images[rows].to(self.device, non_blocking=True)
            inputs = normalise(pixels.view(-1, *pixels.shape[-3:]), self.tower.config.params_dtype)
        output = self.tower(inputs, self._kept(self.batch.positions[rows]), samples=self.micro_batch)
        return embedding(output, self.frames) if self.tower.is_last else output

    def _kept(self, positions: np.ndarray) -> Tensor | None:
        patches = self.tower.vision.patches
        if self.kept_count == patches:
            return None
        kept = kept_patches(self.seed, positions, patches, self.kept_count, self.frames)
        return torch.from_numpy(kept).to(self.device, non_blocking=True)


class TextRunner:
    """part -> embeddings of this rank's captions; padding behind the longest caption of a part is cut off."""

    def __init__(self, tower: TextTower, *, rows: list[slice], device: torch.device):
        """rows: parts of the replica's batch; the first starts where this rank's captions do."""
        self.tower, self.rows, self.device = tower, rows, device
        self.trim: Callable[[Tensor], Tensor] = tower.trimmed
        """Depends on the values of the ids; a dry run, which has none, keeps whole contexts."""
        self.batch: LocalBatch | None = None

    def __call__(self, part: int) -> Tensor:
        """Run one part of the current batch."""
        assert self.batch is not None
        rows, first = self.rows[part], self.rows[0].start
        tokens = self.trim(self.batch.tokens[rows.start - first : rows.stop - first])
        return embedding(self.tower(tokens.to(self.device, non_blocking=True)))
