"""Shard indices kept on disk and in memory.

An index is cached as `SHARD.index.npz` beside its shard, or in `data.cache_dir` where that folder cannot be
written and for remote shards. It is valid for one size and mtime of the shard and one format version, and is
written to a temporary name and renamed: readers that build it at the same time do no harm.
`shards.counts.npz` (tools.index_shards) holds sample counts and digests of a whole folder, so that a run over 200,000
shards starts with one small read instead of opening every index.
"""

import contextlib
import logging
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data.errors import DataError
from data.shards.index import ODD, ShardIndex, Strings, build_index
from data.shards.lru import Lru
from data.shards.storage import Storage

T = TypeVar("T")
COUNTS_FILE = "shards.counts.npz"
_FORMAT_VERSION = 4
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

_log = logging.getLogger(__name__)


class _OneThread:
    """Lets one thread at a time read arrays from a file, also in a process that was forked meanwhile.

    NumPy reads the head of an array with ast.literal_eval, which in CPython 3.11 fails once in a while when two threads
    are in it ("AST constructor recursion depth mismatch", seen with 3.11.7), and evaluations read by threads.
    """

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Forget who was reading."""
        self.lock = threading.Lock()


ONE_THREAD = _OneThread()


class Tally(NamedTuple):
    """What is known of a shard without its index."""

    samples: int
    """Number of samples in the shard."""
    digest: int
    """`ShardIndex.digest`."""


class IndexStore:
    """Indices of a list of shards: all sample counts up front, the indices themselves loaded when needed."""

    def __init__(
        self, shards: Sequence[str], *, max_loaded: int, storage: Storage, tallies: Sequence[Tally] | None = None
    ) -> None:
        """tallies: of the shards, where another process has asked for them (no shard is looked at then)."""
        self._shards = shards
        self._storage = storage
        self._loaded: Lru[int, ShardIndex] = Lru(max_loaded, self._load)
        self._expected: Sequence[Tally] | None = None  # known once all are counted
        self.tallies = self._expected = self._tally_all() if tallies is None else tallies
        """Samples of each shard."""
        self.counts = np.array([tally.samples for tally in self.tallies], dtype=np.int64)
        """int64 [shards]: samples of each shard."""
        self.digests = np.array([tally.digest for tally in self.tallies], dtype=np.uint64)
        """uint64 [shards]: `ShardIndex.digest` of each shard."""

    def _tally_all(self) -> list[Tally]:
        tables: dict[str, dict[str, tuple[tuple[int, int], Tally]]] = {}
        tallies = []
        for number, shard in enumerate(self._shards):
            folder, _, name = shard.rpartition("/")
            if folder not in tables:
                tables[folder] = _read_counts(folder, self._storage)
            tallies.append(self._tally(number, tables[folder].get(name)))
        return tallies

    def _tally(self, number: int, entry: tuple[tuple[int, int], Tally] | None) -> Tally:
        shard = self._shards[number]
        if entry is not None:
            stamp, tally = entry
            if self._storage.stamp(shard) in (None, stamp):
                return tally
        cached = _from_cache(shard, self._storage, lambda cache: Tally(int(cache["count"]), int(cache["digest"])))
        if cached is not None:
            return cached
        index = self._loaded[number]
        return Tally(len(index), index.digest)

    def _load(self, number: int) -> ShardIndex:
        index = load_index(self._shards[number], self._storage)
        if self._expected is not None and (len(index), index.digest) != self._expected[number]:
            was = self._expected[number].samples
            what = (
                f"{len(index)} samples, but {was}"
                if len(index) != was
                else f"{was} samples, but not those that it held"
            )
            raise DataError(
                f"{self._shards[number]} holds {what} when the run started or in {COUNTS_FILE}: shards must not change "
                "during a run; run tools.index_shards after a change"
            )
        return index

    def __getitem__(self, shard: int) -> ShardIndex:
        return self._loaded[shard]


def load_index(shard: str, storage: Storage) -> ShardIndex:
    """The shard's index, from a cache if one is valid. Raises DataError if the shard is no tar or holds no
    sample.
    """
    cached = _from_cache(shard, storage, _read_index)
    if cached is not None:
        return cached
    stamp = _stamp(shard, storage)
    with open(storage.open(shard), "rb") as stream:
        if stamp[1] < 0:  # remote: the size is for people and for a copy that is put back beside the shard
            stamp[1] = os.fstat(stream.fileno()).st_size
        index = build_index(stream, shard)
    _write_index(shard, storage, index, stamp)
    return index


def index_name(shard: str) -> str:
    """Name of the shard's cached index where it lies beside the shard."""
    return f"{shard}.index.npz"


def _stamp(shard: str, storage: Storage) -> np.ndarray:
    """int64 [3]: format version, shard size in bytes, shard mtime in ns; the last two -1 for a remote one."""
    return np.array([_FORMAT_VERSION, *(storage.stamp(shard) or (-1, -1))], dtype=np.int64)


def _from_cache(shard: str, storage: Storage, read: Callable[[Mapping[str, np.ndarray]], T]) -> T | None:
    """`read` of the first valid cache; None without one. An npz array is loaded only when asked for: counting
    is cheap.
    """
    stamp = _stamp(shard, storage)
    for file in storage.side_files(index_name(shard)):
        with ONE_THREAD.lock, contextlib.suppress(*_UNREADABLE), np.load(file, allow_pickle=False) as cache:
            found = cache["stamp"]
            if found[0] == stamp[0] and (stamp[1] < 0 or np.array_equal(found, stamp)):
                return read(cache)
    return None


def _read_index(cache: Mapping[str, np.ndarray]) -> ShardIndex:
    return ShardIndex(
        keys=_strings(cache, "keys"),
        spans=cache["spans"],
        frames=cache["frames"],
        frame_starts=cache["frame_starts"],
        texts=cache["texts"],
        text_starts=cache["text_starts"],
        text_names=_strings(cache, "text_names"),
        sparse=cache["sparse"],
        sparse_starts=cache["sparse_starts"],
        odd={reason: count for reason, count in zip(ODD, cache["odd"].tolist(), strict=True) if count},
        truncated=bool(cache["truncated"]),
        digest=int(cache["digest"]),
    )


def _strings(cache: Mapping[str, np.ndarray], name: str) -> Strings:
    return Strings(content=cache[f"{name}_bytes"], ends=cache[f"{name}_ends"])


def _packed(**strings: Strings) -> dict[str, np.ndarray]:
    return {
        f"{name}_{part}": array
        for name, of in strings.items()
        for part, array in (("bytes", of.content), ("ends", of.ends))
    }


def _write_index(shard: str, storage: Storage, index: ShardIndex, stamp: np.ndarray) -> None:
    written = _write_npz(
        storage,
        index_name(shard),
        stamp=stamp,
        count=np.int64(len(index)),
        spans=index.spans,
        frames=index.frames,
        frame_starts=index.frame_starts,
        texts=index.texts,
        text_starts=index.text_starts,
        sparse=index.sparse,
        sparse_starts=index.sparse_starts,
        **_packed(keys=index.keys, text_names=index.text_names),
        odd=np.array([index.odd.get(reason, 0) for reason in ODD], dtype=np.int64),
        truncated=np.bool_(index.truncated),
        digest=np.uint64(index.digest),
    )
    if not written:
        _log.info("the index of %s is kept in memory only: set data.cache_dir to keep it", shard)


def _write_npz(storage: Storage, name: str, **arrays: Any) -> bool:
    """Write an npz in the first place that takes it."""
    return storage.write(name, lambda stream: np.savez(stream, **arrays)) is not None


def unwritable_folders(shards: Sequence[str], storage: Storage) -> list[str]:
    """Folders of the shards for which no place takes an index."""
    folders = dict.fromkeys(shard.rpartition("/")[0] for shard in shards)
    return [folder or "." for folder in folders if not _takes_files(_counts_name(folder), storage)]


def _takes_files(name: str, storage: Storage) -> bool:
    for file in storage.side_files(name):
        folder = os.path.dirname(file) or "."
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return True
    return False


def is_stored(shard: str, storage: Storage) -> bool:
    """Whether a valid index of the shard lies on disk."""
    return _from_cache(shard, storage, lambda _: True) is not None


def write_counts(shards: Sequence[str], tallies: Sequence[Tally], storage: Storage) -> bool:
    """`shards.counts.npz` for the folders of the shards; False if one of them could not be written."""
    written = True
    by_folder: dict[str, list[int]] = {}
    for number, shard in enumerate(shards):
        by_folder.setdefault(shard.rpartition("/")[0], []).append(number)
    for folder, numbers in by_folder.items():
        stamps = [storage.stamp(shards[number]) or (-1, -1) for number in numbers]
        written &= _write_npz(
            storage,
            _counts_name(folder),
            version=np.int64(_FORMAT_VERSION),
            **_packed(names=Strings.of(shards[number].rpartition("/")[2] for number in numbers)),
            stamps=np.array(stamps, dtype=np.int64),
            counts=np.array([tallies[number].samples for number in numbers], dtype=np.int64),
            digests=np.array([tallies[number].digest for number in numbers], dtype=np.uint64),
        )
    return written


def _counts_name(folder: str) -> str:
    return f"{folder}/{COUNTS_FILE}" if folder else COUNTS_FILE


def _read_counts(folder: str, storage: Storage) -> dict[str, tuple[tuple[int, int], Tally]]:
    """((size, mtime), tally) by shard name; empty where there is no such file."""
    for file in storage.side_files(_counts_name(folder)):
        with contextlib.suppress(*_UNREADABLE), np.load(file, allow_pickle=False) as cache:
            if cache["version"] == _FORMAT_VERSION:
                packed = _strings(cache, "names")
                names = [packed[number].decode(errors="surrogateescape") for number in range(len(packed))]
                stamps = map(tuple, cache["stamps"].tolist())
                tallies = map(Tally, cache["counts"].tolist(), cache["digests"].tolist())
                return dict(zip(names, zip(stamps, tallies, strict=True), strict=True))
    return {}
