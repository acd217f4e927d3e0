"""Where every sample of a tar shard lies, read from the tar headers.

Layout (img2dataset, webdataset): members of one sample share a key, the member name up to the first dot of
its last component; what follows is the suffix, compared in lower case. `jpg|jpeg|png|webp` is the image,
`mp4|webm|mkv|mov|avi|gif` a clip in its place, `txt` the caption, `json` the metadata, and `000.jpg`,
`001.jpg`, ... (digits, then an image suffix) are the frames of a clip, ordered by number; other suffixes are
ignored. Of two members for one place the first in the tar counts. A sample without image or caption stays in
the index (offset -1), so that it is met, counted and replaced while reading; so does one whose data the end
of a truncated tar cuts off.
"""

import logging
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import BinaryIO

import numpy as np

from data.errors import DataError


class Place(IntEnum):
    """What a member is to its sample: the second axis of `ShardIndex.spans`."""

    IMAGE = 0
    CAPTION = 1
    METADATA = 2


Span = tuple[int, int]

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_CLIP_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "gif")
_PLACES = dict.fromkeys((*_IMAGE_SUFFIXES, *_CLIP_SUFFIXES), Place.IMAGE) | {
    "txt": Place.CAPTION,
    "json": Place.METADATA,
}
_FRAME = re.compile(rf"(\d+)\.(?:{'|'.join(_IMAGE_SUFFIXES)})")
_ABSENT = -1
_BLOCK_BYTES = 512
_DIGESTED_TEXT_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Members of the n samples of one shard, in the order of their first member; about 70 bytes a sample."""

    keys: np.ndarray
    """bytes [n] (fixed width): UTF-8 sample keys."""
    spans: np.ndarray
    """int64 [n, 3, 2]: (offset, size) in bytes of image, caption and metadata; offset -1 where the member is
    missing.
    """
    frames: np.ndarray
    """int64 [f, 2]: (offset, size) of the frames of all samples that are frame folders."""
    frame_starts: np.ndarray
    """int64 [n + 1]: sample i has the frames frame_starts[i] ... frame_starts[i + 1] - 1."""
    truncated: bool
    """The tar ends early or is damaged; `spans` holds what came before."""
    digest: int
    """Hash (64 bits) of all keys, member sizes and text: what `data/fingerprint.py` compares."""

    def __len__(self) -> int:
        return len(self.spans)

    def key(self, sample: int) -> str:
        """The sample's key as text."""
        return bytes(self.keys[sample]).decode(errors="replace")

    def span(self, sample: int, place: Place) -> Span | None:
        """(offset, size) in bytes of the sample's member; None if it has none."""
        offset, size = self.spans[sample, place].tolist()
        return None if offset == _ABSENT else (offset, size)

    def frame_spans(self, sample: int) -> list[Span]:
        """(offset, size) in bytes of the sample's frames in their order; empty unless it is a frame folder."""
        first, last = self.frame_starts[sample : sample + 2].tolist()
        return [(offset, size) for offset, size in self.frames[first:last].tolist()]


@dataclass(kw_only=True)
class _Members:
    """What was found of one sample."""

    spans: list[Span] = field(default_factory=lambda: [(_ABSENT, 0)] * len(Place))
    frames: dict[int, Span] = field(default_factory=dict)


def build_index(stream: BinaryIO, name: str) -> ShardIndex:
    """Read the headers of one tar from front to back; `name` is for messages. Raises DataError if it is no tar
    or holds no whole sample.
    """
    size_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            members, truncated = _walk(tar, stream)
    except tarfile.ReadError as error:
        raise DataError(
            f"{name} is not an uncompressed tar ({error}): rebuild it or leave it out of data.shards"
        ) from error
    except OSError as error:
        raise DataError(f"shard {name} cannot be read ({error.strerror})") from error
    files = [member for member in members if member.isreg()]
    samples, ignored = _group(files)
    if not samples or files[0].offset_data + files[0].size > size_bytes:
        damage = "is cut before the end of its first sample" if truncated else "holds no sample (key.jpg with key.txt)"
        raise DataError(f"{name} {damage}: rebuild it or leave it out of data.shards")
    if truncated:
        _log.warning("%s is truncated or damaged: the %d samples up to the damage are used", name, len(samples))
    if ignored:
        _log.warning("%s: %d second images, captions or frames of a sample are ignored", name, ignored)
    return _to_arrays(samples, truncated, _digest(samples, stream))


def _digest(samples: dict[str, _Members], stream: BinaryIO) -> int:
    """The hash of every sample's key, of the size of each member in its place, and of the text itself (captions and
    metadata, the first 64 KiB of a member). Where the members lie does not count, so a shard that is packed again is
    the same shard; pictures count by their size alone, for hashing them would read the whole shard.
    """
    digest = blake2b(digest_size=8)
    for key, sample in samples.items():
        sizes = [size if offset != _ABSENT else _ABSENT for offset, size in sample.spans]
        frames = sorted((number, size) for number, (_, size) in sample.frames.items())
        digest.update(repr((key, sizes, frames)).encode(errors="surrogateescape"))
        for place in (Place.CAPTION, Place.METADATA):
            offset, size = sample.spans[place]
            if offset != _ABSENT:
                stream.seek(offset)
                digest.update(stream.read(min(size, _DIGESTED_TEXT_BYTES)))
    return int.from_bytes(digest.digest(), "big")


def _to_arrays(samples: dict[str, _Members], truncated: bool, digest: int) -> ShardIndex:
    frames = [[sample.frames[number] for number in sorted(sample.frames)] for sample in samples.values()]
    return ShardIndex(
        keys=np.array([key.encode(errors="surrogateescape") for key in samples], dtype=np.bytes_),
        spans=np.array([sample.spans for sample in samples.values()], dtype=np.int64),
        frames=np.array([span for of_sample in frames for span in of_sample], dtype=np.int64).reshape(-1, 2),
        frame_starts=np.cumsum([0, *map(len, frames)], dtype=np.int64),
        truncated=truncated,
        digest=digest,
    )


def _walk(tar: tarfile.TarFile, stream: BinaryIO) -> tuple[list[tarfile.TarInfo], bool]:
    """All headers, and whether the zero block that ends a whole tar is missing after the last member."""
    members = []
    try:
        while (member := tar.next()) is not None:
            members.append(member)
    except tarfile.ReadError:
        return members, True
    stream.seek(tar.offset)
    end = stream.read(_BLOCK_BYTES)
    return members, len(end) < _BLOCK_BYTES or any(end)


def _group(members: Iterable[tarfile.TarInfo]) -> tuple[dict[str, _Members], int]:
    """Members by sample key, in the order of each key's first member, and how many were ignored."""
    samples: dict[str, _Members] = {}
    ignored = 0
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        place, frame = _PLACES.get(suffix.lower()), _FRAME.fullmatch(suffix.lower())
        if place is None and frame is None:
            continue
        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Members())
        span = (member.offset_data, member.size)
        if frame is not None:
            ignored += sample.frames.setdefault(int(frame[1]), span) is not span
        elif place is not None and sample.spans[place][0] == _ABSENT:
            sample.spans[place] = span
        else:
            ignored += 1
    return samples, ignored
