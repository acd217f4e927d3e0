"""The shards of a data config with their indices and their order: what a reader reads from."""

import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.order.mixture import Mixture, MixtureLaw, Switch, integer_weights
from data.order.order import SampleOrder
from data.order.subsets import Picks, Subsets
from data.pixels.features import Features
from data.shards.index import ShardIndex
from data.shards.index_store import IndexStore, Tally
from data.shards.listing import ShardFiles, expand_shards
from data.shards.remote import is_remote
from data.shards.storage import Storage
from data.shards.subset import KeptTally, SubsetOfShards
from data.shards.subset_table import check_subset

PLAIN_SOURCE = "data.shards"
"""Name of the one source of a config without data.sources, and of that source where others join it later."""
_PLAIN_SOURCE = re.compile(r"(?<![\w./-])data\.shards(?![\w/-])")
"""The option in an error, and no part of a path."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceSize:
    """What a job has of one source and makes of it."""

    name: str
    """The source's name; empty for plain data.shards."""
    shards: int
    """Tar files."""
    samples: int
    """Samples of one epoch."""
    epochs: float
    """Epochs of it between two positions of the run."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The shards of a data config, found once for all who read them."""

    lists: list[list[str]]
    """Paths and URLs of each source's shards."""
    tallies: Sequence[Tally]
    """Samples and digest of all shards, source after source."""
    kept: Sequence[KeptTally] | None = None
    """What all shards have of their subsets; None where no source has one."""


class Sources:
    """One joint list of shards, in the order of the config, and the order of its samples.

    train: shuffled and mixed; otherwise all shards in the listed order, once, whatever the weights. Memory:
    the indices and open files of two shuffle groups a source (a batch may straddle two).
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        train: bool,
        global_batch_size: int,
        first_position: int = 0,
        listing: Listing | None = None,
    ) -> None:
        """first_position: where in the run the order begins. listing: of the config's shards, if it is known. Raises
        DataError for an unusable shard, or a source without samples.
        """
        storage = Storage.of(config)
        lists = listing.lists if listing else _shard_lists(config, storage)
        _check_patience(config, lists)
        self.names = [source.name for source in config.sources]
        """Names of a mixture's sources; empty for plain data.shards."""
        self._shard_counts = [len(shards) for shards in lists]
        self.shards = [shard for shards in lists for shard in shards]
        """Paths and URLs by shard id."""
        in_use = 2 * config.shuffle_group_shards * len(lists)
        self.files = ShardFiles(self.shards, max_open=in_use, storage=storage)
        self._borders = np.cumsum([0, *map(len, lists)]).tolist()
        self._indices = IndexStore(
            self.shards, max_loaded=in_use, storage=storage, tallies=listing.tallies if listing else None
        )
        subsets = _subsets(config, self._borders, self.shards, self._indices, self.files, storage)
        self._subsets = Subsets(subsets, self._borders, self._indices)
        self.kept = self._subsets.tally(range(len(self.shards))) if listing is None else listing.kept
        """What each shard has of its source's subset; None where no source has one."""
        self._config, self._seed, self._train = config, seed, train
        self._global_batch_size, self._first_position = global_batch_size, first_position

    @cached_property
    def order(self) -> Mixture:
        """Positions to (shard, sample)."""
        if not self._train:
            return self._list()
        law = _law(self._config, self._global_batch_size)
        return Mixture(law, *self._orders(self._config, seed=self._seed), first_position=self._first_position)

    @property
    def counts_of_shards(self) -> np.ndarray:
        """int64 [shards]: samples by shard id, of a subset those that are in it."""
        return self._indices.counts if self.kept is None else np.array([kept.samples for kept in self.kept])

    @property
    def digests_of_shards(self) -> np.ndarray:
        """uint64 [shards]: `ShardIndex.digest` by shard id, of a subset with what is in it."""
        if self.kept is None:
            return self._indices.digests
        return np.array([kept.digest for kept in self.kept], dtype=np.uint64)

    @property
    def tallies(self) -> Sequence[Tally]:
        """What is known of every shard by its id, whatever its subset."""
        return self._indices.tallies

    def features(self, path: str, image_size: int) -> Features:
        """The rows of `data.features` for these shards. Raises DataError if they are not of them."""
        return Features(
            path,
            shards=self.shards,
            samples=[tally.samples for tally in self.tallies],
            digests=[tally.digest for tally in self.tallies],
            image_size=image_size,
        )

    def subsets(self) -> list[str]:
        """Say in words what each source keeps of its samples, where it has a subset."""
        return self._subsets.in_words(self.kept, [called(name) for name in self.parts()])

    def parts(self) -> dict[str, slice]:
        """The shard ids of each source by its name."""
        names = self.names or [PLAIN_SOURCE]
        return {name: slice(*ends) for name, ends in zip(names, pairwise(self._borders), strict=True)}

    def odd(self) -> dict[str, int]:
        """What all shards hold beside samples, by the names of `data.shards.index.ODD`; loads every index."""
        total: Counter[str] = Counter()
        for shard in range(len(self.shards)):
            total.update(self._indices[shard].odd)
        return dict(total.most_common())

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, loaded when needed."""
        return self._indices[shard]

    def epochs_begun(self, first: int, last: int) -> list[str]:
        """Say in words which sources start an epoch after their first one at positions [first, last)."""
        names = self.names or [PLAIN_SOURCE]
        before, after = self.order.counts(first), self.order.counts(last)
        lines = []
        for name, total, was, now in zip(names, self.order.totals, before, after, strict=True):
            # the epoch of the last sample read: a source that is exactly used up has not started anew
            for epoch in range(max(was - 1, 0) // total + 1, max(now - 1, 0) // total + 1):
                lines.append(f"{called(name)} starts epoch {epoch + 1} of its {total:,} samples")
        return lines

    def sizes(self, first: int, last: int) -> list[SourceSize]:
        """Every source, with its epochs at positions [first, last)."""
        before, after = self.order.counts(first), self.order.counts(last)
        return [
            SourceSize(name=name, shards=shards, samples=total, epochs=(now - was) / total)
            for name, shards, total, was, now in zip(
                self.names or [""], self._shard_counts, self.order.totals, before, after, strict=True
            )
        ]

    def copies_within(self, samples: int) -> list[str]:
        """Say in words which sources are so small that `samples` positions in a row hold a pair twice."""
        taken = self.order.most_in_a_row(samples)
        return [
            f"{called(name)} has {total:,} samples, but a global batch takes {most:,} of it: copies of a pair meet as "
            "negatives of each other; use more data, or a smaller train.global_batch_size"
            for name, total, most in zip(self.parts(), self.order.totals, taken, strict=True)
            if most > total
        ]

    def counts(self, position: int) -> dict[str, int]:
        """Samples of each named source among the positions below `position`."""
        return dict(zip(self.names, self.order.counts(position), strict=True)) if self.names else {}

    def _list(self) -> Mixture:
        picks = self._picks(weighted=False, seed=0)
        counts = self._indices.counts.copy()
        for source, of_source in picks.items():
            counts[slice(*self._borders[source : source + 2])] = of_source.counts

        def pick(epoch: int, shard: int, places: np.ndarray) -> np.ndarray:
            source = bisect_right(self._borders, shard) - 1
            return picks[source].samples(epoch, shard - self._borders[source], places) if source in picks else places

        order = SampleOrder(counts, seed=0, shuffle=False, group_shards=1, pick=pick if picks else None)
        return Mixture(MixtureLaw([Switch(start=0, weights=(1,))], turn_samples=1), [order], [0])

    def _picks(self, *, weighted: bool, seed: int) -> dict[int, Picks]:
        """The picks of the sources that have a subset, by number."""
        streams = [_stream(name) for name in self.parts()]
        return self._subsets.picks(self.kept, weighted=weighted, seed=seed, streams=streams)

    def _orders(self, config: DataConfig, *, seed: int) -> tuple[list[SampleOrder], list[int]]:
        """The order of each source and the id of its first shard."""
        picks = self._picks(weighted=True, seed=seed)
        orders = [
            SampleOrder(
                picks[source].counts if source in picks else self._indices.counts[part],
                seed=seed,
                shuffle=config.shuffle,
                group_shards=config.shuffle_group_shards,
                stream=_stream(name),
                pick=picks[source].samples if source in picks else None,
            )
            for source, (name, part) in enumerate(self.parts().items())
        ]
        return orders, self._borders[:-1]


@contextmanager
def shards_of(option: str) -> Iterator[None]:
    """Have a DataError name the option that the shards were given by, where that is not data.shards."""
    try:
        yield
    except DataError as error:
        raise DataError(_PLAIN_SOURCE.sub(option, str(error))) from error


def called(name: str) -> str:
    """The source's name in a sentence."""
    return name if name == PLAIN_SOURCE else f"source {name}"


def _stream(name: str) -> str:
    """Name of the source's random stream."""
    return "order" if name == PLAIN_SOURCE else f"order/{name}"


def owners(config: DataConfig) -> Sequence[SourceConfig | DataConfig]:
    """The parts of the config that name the shards of each source: entries of data.sources, or the config itself."""
    return config.sources or [config]


def _subsets(
    config: DataConfig,
    borders: Sequence[int],
    shards: Sequence[str],
    indices: IndexStore,
    files: ShardFiles,
    storage: Storage,
) -> dict[int, SubsetOfShards]:
    """The subsets by the number of their source."""
    return {
        source: SubsetOfShards(
            owner.subset,
            owner.subset_weights,
            shards=shards[first:last],
            first=first,
            indices=indices,
            files=files,
            storage=storage,
            max_loaded=2 * config.shuffle_group_shards,
        )
        for source, (owner, (first, last)) in enumerate(zip(owners(config), pairwise(borders), strict=True))
        if owner.subset
    }


def check_shards(config: DataConfig) -> None:
    """Raise DataError for shards or subsets that are not there; opens no shard."""
    shard_lists(config)
    for owner in owners(config):
        if owner.subset:
            check_subset(owner.subset, owner.subset_weights)


def shard_lists(config: DataConfig) -> list[list[str]]:
    """Paths and URLs of the shards of each source. Raises DataError for shards that are not there."""
    return _shard_lists(config, Storage.of(config))


def tally_shards(config: DataConfig, shards: Sequence[str]) -> list[Tally]:
    """Samples and digest of the shards, from their indices, which are built where there are none. Raises DataError."""
    return list(IndexStore(shards, max_loaded=1, storage=Storage.of(config)).tallies)


def _shard_lists(config: DataConfig, storage: Storage) -> list[list[str]]:
    """Paths and URLs of the shards of each source."""
    return [expand_shards(owner.shards, storage) for owner in owners(config)]


def tally_kept(config: DataConfig, listing: Listing, shards: Iterable[int]) -> list[KeptTally]:
    """What the shards of those ids have of the subsets of a config that has some. Raises DataError."""
    return Sources(config, seed=0, train=False, global_batch_size=1, listing=listing)._subsets.tally(shards) or []


def _check_patience(config: DataConfig, lists: list[list[str]]) -> None:
    """The readers must not be taken for lost while they wait for a store."""
    remote = next((shard for shards in lists for shard in shards if is_remote(shard)), None)
    if remote is not None and 0 < config.stall_timeout_s <= config.remote_patience_s:
        raise DataError(
            f"{remote} is remote and data.remote_patience_s={config.remote_patience_s:g} is not below "
            f"data.stall_timeout_s={config.stall_timeout_s:g}: waiting readers would be taken for lost; lower the one "
            "or raise the other"
        )


def weight_switches(config: DataConfig) -> list[tuple[int, dict[str, int]]]:
    """(first position, positive integer weights by source name) for every stretch of the schedule."""
    if not config.sources:
        return [(0, {PLAIN_SOURCE: 1})]
    stretches = [
        (0, {source.name: source.weight for source in config.sources}),
        *((switch.at_samples, switch.weights) for switch in config.mixture_schedule),
    ]
    names = [source.name for source in config.sources]
    whole = [(start, integer_weights([weights.get(name, 0.0) for name in names])) for start, weights in stretches]
    return [(start, {name: w for name, w in zip(names, weights, strict=True) if w}) for start, weights in whole]


def _law(config: DataConfig, global_batch_size: int) -> MixtureLaw:
    names = [source.name for source in config.sources] or [PLAIN_SOURCE]
    switches = [
        Switch(start=start, weights=tuple(weights.get(name, 0) for name in names))
        for start, weights in weight_switches(config)
    ]
    one_per_batch = bool(config.sources) and config.mix == "one_per_batch"
    if one_per_batch and global_batch_size < 1:
        raise DataError(f"data.mix=one_per_batch needs the global batch size, not {global_batch_size}")
    return MixtureLaw(switches, turn_samples=global_batch_size if one_per_batch else 1)
