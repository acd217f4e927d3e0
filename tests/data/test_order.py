"""The global order: a bijection per epoch that knows nothing of ranks, batches or readers."""

import numpy as np
import pytest

from data.errors import DataError
from data.order.order import SampleOrder

COUNTS = np.array([5, 1, 0, 7, 3, 11, 2, 4])
TOTAL = int(COUNTS.sum())


def _order(seed: int = 0, *, shuffle: bool = True, group_shards: int = 3) -> SampleOrder:
    return SampleOrder(COUNTS, seed=seed, shuffle=shuffle, group_shards=group_shards)


def _pairs(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    shards, samples = order.locate(positions)
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


ALL = [(shard, sample) for shard, count in enumerate(COUNTS.tolist()) for sample in range(count)]


@pytest.mark.parametrize("group_shards", [1, 3, 8, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_epoch_is_a_bijection(epoch: int, group_shards: int) -> None:
    positions = np.arange(epoch * TOTAL, (epoch + 1) * TOTAL)
    assert sorted(_pairs(_order(group_shards=group_shards), positions)) == ALL


def test_without_shuffle_the_listed_order_repeats() -> None:
    assert _pairs(_order(shuffle=False), np.arange(2 * TOTAL)) == ALL + ALL


def test_a_function_of_seed_and_epoch_alone() -> None:
    positions = np.arange(3 * TOTAL)
    whole = _pairs(_order(), positions)
    used = _order()
    scrambled = np.random.default_rng(0).permutation(positions)  # other batches, other access order, same answer
    parts = [_pairs(used, part) for part in np.array_split(scrambled, 13)]
    found = dict(zip(scrambled.tolist(), [pair for part in parts for pair in part], strict=True))
    assert [found[position] for position in positions.tolist()] == whole


def test_epochs_and_seeds_differ() -> None:
    first, second = (_pairs(_order(), np.arange(epoch * TOTAL, (epoch + 1) * TOTAL)) for epoch in (0, 1))
    assert first != second
    assert first != _pairs(_order(seed=1), np.arange(TOTAL))


def test_samples_mix_within_a_group_of_shards_only() -> None:
    order = SampleOrder(np.full(12, 50), seed=3, shuffle=True, group_shards=4)
    shards, _ = order.locate(np.arange(600))
    groups = [set(shards[start : start + 200].tolist()) for start in (0, 200, 400)]
    assert [len(group) for group in groups] == [4, 4, 4]
    assert set.union(*groups) == set(range(12))
    assert all(len(set(shards[start : start + 25].tolist())) > 1 for start in range(0, 600, 25))


def test_the_order_of_a_run_stays_what_it_was() -> None:
    # Checkpoints store a position: another order for the same seed would silently repeat and skip samples.
    assert _pairs(_order(seed=7), np.arange(8)) == [
        (5, 6),
        (5, 4),
        (5, 1),
        (4, 2),
        (5, 5),
        (5, 8),
        (5, 0),
        (5, 3),
    ]


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(DataError, match="the 2 shards hold no sample"):
        SampleOrder(np.zeros(2), seed=0, shuffle=True, group_shards=1)
    with pytest.raises(DataError, match="shuffle_group_shards is 0"):
        _order(group_shards=0)
