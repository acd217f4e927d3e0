"""Where every sample of a tar shard lies: read once from the tar headers, cached beside the shard.

Layout (img2dataset, webdataset): members of one sample share a key, the member name up to the first dot of
its last component; what follows is the suffix, compared in lower case. `jpg|jpeg|png|webp` is the image,
`txt` the caption, `json` the metadata; other suffixes are ignored. Of two members for one place the first in
the tar counts. A sample without image or caption stays in the index (offset -1), so that it is met, counted
and replaced while reading. Of a truncated tar whatever is whole is indexed.

The cache is `SHARD.index.npz`, valid for one size and mtime of the shard and one format version, written to a
temporary name and renamed: readers that build it at the same time do no harm. In a folder that cannot be
written the index lives in memory only and is rebuilt by the next run.
"""

import contextlib
import logging
import os
import secrets
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO, TypeVar

import numpy as np

from data.errors import DataError
from data.lru import Lru

T = TypeVar("T")


class Place(IntEnum):
    """What a member is to its sample: the second axis of `ShardIndex.spans`."""

    IMAGE = 0
    CAPTION = 1
    METADATA = 2


_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_PLACES = dict.fromkeys(_IMAGE_SUFFIXES, Place.IMAGE) | {"txt": Place.CAPTION, "json": Place.METADATA}
_FORMAT_VERSION = 1
_ABSENT = -1
_BLOCK_BYTES = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Members of the n samples of one shard, in the order of their first member; about 60 bytes a sample."""

    keys: np.ndarray
    """bytes [n] (fixed width): UTF-8 sample keys."""
    spans: np.ndarray
    """int64 [n, 3, 2]: (offset, size) in bytes of image, caption and metadata; offset -1 where the member is
    missing.
    """
    truncated: bool
    """The tar ends early or is damaged; `spans` holds what came before."""

    def __len__(self) -> int:
        return len(self.spans)

    def key(self, sample: int) -> str:
        """The sample's key as text."""
        return bytes(self.keys[sample]).decode(errors="replace")

    def span(self, sample: int, place: Place) -> tuple[int, int] | None:
        """(offset, size) in bytes of the sample's member; None if it has none."""
        offset, size = self.spans[sample, place].tolist()
        return None if offset == _ABSENT else (offset, size)


class IndexStore:
    """Indices of a list of shards: all sample counts up front, the indices themselves loaded when needed."""

    def __init__(self, paths: Sequence[str], *, max_loaded: int) -> None:
        self._paths = paths
        self._loaded: Lru[int, ShardIndex] = Lru(max_loaded, lambda shard: load_index(paths[shard]))
        self.counts = np.array([self._count(shard) for shard in range(len(paths))], dtype=np.int64)
        """int64 [shards]: samples of each shard."""

    def _count(self, shard: int) -> int:
        cached = _from_cache(self._paths[shard], lambda cache: int(cache["count"]))
        return len(self._loaded[shard]) if cached is None else cached

    def __getitem__(self, shard: int) -> ShardIndex:
        return self._loaded[shard]


def load_index(path: str) -> ShardIndex:
    """The shard's index, from the cache if that is valid. Raises DataError if the file is no tar or holds no
    sample.
    """
    cached = _from_cache(path, _read_index)
    if cached is not None:
        return cached
    stamp = _stamp(path)
    index = build_index(path)
    _write_cache(path, index, stamp)
    return index


def build_index(path: str) -> ShardIndex:
    """Read the headers of one tar from front to back. Raises DataError if it is no tar or holds no sample."""
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members, truncated = _walk(tar, stream)
            size_bytes = os.fstat(stream.fileno()).st_size
    except tarfile.ReadError as error:
        raise DataError(
            f"{path} is not an uncompressed tar ({error}): rebuild it or leave it out of data.shards"
        ) from error
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror})") from error
    samples, ignored = _group(m for m in members if m.isreg() and m.offset_data + m.size <= size_bytes)
    if not samples:
        damage = "is cut before the end of its first sample" if truncated else "holds no sample (key.jpg with key.txt)"
        raise DataError(f"{path} {damage}: rebuild it or leave it out of data.shards")
    if truncated:
        _log.warning("%s is truncated or damaged: the %d samples before the damage are used", path, len(samples))
    if ignored:
        _log.warning("%s: %d second images or captions of a sample are ignored", path, ignored)
    keys = np.array([key.encode(errors="surrogateescape") for key in samples], dtype=np.bytes_)
    return ShardIndex(keys=keys, spans=np.array(list(samples.values()), dtype=np.int64), truncated=truncated)


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


def _group(members: Iterable[tarfile.TarInfo]) -> tuple[dict[str, list[tuple[int, int]]], int]:
    """Spans [places] by sample key, in the order of each key's first member, and how many members were
    ignored.
    """
    samples: dict[str, list[tuple[int, int]]] = {}
    ignored = 0
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        place = _PLACES.get(suffix.lower())
        if place is None:
            continue
        spans = samples.setdefault(f"{folder}/{stem}" if folder else stem, [(_ABSENT, 0)] * len(Place))
        if spans[place][0] == _ABSENT:
            spans[place] = (member.offset_data, member.size)
        else:
            ignored += 1
    return samples, ignored


def cache_path(shard: str) -> str:
    """Where the index of a shard is cached."""
    return f"{shard}.index.npz"


def _stamp(shard: str) -> np.ndarray:
    """int64 [3]: what a cache must agree with: format version, shard size in bytes, shard mtime in ns."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read ({error.strerror})") from error
    return np.array([_FORMAT_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _from_cache(shard: str, read: Callable[[Mapping[str, np.ndarray]], T]) -> T | None:
    """`read` of a valid cache; None without one. An npz array is loaded only when asked for: counting is
    cheap.
    """
    try:
        with np.load(cache_path(shard), allow_pickle=False) as cache:
            return read(cache) if np.array_equal(cache["stamp"], _stamp(shard)) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_index(cache: Mapping[str, np.ndarray]) -> ShardIndex:
    return ShardIndex(keys=cache["keys"], spans=cache["spans"], truncated=bool(cache["truncated"]))


def _write_cache(shard: str, index: ShardIndex, stamp: np.ndarray) -> None:
    temporary = f"{shard}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as stream:
            np.savez(
                stream,
                stamp=stamp,
                count=np.int64(len(index)),
                truncated=np.bool_(index.truncated),
                keys=index.keys,
                spans=index.spans,
            )
        os.replace(temporary, cache_path(shard))
    except OSError as error:
        _log.info("index of %s is kept in memory only (%s)", shard, error.strerror)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
