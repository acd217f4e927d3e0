"""Memory of the data room stays bounded: over a long run, and over two billion samples."""

import multiprocessing
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.loader import PrefetchLoader
from data.order.order import SampleOrder
from data.reader import SampleReader
from data.shards.index import ShardIndex, Strings
from data.shards.index_store import COUNTS_FILE, IndexStore, Tally, _stamp, _write_index, write_counts
from data.shards.storage import Storage
from data.shards.write import write_shard
from tests.data.shard_factory import encode, picture

pytestmark = pytest.mark.slow
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SHARDS, SAMPLES, GROUP = 200_000, 10_000, 64


def _resident_mb(process: int | str) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_BYTES / 1e6


def test_a_run_of_100_000_samples(tmp_path: Path) -> None:
    image = encode(picture(0, 12, 12))
    for shard in range(20):
        samples = [(f"{shard}-{number}", {"png": image, "txt": b"a word"}) for number in range(1000)]
        write_shard(str(tmp_path / f"{shard:05d}.tar"), samples)
    config = DataConfig(shards=[str(tmp_path)], shuffle_group_shards=2)
    reader = SampleReader(config, image_size=16, context_length=8, seed=0, train=True)
    batches = (np.arange(first, last) for first, last in pairwise(range(0, 100_001, 500)))
    resident, keys = [], set()
    with PrefetchLoader(reader.read, batches, workers=1) as loader:
        for batch in loader:
            keys.update(batch.keys)
            (child,) = multiprocessing.active_children()
            resident.append((_resident_mb("self"), _resident_mb(child.pid or "self")))
    assert len(resident) == 200 and len(keys) == 20_000  # every sample, five times
    settled, end = np.array(resident[20:40]).max(axis=0), np.array(resident[-20:]).max(axis=0)
    assert (end - settled < 20).all(), f"megabytes after 20,000 samples {settled}, after 100,000 {end}"


def test_two_billion_samples(tmp_path: Path) -> None:
    tracemalloc.start()  # counts numpy's arrays too
    try:
        shards = [str(tmp_path / f"{number:06d}.tar") for number in range(SHARDS)]
        paths = tracemalloc.get_traced_memory()[0] / 1e6  # as long as this machine's temporary folder makes them
        for shard in shards:
            Path(shard).touch()
        storage = Storage()
        write_counts(shards, [Tally(SAMPLES, 0)] * SHARDS, storage)
        store = IndexStore(shards, max_loaded=2 * GROUP, storage=storage)
        order = SampleOrder(store.counts, seed=0, shuffle=True, group_shards=GROUP)
        assert order.total == 2_000_000_000 and (tmp_path / COUNTS_FILE).exists()
        order.locate(np.zeros(1, dtype=np.int64))
        ready = tracemalloc.get_traced_memory()[0] / 1e6 - paths
        in_use: set[int] = set()
        for first in range(0, 2 * GROUP * SAMPLES, 7_200):  # two groups, a batch at a time
            in_use.update(order.locate(np.arange(first, first + 7_200))[0].tolist())
        for number in in_use:
            _write_index(shards[number], storage, _index(), _stamp(shards[number], storage))
            assert store[number].key(5) == "000000005"
        full = tracemalloc.get_traced_memory()[0] / 1e6 - paths
    finally:
        tracemalloc.stop()
    print(f"order {ready:.0f} MB, groups in use {full - ready:.0f} MB")
    assert ready < 40 and full - ready < 150


def _index() -> ShardIndex:
    return ShardIndex(
        keys=Strings.of(f"{number:09d}" for number in range(SAMPLES)),
        spans=np.zeros((SAMPLES, 3, 2), dtype=np.int64),
        frames=np.empty((0, 2), dtype=np.int64),
        frame_starts=np.zeros(SAMPLES + 1, dtype=np.int64),
        texts=np.empty((0, 3), dtype=np.int64),
        text_starts=np.zeros(SAMPLES + 1, dtype=np.int64),
        text_names=Strings.of([]),
        sparse=np.empty((0, 3), dtype=np.int64),
        sparse_starts=np.zeros(1, dtype=np.int64),
        odd={},
        truncated=False,
        digest=0,
    )
