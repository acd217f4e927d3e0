"""What the schedule runs: this rank's vision chunks and text tower on the current batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from data.order.stateless import kept_patches
from data.pixels.transforms import normalise
from engine.feed import LocalBatch
from engine.parallel.device import moved
from models.blocks.spec import Span
from models.clip import embedding
from models.config import VisionConfig
from models.towers.text import TextTower
from models.towers.vision import VisionTower


class KeptPatches:
    """Patches that survive dropout, of every image of a rank's batch: drawn and moved to the device once a step.

    They follow from (seed, sample position, frame), so every stage, chunk and pass sees the same ones.
    """

    def __init__(self, vision: VisionConfig, *, patch_dropout: float, seed: int, frames: int, device: torch.device):
        self.patches, self.count = vision.patches, vision.kept_patches(patch_dropout)
        self.seed, self.frames, self.device = seed, frames, device
        self._batch: LocalBatch | None = None
        self._kept: Tensor | None = None

    def of(self, batch: LocalBatch, samples: slice) -> Tensor | None:
        """int64 [M, k] of the images of these samples; None where none is dropped."""
        if self.count == self.patches:
            return None
        if batch is not self._batch:
            kept = kept_patches(self.seed, batch.positions, self.patches, self.count, self.frames)
            self._batch, self._kept = batch, moved(torch.from_numpy(kept), self.device)
        assert self._kept is not None
        return self._kept[samples.start * self.frames : samples.stop * self.frames]

    def forget(self) -> None:
        """Let go of the batch."""
        self._batch = self._kept = None


class VisionRunner:
    """(chunk input, micro-batch) -> chunk output, with the pixels and kept patches of the current batch."""

    def __init__(self, tower: VisionTower, kept: KeptPatches, *, micro_batch: int, device: torch.device):
        """kept: shared by the chunks. micro_batch: images, a multiple of the frames of each sample."""
        self.tower, self.kept, self.micro_batch, self.device = tower, kept, micro_batch, device
        self.frames, self.pixel_norm = kept.frames, tower.vision.pixel_norm
        self.batch: LocalBatch | None = None

    def give(self, batch: LocalBatch | None) -> None:
        """Run this batch from now on; None: let go of the last one."""
        self.batch = batch
        if batch is None:
            self.kept.forget()

    def __call__(self, hidden: Tensor | None, i: int) -> Tensor:
        """Run micro-batch i of the current batch; of a divided tower what is above the blocks of `below`."""
        if not self.tower.is_divided:
            return self._run(hidden, i, "whole")
        return self._run(hidden, i, "above")

    def below(self, hidden: Tensor | None, i: int) -> Tensor:
        """What the call takes of a divided tower, from what it takes of another one."""
        return self._run(hidden, i, "below")

    def _run(self, hidden: Tensor | None, i: int, span: Span) -> Tensor:
        assert self.batch is not None
        samples = self.micro_batch // self.frames
        rows = slice(i * samples, (i + 1) * samples)
        inputs = hidden
        if self.tower.is_first and span != "above":
            assert self.batch.images is not None
            pixels = self.batch.images[rows].to(self.device, non_blocking=True)
            inputs = normalise(pixels.view(-1, *pixels.shape[-3:]), self.tower.config.params_dtype, self.pixel_norm)
        output = self.tower(inputs, self.kept.of(self.batch, rows), samples=self.micro_batch, span=span)
        return embedding(output, self.frames) if self.tower.is_last and span != "below" else output


class TextRunner:
    """part -> embeddings of this rank's captions; padding behind the longest caption of a part is cut off."""

    def __init__(self, tower: TextTower, *, rows: list[slice], device: torch.device):
        """rows: parts of the replica's batch; the first starts where this rank's captions do."""
        self.tower, self.rows, self.device = tower, rows, device
        self.trim: Callable[[Tensor], Tensor] = tower.trimmed
        """Depends on the values of the ids; a dry run, which has none, keeps whole contexts."""
        self._tokens: tuple[Tensor, Tensor] | None = None
        """The current batch's captions on the host, which says how long a part is, and on the device."""

    def give(self, batch: LocalBatch | None) -> None:
        """Run this batch from now on, whose captions move to the device once; None: let go of the last one."""
        self._tokens = None if batch is None else (batch.tokens, moved(batch.tokens, self.device))

    def __call__(self, part: int, hidden: Tensor | None = None) -> Tensor:
        """Run one part of the current batch, of a divided tower from what `below` has answered."""
        return embedding(self.tower(self._ids(part), hidden, "whole" if hidden is None else "above"))

    def below(self, part: int) -> Tensor:
        """The blocks of a divided tower with nothing to train in them and below."""
        return self.tower(self._ids(part), None, "below")

    def _ids(self, part: int) -> Tensor:
        assert self._tokens is not None
        first = self.rows[0].start
        rows = slice(self.rows[part].start - first, self.rows[part].stop - first)
        on_host, ids = self._tokens
        return ids[rows, : self.trim(on_host[rows]).shape[1]]
