"""The picks of an epoch where sources are restricted to subsets: how many each shard has, and which sample each is.

With weights a shard has a fixed number of picks in every epoch, its sum of weights (rounded so that the sums of all
shards add up), and a pick falls to a sample by systematic sampling with an offset that is drawn for (seed, epoch,
shard): a sample of weight w appears floor(w n / W) or one more times, w n / W on average (n picks, W sum of weights).
It is a function of (seed, epoch, shard, pick) alone, as everything in the order is.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data.errors import DataError
from data.order.stateless import uniform
from data.shards.index_store import IndexStore
from data.shards.subset import KeptTally, SubsetOfShards


class Picks:
    """The picks of an epoch of one source: how many a shard has, and which sample each is."""

    def __init__(
        self, subset: SubsetOfShards, tallies: Sequence[KeptTally], *, weighted: bool, seed: int, stream: str
    ) -> None:
        """tallies: of all shards of the source. weighted: whether a sample may appear more or less than once in an
        epoch. stream: name of the random stream. Raises DataError if nothing is kept.
        """
        self._subset, self._seed, self._stream = subset, seed, stream
        samples = np.array([tally.samples for tally in tallies], dtype=np.int64)
        if not samples.sum():
            nameless = sum(tally.nameless for tally in tallies)
            raise DataError(
                f"data.subset {subset.path} names no sample of the {len(tallies)} shards"
                f"{f', of whose samples {nameless:,} have no uid in their .json' if nameless else ''}: give the subset "
                "of these shards"
            )
        self._weighted = weighted
        borders = np.round(np.cumsum([0.0, *(tally.weight for tally in tallies)])).astype(np.int64)
        self.counts = np.diff(borders) if weighted else samples
        """int64 [shards]: picks of each shard in every epoch."""
        if not self.counts.sum():
            raise DataError(f"the weights of data.subset {subset.path} sum to less than one sample an epoch")

    def samples(self, epoch: int, shard: int, picks: np.ndarray) -> np.ndarray:
        """picks: int64 [n] of the shard in the epoch -> sample ids int64 [n]."""
        kept = self._subset.kept(shard).samples
        if self._weighted:
            sums = self._subset.cumulative_weights(shard)
            offset = uniform(self._seed, f"{self._stream}/picks/{epoch}", np.array([shard]), 1)[0, 0]
            points = (picks + offset) * (sums[-1] / self.counts[shard])
            picks = np.minimum(np.searchsorted(sums, points, side="right"), len(sums) - 1)
        return kept[picks].astype(np.int64)


class Subsets:
    """The subsets of all sources, over the joint list of their shards."""

    def __init__(self, subsets: Mapping[int, SubsetOfShards], borders: Sequence[int], indices: IndexStore) -> None:
        """subsets: by the number of their source. borders: id of each source's first shard, and how many shards."""
        self._subsets, self._borders, self._indices = subsets, borders, indices

    def tally(self, shards: Iterable[int]) -> list[KeptTally] | None:
        """What the shards of those ids have of their source's subset; None where no source has one. Reads metadata of
        the shards that were not looked through before.
        """
        return [self._tally(shard) for shard in shards] if self._subsets else None

    def _tally(self, shard: int) -> KeptTally:
        source = bisect_right(self._borders, shard) - 1
        if source in self._subsets:
            return self._subsets[source].tally(shard - self._borders[source])
        samples = int(self._indices.counts[shard])
        return KeptTally(samples, samples, 0, int(self._indices.digests[shard]))

    def picks(
        self, kept: Sequence[KeptTally] | None, *, weighted: bool, seed: int, streams: Sequence[str]
    ) -> dict[int, Picks]:
        """The picks of the sources that have a subset, by number. kept: of all shards. streams: of the sources."""
        return {
            source: Picks(
                subset,
                kept[self._borders[source] : self._borders[source + 1]],
                weighted=weighted and subset.is_weighted,
                seed=seed,
                stream=streams[source],
            )
            for source, subset in self._subsets.items()
            if kept is not None
        }

    def in_words(self, kept: Sequence[KeptTally] | None, names: Sequence[str]) -> list[str]:
        """Say what each source keeps of its samples, where it has a subset."""
        lines = []
        for source, subset in self._subsets.items():
            part = slice(*self._borders[source : source + 2])
            if kept is not None:
                lines.append(
                    f"{names[source]}: {_kept_in_words(subset, kept[part], int(self._indices.counts[part].sum()))}"
                )
        return lines


def _kept_in_words(subset: SubsetOfShards, kept: Sequence[KeptTally], of: int) -> str:
    nameless = sum(entry.nameless for entry in kept)
    return (
        f"{sum(entry.samples for entry in kept):,} of {of:,} samples are in {subset.path}"
        + (f", with weights of {sum(entry.weight for entry in kept):,.0f} an epoch" if subset.is_weighted else "")
        + (f"; {nameless:,} samples have no uid and are left out" if nameless else "")
    )
