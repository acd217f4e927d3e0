"""Tar shards as blocks of evaluation input: read and decoded once, each rank its part of a block, then shared."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.pixels.transforms import normalise
from data.reader import SampleReader
from engine.config.read import Config
from engine.evaluation.embedder import Pixels
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from engine.parallel.rows import gather_rows, split_rows


@dataclass(frozen=True)
class Block:
    """Consecutive samples of the input."""

    start: int
    stop: int
    pixels: Pixels | None
    """rows of the block -> normalised images in the model's dtype."""
    tokens: Tensor | None
    """int64 [rows, context], on every rank."""
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    images_u8: Tensor | None = None
    """uint8 [rows, 3, h, w] where the input is pictures, [rows, frames, 3, h, w] where it is clips."""


def _normalised(images: Tensor, dtype: torch.dtype) -> Pixels:
    return lambda rows: normalise(images[rows], dtype)


def _as_listed(data: DataConfig, shards: list[str], frames: int) -> DataConfig:
    """The shards in their order, kept and fetched as the job's are."""
    return DataConfig(
        shards=shards,
        shuffle=False,
        frames=frames,
        max_pixels=data.max_pixels,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        remote_timeout_s=data.remote_timeout_s,
        remote_retries=data.remote_retries,
    )


class ShardInput:
    """Pictures and captions of tar shards, in the listed order; pictures squashed to the model's square."""

    has_images = True
    has_tokens = True

    def __init__(
        self,
        shards: list[str],
        config: Config,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        max_samples: int = 0,
        frames: int = 1,
    ):
        """max_samples: the first n only; 0: all. frames: of a clip; 1 takes its middle one."""
        self._mesh, self._dtype, self._device = mesh, dtype, device
        self._reader = SampleReader(
            _as_listed(config.data, shards, frames),
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
            seed=0,
            train=False,
        )
        self._count = min(self._reader.total_samples, max_samples or self._reader.total_samples)

    def __len__(self) -> int:
        return self._count

    def blocks(self, size: int) -> Iterator[Block]:
        """Collective over the mesh."""
        world = self._mesh.world
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            mine = split_rows(stop - start, world.size)[world.rank]
            own = self._reader.read(np.arange(start + mine.start, start + mine.stop))
            images = gather_rows(own.images.contiguous().to(self._device), stop - start, world)
            names = everyone((own.keys, own.captions), world)
            yield Block(
                start,
                stop,
                _normalised(images, self._dtype),
                gather_rows(own.tokens.to(self._device), stop - start, world),
                keys=[key for keys, _ in names for key in keys],
                captions=[caption for _, captions in names for caption in captions],
                images_u8=images,
            )
