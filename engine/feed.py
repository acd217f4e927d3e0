"""From the global order of samples to this rank's part of each global batch.

Position p of the run's sample order belongs to row p mod B of its step; replica d owns rows [d b, (d + 1) b). The first
stage's tensor ranks split the reading and decoding, then share pixels among themselves and captions with the stages
behind them: each sample is read once per replica, and a bad sample is replaced once, for all who need it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import PrefetchLoader
from data.reader import SampleReader
from engine.config import Config
from engine.mesh import Mesh
from engine.rows import gather_rows, own_rows, split_rows


@dataclass(frozen=True)
class LocalBatch:
    """One step's data on this rank."""

    positions: np.ndarray
    """int64 [b]: global positions of the replica's samples."""
    images: Tensor | None
    """uint8 [b, 3, h, w] on the first stage, None elsewhere."""
    tokens: Tensor
    """int64 [own rows, context]: this rank's captions."""
    bad_samples: int
    """Replaced samples that this rank read."""


class Feed:
    """Iterates over LocalBatch from `start_position` for `steps` steps. Collective over the replica."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, *, start_position: int, steps: int):
        self.mesh, self.device = mesh, device
        self.global_batch = config.train.global_batch_size
        self.local_batch = self.global_batch // mesh.data.size
        self.context = config.model.text.context_length
        self.next_position = start_position
        self.loader: PrefetchLoader | None = None
        if mesh.is_first_stage:
            reader = SampleReader(
                config.data,
                image_size=config.model.vision.image_size,
                context_length=self.context,
                seed=config.train.seed,
                train=True,
            )
            batches = (self._read_by_me(start_position + s * self.global_batch) for s in range(steps))
            self.loader = PrefetchLoader(
                reader, batches, workers=config.data.workers, prefetch=config.data.prefetch_batches
            )

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        positions = self._positions(self.next_position)
        self.next_position += self.global_batch
        images, bad = None, 0
        tokens = torch.empty(self.local_batch, self.context, dtype=torch.int32, device=self.device)
        if self.loader is not None:
            mine = next(self.loader)
            images = gather_rows(mine.images.to(self.device), self.local_batch, self.mesh.tensor)
            tokens = gather_rows(mine.tokens.int().to(self.device), self.local_batch, self.mesh.tensor)
            bad = len(mine.bad)
        if self.mesh.pipeline.size > 1:
            first = dist.get_global_rank(self.mesh.pipeline.group, 0)
            dist.broadcast(tokens, src=first, group=self.mesh.pipeline.group)
        return LocalBatch(positions, images, tokens[own_rows(self.local_batch, self.mesh)].long(), bad)

    def close(self) -> None:
        """End the reader processes."""
        if self.loader is not None:
            self.loader.close()

    def _positions(self, step_position: int) -> np.ndarray:
        first = step_position + self.mesh.data.rank * self.local_batch
        return np.arange(first, first + self.local_batch, dtype=np.int64)

    def _read_by_me(self, step_position: int) -> np.ndarray:
        part = split_rows(self.local_batch, self.mesh.tensor.size)[self.mesh.tensor.rank]
        return self._positions(step_position)[part]
