"""Images and captions in blocks, each rank holding what it needs of a block and no more.

An .npz holds prepared arrays; its uncompressed members are mapped, so that a rank touches its own rows only. Shards:
engine/evaluation/inputs.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data.errors import DataError
from data.pixels.features import mapped_member
from engine.config.read import Config
from engine.evaluation.embedder import Pixels
from engine.evaluation.inputs import Block


class Input(Protocol):
    """What can be embedded."""

    has_images: bool
    has_tokens: bool

    def __len__(self) -> int: ...

    def blocks(self, size: int) -> Iterator[Block]: ...


class NpzInput:
    """`images` float32 [N, 3, h, w], already normalised, and/or `tokens` int64 [N, context] of an .npz."""

    def __init__(self, path: Path, config: Config):
        """Raises DataError for a file without either, of other shapes, or with ids beyond the vocabulary."""
        self.images, self.tokens = mapped_member(path, "images"), mapped_member(path, "tokens")
        self.has_images, self.has_tokens = self.images is not None, self.tokens is not None
        self._path = path
        if not self.has_images and not self.has_tokens:
            raise DataError(f"{path} holds neither `images` nor `tokens`")
        self._check(config)

    def _check(self, config: Config) -> None:
        if config.data.frames > 1:
            raise DataError(f"{self._path} holds images, not clips: leave out data.frames={config.data.frames}")
        side, text = config.model.vision.image_size, config.model.text
        if self.images is not None and self.images.shape[1:] != (3, side, side):
            raise DataError(
                f"{self._path}: images are {self.images.shape}, the model wants [N, 3, {side}, {side}] (another "
                "resolution: model.vision.image_size=…)"
            )
        if self.images is not None and self.images.dtype.kind != "f":
            raise DataError(f"{self._path}: images are {self.images.dtype}; they must be normalised floats")
        if self.tokens is not None and (self.tokens.ndim != 2 or self.tokens.shape[1] > text.context_length):
            raise DataError(f"{self._path}: tokens are {self.tokens.shape}, the model reads [N, {text.context_length}]")
        if self.tokens is not None and len(self.tokens):
            low, high = int(self.tokens.min()), int(self.tokens.max())
            if low < 0 or high >= text.vocab_size:
                raise DataError(f"{self._path}: tokens span {low} to {high}, the vocabulary has {text.vocab_size} ids")

    def check_rows(self) -> None:
        """Raises DataError if images and tokens are not equally many, as rows of a table must be."""
        if self.images is not None and self.tokens is not None and len(self.images) != len(self.tokens):
            raise DataError(
                f"{self._path} holds {len(self.images)} images and {len(self.tokens)} captions: a row of parquet "
                "has both, write .npz instead"
            )

    def __len__(self) -> int:
        return max(len(array) for array in (self.images, self.tokens) if array is not None)

    def blocks(self, size: int) -> Iterator[Block]:
        """Blocks of `size` rows; images and tokens need not be equally many."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            images, tokens = _rows(self.images, start, stop), _rows(self.tokens, start, stop)
            yield Block(
                start,
                stop,
                None if images is None or not len(images) else _pixels_of(images),
                None if tokens is None or not len(tokens) else torch.from_numpy(tokens.astype(np.int64)),
            )


def _rows(array: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
    return None if array is None else array[start:stop]


def _pixels_of(images: np.ndarray) -> Pixels:
    return lambda rows: torch.from_numpy(np.array(images[rows], dtype=np.float32))
