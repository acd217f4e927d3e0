"""What travels from the readers to the training process."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.errors import DataError
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
    positions: np.ndarray | None = None
    """int64 [n]: global positions, where they are known."""
    token_bits: int | None = None
    """Sum of the bits of `tokens` when they were made, where it is known."""
    pixel_bits: int | None = None
    """Sum of the bits of `images` when they were made, where it is known."""

    def summed(self) -> "SampleBatch":
        """The same, with the sums of what lies in a host's memory."""
        pixels = sum_of_bits(self.images) if self.images.is_cpu else None
        return replace(self, token_bits=sum_of_bits(self.tokens), pixel_bits=pixels)

    def check(self) -> None:
        """Raise DataError if memory has forgotten a bit of it since; only what is summed is looked at."""
        parts = ("captions", self.token_bits, self.tokens), ("pixels", self.pixel_bits, self.images)
        for what, bits, values in parts:
            if bits is not None and bits != sum_of_bits(values):
                raise DataError(
                    f"{what} of a batch have changed in the memory of {socket.gethostname()} since they were read: it "
                    "may be bad, take the host out of the job and resume"
                )


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


def sum_of_bits(values: torch.Tensor) -> int:
    """Sum of the bits of a tensor on any device as integers, modulo 2^64: a flipped bit changes it by a power of two.
    Where the tensor lies does not; waits for the device.
    """
    raw = values.detach().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:  # words of eight bytes have to begin at a multiple of eight
        raw = raw.clone()
    end = raw.numel() - raw.numel() % 8
    rest = int.from_bytes(raw[end:].tolist(), "little")
    return (int(raw[:end].view(torch.int64).sum()) + rest) % (1 << 64)


def join(batches: Sequence[SampleBatch], *, pinned: bool = False) -> SampleBatch:
    """One batch of all their samples in their order, in memory of its own. pinned: its images lie in pinned memory.

    Raises DataError if memory has forgotten a bit of one of them.
    """
    for batch in batches:
        batch.check()
    parts = [batch.images for batch in batches]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    images = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device, pin_memory=pinned)
    identifiers = [batch.picture_ids for batch in batches if batch.picture_ids is not None]
    positions = [batch.positions for batch in batches if batch.positions is not None]
    tokens = torch.cat([batch.tokens for batch in batches])
    return SampleBatch(
        images=torch.cat(parts, out=images),
        tokens=tokens,
        captions=[caption for batch in batches for caption in batch.captions],
        keys=[key for batch in batches for key in batch.keys],
        bad=[sample for batch in batches for sample in batch.bad],
        picture_ids=torch.cat(identifiers) if identifiers else None,
        caption_fallbacks=sum(batch.caption_fallbacks for batch in batches),
        positions=np.concatenate(positions) if positions else None,
        token_bits=sum_of_bits(tokens),
    )
