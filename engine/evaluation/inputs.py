"""Pictures and captions as blocks of evaluation input: read and decoded once, each rank its part, then shared.

Nothing is replaced: every sample of the input is a row, and what cannot be read of it is marked and listed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from threading import local
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, EachSample
from data.config import DataConfig
from data.each import EachReader
from data.errors import DataError
from data.pixels.transforms import normalise
from data.shards.index import Place
from engine.config.read import Config
from engine.evaluation.embedder import Pixels
from engine.evaluation.prefetch import ahead
from engine.parallel.agree import everyone
from engine.parallel.mesh import Axis, Mesh
from engine.parallel.rows import gather_rows, split_rows

_DIGEST_BYTES = 16
READERS = 2
"""Threads of a rank that read and decode ahead."""


@dataclass(frozen=True)
class Block:
    """Consecutive samples of the input."""

    start: int
    stop: int
    pixels: Pixels | None
    """rows of the block -> normalised images in the model's dtype; zeros (normalised) where there is no picture."""
    tokens: Tensor | None = None
    """int64 [rows, context], on every rank; only where the input is made of tokens."""
    keys: list[str] = field(default_factory=list)
    has_image: Tensor | None = None
    """bool [rows]; None: every row has one."""
    captions: list[str | None] = field(default_factory=list)
    """Caption of every row, line breaks kept; None where there is none that can be used."""
    pictures: list[bytes] = field(default_factory=list)
    """Digest of the pixels of every row: equal ones are the same picture to the model."""
    bad: list[BadSample] = field(default_factory=list)
    """What could not be read of these samples."""


class Samples(Protocol):
    """Random access to samples that are what they are."""

    def __len__(self) -> int: ...

    def read_each(self, positions: np.ndarray) -> EachSample:
        """Called by one thread at a time."""


class SampleFactory(Protocol):
    """Opens the samples once more, for another thread."""

    def __call__(self) -> Samples: ...


@dataclass(frozen=True)
class _Part:
    """What one rank has read of a block."""

    start: int
    """First row, within the block."""
    images: Tensor
    seen: EachSample | None
    pictures: list[bytes]
    error: str | None = None


class SampleInput:
    """Samples in their order, in blocks that are dealt over the ranks. Every rank has an equal view of the samples."""

    has_images = True
    has_tokens = False

    def __init__(
        self,
        factory: SampleFactory,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        *,
        pixel_norm: str,
        max_samples: int = 0,
        readers: int = READERS,
    ):
        """factory: opens the samples for each of `readers` threads. pixel_norm: the model's. max_samples: the first n
        only; 0: all.
        """
        self.mesh, self._dtype, self._device, self._readers = mesh, dtype, device, max(1, readers)
        self._pixel_norm = pixel_norm
        self.samples = factory()
        self._factory, self._threads = factory, local()
        self._count = min(len(self.samples), max_samples or len(self.samples))

    def __len__(self) -> int:
        return self._count

    def blocks(self, size: int, start: int = 0) -> Iterator[Block]:
        """All blocks from sample `start` on. Collective over the mesh: each replica decodes the rows that it embeds,
        a part on each of its ranks. Raises DataError on every rank if one cannot go on.
        """
        borders = [*range(start, len(self), size), len(self)]
        spans = list(pairwise(borders))
        for (first, last), part in zip(
            spans, ahead(self._read, spans, threads=self._readers, depth=self._readers + 1), strict=True
        ):
            yield self._share(first, last, part)

    def _own_rows(self, rows: int) -> tuple[slice, slice]:
        """Rows of a block: (this replica's, this rank's within them, counted from the block's first row)."""
        replica = split_rows(rows, self.mesh.data.size)[self.mesh.data.rank]
        own = split_rows(replica.stop - replica.start, self.mesh.replica.size)[self.mesh.replica.rank]
        return replica, slice(replica.start + own.start, replica.start + own.stop)

    def _read(self, span: tuple[int, int]) -> _Part:
        """This rank's part of a block; runs on a reader thread."""
        first, last = span
        _, own = self._own_rows(last - first)
        try:
            if not hasattr(self._threads, "samples"):
                self._threads.samples = self._factory()
            seen = self._threads.samples.read_each(np.arange(first + own.start, first + own.stop))
        except DataError as error:
            return _Part(own.start, torch.empty(0), None, [], str(error))
        images = seen.images.contiguous()
        return _Part(own.start, images, seen, [picture_identity(image) for image in images])

    def _share(self, first: int, last: int, part: _Part) -> Block:
        words = None
        if part.seen is not None:
            seen = part.seen
            words = (seen.keys, seen.captions, seen.bad, seen.has_image.tolist(), part.pictures)
        parts = [p for p in everyone((part.start, words, part.error), self.mesh.world) if p[1] is None or p[1][0]]
        for _, _, error in parts:
            if error is not None:
                raise DataError(error)
        keys, captions, bad, has_image, pictures = (
            [item for _, lists, _ in sorted(parts, key=lambda p: p[0]) for item in lists[column]] for column in range(5)
        )
        replica, _ = self._own_rows(last - first)
        images = gather_rows(part.images.to(self._device), replica.stop - replica.start, self.mesh.replica)
        return Block(
            first,
            last,
            self._pixels(images, replica.start),
            keys=keys,
            captions=captions,
            has_image=torch.tensor(has_image, dtype=torch.bool),
            pictures=pictures,
            bad=bad,
        )

    def _pixels(self, images: Tensor, first: int) -> Pixels:
        return lambda rows: normalise(images[rows.start - first : rows.stop - first], self._dtype, self._pixel_norm)


def picture_identity(image: Tensor) -> bytes:
    """A digest of the pixels: equal pictures are the same to the model. image: uint8, a picture or a clip."""
    return blake2b(image.cpu().numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()


def agree(error: str | None, axis: Axis) -> None:
    """Raise DataError on every rank if one has an error. Collective."""
    errors = [e for e in everyone(error, axis) if e]
    if errors:
        raise DataError(errors[0])


def as_listed(data: DataConfig, shards: list[str], frames: int) -> DataConfig:
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


class ShardInput(SampleInput):
    """Pictures and captions of tar shards, in the listed order; pictures squashed to the model's square."""

    def __init__(
        self,
        shards: list[str],
        config: Config,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        max_samples: int = 0,
        frames: int = 1,
        readers: int = READERS,
    ):
        """frames: of a clip; 1 takes its middle one."""

        def reader() -> EachReader:
            return EachReader(
                as_listed(config.data, shards, frames),
                image_size=config.model.vision.image_size,
                context_length=config.model.text.context_length,
                seed=0,
                train=False,
            )

        norm = config.model.vision.pixel_norm
        super().__init__(reader, mesh, dtype, device, pixel_norm=norm, max_samples=max_samples, readers=readers)
        assert isinstance(self.samples, EachReader)
        self.reader = self.samples
        members = self.reader.members()
        self.has_images, self.has_tokens = members[Place.IMAGE] > 0, members[Place.CAPTION] > 0
        if not self.has_images and not self.has_tokens:
            raise DataError(f"{', '.join(shards)}: no sample has a picture, a clip or a caption")

    def check_captions(self) -> list[str | None]:
        """Every caption, read without a picture. Collective over the mesh; raises DataError on every rank."""
        own: list[str | None] = []
        world, error = self.mesh.world, None
        part = split_rows(len(self), world.size)[world.rank]
        try:
            own, _ = self.reader.read_captions(np.arange(part.start, part.stop))
        except DataError as problem:
            error = str(problem)
        agree(error, world)
        return [caption for captions in everyone(own, world) for caption in captions]
