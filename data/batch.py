"""What travels from the readers to the training process."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.pixels.transforms import Window


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that was read and rejected: replaced in training, left out elsewhere."""

    shard: str
    """Path of its tar file."""
    key: str
    """Key of the sample within its tar."""
    reason: str
    """One of data.bad.REASONS."""
    position: int
    """The global position that asked for it (the same for all that one replacement passed over)."""


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """n samples in the order of their positions."""

    images: torch.Tensor
    """uint8 RGB [n, 3, image_size, image_size]; [n, frames, 3, image_size, image_size] with data.frames > 1; float32
    [n, D] with data.features."""
    tokens: torch.Tensor
    """int64 [n, context_length]."""
    captions: list[str]
    """The captions before cleaning."""
    keys: list[str]
    """Sample keys within their tars."""
    bad: list[BadSample]
    """What was replaced on the way to these n."""
    picture_ids: torch.Tensor | None = None
    """int64 [n]: hashes of the encoded pictures, where they are asked for."""
    caption_fallbacks: int = 0
    """Samples of these n whose chosen text could not be used, so that another stands in for it."""


@dataclass(frozen=True, kw_only=True)
class EachSample:
    """n samples in the order of their positions, each as it is."""

    images: torch.Tensor
    """uint8 RGB, shaped as those of SampleBatch; zeros where `has_image` is false."""
    has_image: torch.Tensor
    """bool [n]: the picture was there and could be decoded."""
    captions: list[str | None]
    """The captions before cleaning, line breaks kept; None where there is none that can be used."""
    keys: list[str]
    """Sample keys within their tars."""
    bad: list[BadSample]
    """What could not be read of them: a sample may be here twice, for its picture and for its caption."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample whose headers are read and whose pixels are not yet."""

    pictures: list[bytes]
    """Encoded images: one, or `frames` of a frame folder; or one clip (`is_clip`)."""
    is_clip: bool
    """The one entry of `pictures` is a video file."""
    window: Window
    """What is cut of each frame."""
    tokens: np.ndarray
    """int64 [context_length]."""
    caption: str
    """Caption as it stands in the shard, before cleaning."""
    fell_back: bool
    """The caption stands in for the text that was chosen (data.captions)."""
    key: str
    """Within its tar."""
    place: tuple[int, int]
    """(shard, sample) it came from."""
    features: np.ndarray | None = None
    """float32 [D] in the place of pictures, with data.features."""
    picture_id: int = 0
    """Hash (63 bits) of the encoded pictures, where it is asked for."""
    passed_over: int
    """Bad samples between the position's own sample and this one."""


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """n samples before decoding."""

    positions: np.ndarray
    """int64 [n]: global positions."""
    samples: list[EncodedSample]
    """Samples in the order of the positions."""
    bad: list[BadSample]
    """What was replaced so far."""


def join(batches: Sequence[SampleBatch], *, pinned: bool = False) -> SampleBatch:
    """One batch of all their samples in their order, in memory of its own. pinned: its images lie in pinned memory."""
    parts = [batch.images for batch in batches]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    images = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device, pin_memory=pinned)
    identifiers = [batch.picture_ids for batch in batches if batch.picture_ids is not None]
    return SampleBatch(
        images=torch.cat(parts, out=images),
        tokens=torch.cat([batch.tokens for batch in batches]),
        captions=[caption for batch in batches for caption in batch.captions],
        keys=[key for batch in batches for key in batch.keys],
        bad=[sample for batch in batches for sample in batch.bad],
        picture_ids=torch.cat(identifiers) if identifiers else None,
        caption_fallbacks=sum(batch.caption_fallbacks for batch in batches),
    )
