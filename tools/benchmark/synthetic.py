"""Batches without data: what a step costs when reading, decoding and sharing pixels cost nothing."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.config.read import Config
from engine.feed import LocalBatch
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows


class SyntheticFeed:
    """Iterates over LocalBatch for ever. Sample p of a batch has the same pixels and caption on every layout.

    Every step gets the same pixels and captions at new positions, so that other patches are dropped. A caption fills
    the whole context: as many tokens as the FLOP count assumes.
    """

    def __init__(self, config: Config, mesh: Mesh, device: torch.device):
        self.global_batch = config.train.global_batch_size
        rows = self.global_batch // mesh.data.size
        self.first = mesh.data.rank * rows
        samples = range(self.first, self.first + rows)
        self.images = _images(config, samples).to(device) if mesh.is_first_stage else None
        own = samples[own_rows(rows, mesh)]
        self.tokens = _captions(config, own)  # on the host, as a feed has them
        self.picture_ids = torch.arange(own.start, own.stop)
        self.positions = np.arange(samples.start, samples.stop, dtype=np.int64)

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        batch = LocalBatch(self.positions, self.images, self.tokens, picture_ids=self.picture_ids)
        self.positions = self.positions + self.global_batch
        return batch

    def close(self) -> None:
        """Nothing to end."""


def _generator(config: Config, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed(config.train.seed * 1_000_003 + sample)


def _images(config: Config, samples: range) -> Tensor:
    """uint8 [b, 3, h, w], or [b, frames, 3, h, w] of clips."""
    side, frames = config.model.vision.image_size, config.data.frames
    shape = (3, side, side) if frames == 1 else (frames, 3, side, side)
    return torch.stack(
        [torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(config, p)) for p in samples]
    )


def _captions(config: Config, samples: range) -> Tensor:
    """int64 [own rows, context]: random ids, the end-of-text id (the highest) last."""
    text = config.model.text
    ids = torch.empty(len(samples), text.context_length, dtype=torch.int64)
    for row, sample in zip(ids, samples, strict=True):
        row.random_(1, text.vocab_size - 1, generator=_generator(config, sample))
    ids[:, -1] = text.vocab_size - 1
    return ids
