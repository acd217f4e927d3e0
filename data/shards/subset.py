"""Which samples of each shard a run is restricted to.

A subset (`data.subset`, `data/shards/subset_table.py`) names samples; shards are not rewritten. What a shard has of it
is found once, from its metadata or keys, and kept as `SHARD.subset-DIGEST.npz` beside its index.
"""

import contextlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from data.shards.index import Place, ShardIndex
from data.shards.index_store import ONE_THREAD, IndexStore
from data.shards.listing import ShardFiles
from data.shards.lru import Lru
from data.shards.storage import Storage
from data.shards.subset_table import (
    UID,
    SubsetTable,
    identifier_of_uid,
    identifiers_of_keys,
    open_subset,
    subset_digest,
)

_VERSION = 1
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
_MOST_METADATA_BYTES = 1 << 20


class KeptTally(NamedTuple):
    """What a shard has of a subset."""

    samples: int
    """Samples of the shard that are in the subset with a weight above 0."""
    weight: float
    """Sum of their weights; without weights their number."""
    nameless: int
    """Samples of the shard without a uid: they are left out."""
    digest: int
    """Hash (64 bits) of which samples they are, their weights, and the shard's own digest."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The samples of one shard that are in the subset."""

    samples: np.ndarray
    """int32 [k]: sample ids, rising."""
    weights: np.ndarray | None
    """float32 [k], above 0."""
    nameless: int
    """Samples without a uid."""

    def tally(self, index_digest: int) -> KeptTally:
        """The shard's entry in the list of all shards."""
        digest = blake2b(index_digest.to_bytes(8, "big") + self.samples.astype("<i4").tobytes(), digest_size=8)
        if self.weights is not None:
            digest.update(self.weights.astype("<f4").tobytes())
        weight = len(self.samples) if self.weights is None else float(self.weights.sum(dtype=np.float64))
        return KeptTally(len(self.samples), weight, self.nameless, int.from_bytes(digest.digest(), "big"))


class SubsetOfShards:
    """What the shards of one source have of one subset."""

    def __init__(
        self,
        path: str,
        weights: str,
        *,
        shards: Sequence[str],
        first: int,
        indices: IndexStore,
        files: ShardFiles,
        storage: Storage,
        max_loaded: int,
    ) -> None:
        """shards: of the source. first: id of the first of them in `indices` and `files`. Raises DataError for a file
        that cannot be used.
        """
        self.path = path
        self._weights, self._shards, self._first, self._storage = weights, shards, first, storage
        self._indices, self._files = indices, files
        self._digest = subset_digest(path, weights)
        self._loaded: Lru[int, Kept] = Lru(max_loaded, self._load)
        self._cumulative: Lru[int, np.ndarray] = Lru(max_loaded, self._sum_up)

    @property
    def is_weighted(self) -> bool:
        """Whether samples have weights."""
        return bool(self._weights)

    @cached_property
    def _table(self) -> SubsetTable:
        """The table is opened where a shard has to be looked through, and only there."""
        return open_subset(self.path, self._weights, self._storage)

    def tally(self, shard: int) -> KeptTally:
        """The entry of one shard of this source, by its place in it."""
        return self._loaded[shard].tally(self._digest_of(shard))

    def _digest_of(self, shard: int) -> int:
        """The shard's own digest, for which its index need not be opened."""
        return int(self._indices.digests[self._first + shard])

    def kept(self, shard: int) -> Kept:
        """What one shard has of the subset."""
        return self._loaded[shard]

    def cumulative_weights(self, shard: int) -> np.ndarray:
        """float64 [k]: running sums of the weights of `kept(shard)`."""
        return self._cumulative[shard]

    def _sum_up(self, shard: int) -> np.ndarray:
        kept = self._loaded[shard]
        weights = np.ones(len(kept.samples)) if kept.weights is None else kept.weights
        return np.cumsum(weights, dtype=np.float64)

    def _load(self, shard: int) -> Kept:
        digest = self._digest_of(shard)
        name = f"{self._shards[shard]}.subset-{self._digest}.npz"
        for file in self._storage.side_files(name):
            with ONE_THREAD.lock, contextlib.suppress(*_UNREADABLE), np.load(file, allow_pickle=False) as cache:
                if cache["version"] == _VERSION and cache["index"] == np.uint64(digest):
                    weights = cache["weights"] if self._weights else None
                    return Kept(samples=cache["samples"], weights=weights, nameless=int(cache["nameless"]))
        kept = self._look_through(shard, self._indices[self._first + shard])
        arrays: dict[str, Any] = {
            "version": np.int64(_VERSION),
            "index": np.uint64(digest),
            "samples": kept.samples,
            "nameless": np.int64(kept.nameless),
            **({} if kept.weights is None else {"weights": kept.weights}),
        }
        self._storage.write(name, lambda stream: np.savez(stream, **arrays))
        return kept

    def _look_through(self, shard: int, index: ShardIndex) -> Kept:
        if self._table.by == UID:
            found = [self._uid(shard, index, sample) for sample in range(len(index))]
            named = np.array([pair is not None for pair in found], dtype=bool)
            wanted = np.array([pair or (0, 0) for pair in found], dtype=np.uint64).reshape(-1, 2)
        else:
            wanted = identifiers_of_keys(index.keys[sample] for sample in range(len(index)))
            named = np.ones(len(index), dtype=bool)
        rows = np.where(named, self._table.find(wanted), -1)
        samples = np.flatnonzero(rows >= 0)
        weights = None
        if self._table.weights is not None:
            weights = np.asarray(self._table.weights[rows[samples]], dtype=np.float32)
            samples, weights = samples[weights > 0], weights[weights > 0]
        return Kept(samples=samples.astype(np.int32), weights=weights, nameless=int((~named).sum()))

    def _uid(self, shard: int, index: ShardIndex, sample: int) -> tuple[int, int] | None:
        span = index.span(sample, Place.METADATA)
        if span is None or span[1] > _MOST_METADATA_BYTES:
            return None
        content = index.read(span, partial(self._files.read, self._first + shard))
        try:
            metadata = json.loads(content)
        except (ValueError, RecursionError):
            return None
        return identifier_of_uid(metadata.get(UID)) if isinstance(metadata, Mapping) else None
