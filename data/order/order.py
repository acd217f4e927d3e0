"""The global sample order: one integer position names a sample of the whole run.

Position = epoch x total + place within the epoch. In every epoch the shards are permuted, and the samples are
permuted within groups of `group_shards` consecutive (permuted) shards: mixing as good as a shuffle buffer of
a whole group, while only one group of indices is in use at a time. The order is a function of (seed, epoch)
alone; ranks, micro-batches and readers have no part in it, so a run resumes at a position under any layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.order.stateless import permutation
from data.shards.lru import Lru

_EPOCHS_KEPT = 2  # a batch may straddle the end of an epoch
_GROUPS_KEPT = 4

Pick = Callable[[int, int, np.ndarray], np.ndarray]
"""(epoch, shard, places within the shard int64 [n]) to sample ids int64 [n]."""


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    shards: np.ndarray
    """int64 [shards]: shard ids in the order of this epoch."""
    starts: np.ndarray
    """int64 [shards + 1]: first place of each of them within the epoch, and the total."""


class SampleOrder:
    """Maps positions to samples; see the module text for the law.

    counts: int64 [shards], samples of each shard. Memory: 16 bytes a shard, and 8 bytes a sample of four
    groups.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        seed: int,
        shuffle: bool,
        group_shards: int,
        stream: str = "order",
        pick: Pick | None = None,
    ) -> None:
        """stream: name of the random stream; sources of a mixture differ in it, so that two with equal shards
        do not walk through them in step. pick: where a shard's samples are chosen from more (`data.subset`), says which
        they are; without it they are 0, 1, 2, ...
        """
        if group_shards < 1:
            raise DataError(f"data.shuffle_group_shards is {group_shards}: it must be at least 1")
        self._counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self._counts.sum())
        """Samples of one epoch."""
        if self.total == 0:
            raise DataError(f"the {len(self._counts)} shards hold no sample")
        self._seed = seed
        self._stream = stream
        self._shuffle = shuffle
        self._group_shards = group_shards
        self._pick = pick
        self._epochs: Lru[int, _Epoch] = Lru(_EPOCHS_KEPT, self._make_epoch)
        self._groups: Lru[tuple[int, int], np.ndarray] = Lru(_GROUPS_KEPT, self._make_group)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions int64 [n] (>= 0, any order) -> (shard ids int64 [n], sample ids within the shard int64
        [n]).
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.total)
        shard_ids, sample_ids = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            shard_ids[rows], sample_ids[rows] = self._locate_in_epoch(epoch, places[rows])
        return shard_ids, sample_ids

    def _locate_in_epoch(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self._epochs[epoch]
        if self._shuffle:
            places = self._shuffle_places(epoch, table, places)
        ranks = np.searchsorted(table.starts, places, side="right") - 1
        shards, samples = table.shards[ranks], places - table.starts[ranks]
        if self._pick is not None:
            for shard in np.unique(shards).tolist():
                rows = shards == shard
                samples[rows] = self._pick(epoch, shard, samples[rows])
        return shards, samples

    def _shuffle_places(self, epoch: int, table: _Epoch, places: np.ndarray) -> np.ndarray:
        group_starts = table.starts[: -1 : self._group_shards]
        groups = np.searchsorted(group_starts, places, side="right") - 1
        shuffled = np.empty_like(places)
        for group in np.unique(groups).tolist():
            rows = groups == group
            start = group_starts[group]
            shuffled[rows] = start + self._groups[epoch, group][places[rows] - start]
        return shuffled

    def _make_epoch(self, epoch: int) -> _Epoch:
        count = len(self._counts)
        shards = permutation(self._seed, f"{self._stream}/shards/{epoch}", count) if self._shuffle else np.arange(count)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._counts[shards])])
        return _Epoch(shards=shards, starts=starts)

    def _make_group(self, key: tuple[int, int]) -> np.ndarray:
        epoch, group = key
        first = group * self._group_shards
        starts = self._epochs[epoch].starts
        last = min(first + self._group_shards, len(self._counts))
        return permutation(self._seed, f"{self._stream}/samples/{epoch}/{group}", int(starts[last] - starts[first]))
