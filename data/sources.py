"""The shards of a data config with their indices and their order: what a reader reads from."""

import logging
from collections.abc import Sequence

import numpy as np

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.index import ShardIndex
from data.index_store import IndexStore
from data.mixture import Mixture, MixtureLaw, Switch, integer_weights
from data.order import SampleOrder
from data.shards import ShardFiles, expand_shards
from data.storage import Storage

_log = logging.getLogger(__name__)


class Sources:
    """One joint list of shards, in the order of the config, and the order of its samples.

    train: shuffled and mixed; otherwise all shards in the listed order, once, whatever the weights. Memory:
    the indices and open files of two shuffle groups a source (a batch may straddle two).
    """

    def __init__(
        self, config: DataConfig, *, seed: int, train: bool, global_batch_size: int, first_position: int = 0
    ) -> None:
        """first_position: where in the run the order begins. Raises DataError for an unusable shard, or a source
        without samples.
        """
        storage = Storage.of(config)
        lists = _shard_lists(config, storage)
        self.names = [source.name for source in config.sources]
        """Of the sources of a mixture; empty for plain data.shards."""
        self.shards = [shard for shards in lists for shard in shards]
        """Paths and URLs by shard id."""
        in_use = 2 * config.shuffle_group_shards * len(lists)
        self.files = ShardFiles(self.shards, max_open=in_use, storage=storage)
        self._indices = IndexStore(self.shards, max_loaded=in_use, storage=storage)
        self.order = (
            Mixture(
                _law(config, global_batch_size),
                *self._parts(config, [len(shards) for shards in lists], seed=seed),
                first_position=first_position,
            )
            if train
            else self._list()
        )
        """Positions to (shard, sample)."""

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, loaded when needed."""
        return self._indices[shard]

    def epochs_begun(self, first: int, last: int) -> list[str]:
        """In words: which sources start an epoch after their first one at positions [first, last)."""
        names = self.names or ["data.shards"]
        before, after = self.order.counts(first), self.order.counts(last)
        lines = []
        for name, total, was, now in zip(names, self.order.totals, before, after, strict=True):
            # the epoch of the last sample read: a source that is exactly used up has not started anew
            for epoch in range(max(was - 1, 0) // total + 1, max(now - 1, 0) // total + 1):
                lines.append(f"source {name} starts epoch {epoch + 1} of its {total:,} samples")
        return lines

    def counts(self, position: int) -> dict[str, int]:
        """Samples of each named source among the positions below `position`."""
        return dict(zip(self.names, self.order.counts(position), strict=True)) if self.names else {}

    def _list(self) -> Mixture:
        order = SampleOrder(self._indices.counts, seed=0, shuffle=False, group_shards=1)
        return Mixture(_single_law(), [order], [0])

    def _parts(self, config: DataConfig, sizes: Sequence[int], *, seed: int) -> tuple[list[SampleOrder], list[int]]:
        """The order of each source and the id of its first shard."""
        borders = np.cumsum([0, *sizes])
        orders = [
            SampleOrder(
                self._indices.counts[borders[number] : borders[number + 1]],
                seed=seed,
                shuffle=config.shuffle,
                group_shards=config.shuffle_group_shards,
                stream=f"order/{self.names[number]}" if self.names else "order",
            )
            for number in range(len(sizes))
        ]
        return orders, borders[:-1].tolist()


def check_shards(config: DataConfig) -> None:
    """Raise DataError for shards that are not there; opens none of them."""
    _shard_lists(config, Storage.of(config))


def _shard_lists(config: DataConfig, storage: Storage) -> list[list[str]]:
    """Paths and URLs of the shards of each source."""
    sources = config.sources or [SourceConfig(shards=config.shards)]
    return [expand_shards(source.shards, storage) for source in sources]


def _single_law() -> MixtureLaw:
    return MixtureLaw([Switch(start=0, weights=(1,))], turn_samples=1)


def _law(config: DataConfig, global_batch_size: int) -> MixtureLaw:
    if not config.sources:
        return _single_law()
    switches = [Switch(start=0, weights=integer_weights([source.weight for source in config.sources]))]
    for switch in config.mixture_schedule:
        weights = [switch.weights.get(source.name, 0.0) for source in config.sources]
        switches.append(Switch(start=switch.at_samples, weights=integer_weights(weights)))
    if config.mix == "one_per_batch" and global_batch_size < 1:
        raise DataError(f"data.mix=one_per_batch needs the global batch size, not {global_batch_size}")
    return MixtureLaw(switches, turn_samples=global_batch_size if config.mix == "one_per_batch" else 1)
