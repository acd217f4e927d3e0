"""Reader processes change nothing but the waiting: same batches, order and errors; none is left behind."""

import itertools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.loader import PrefetchLoader
from data.reader import SampleBatch, SampleReader
from data.shards.write import write_shard
from tests.data.shard_factory import good_sample, make_shards


def _reader(shards: list[str]) -> SampleReader:
    return SampleReader(DataConfig(shards=shards), image_size=16, context_length=8, seed=0, train=True)


def _batches(count: int | None = None) -> itertools.islice:
    return itertools.islice((np.arange(6 * step, 6 * step + 6) for step in itertools.count()), count)


def _read(shards: list[str], workers: int) -> list[SampleBatch]:
    with PrefetchLoader(_reader(shards).read, _batches(9), workers=workers) as loader:
        return list(loader)


def test_readers_give_the_batches_of_one_process(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [7, 5, 8])
    alone, forked = _read(shards, 0), _read(shards, 2)
    assert len(alone) == len(forked) == 9
    for one, other in zip(alone, forked, strict=True):
        assert one.keys == other.keys and one.captions == other.captions
        assert one.images.equal(other.images) and one.tokens.equal(other.tokens)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_of_a_reader_arrives_as_it_was(tmp_path: Path, workers: int) -> None:
    path = str(tmp_path / "bad.tar")
    write_shard(path, [("bad", {"png": b"", "txt": b"words"})])
    with (
        PrefetchLoader(_reader([path]).read, _batches(), workers=workers) as loader,
        pytest.raises(DataError, match=r"^all 1 samples are bad from position 0 on"),
    ):
        next(loader)


def test_close_ends_the_readers_of_an_endless_loader(tmp_path: Path) -> None:
    loader = PrefetchLoader(_reader(make_shards(tmp_path, [5])).read, _batches(), workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []
    assert next(loader, None) is None


_ORPHAN_MAKER = """
import itertools, multiprocessing, sys
import numpy as np
from tests.data.test_loader import _batches, _reader
from data.loader import PrefetchLoader
loader = PrefetchLoader(_reader(sys.argv[1:]).read, _batches(), workers=1)
next(loader)
print(multiprocessing.active_children()[0].pid, flush=True)
sys.stdin.read()
"""


def test_readers_end_when_the_training_process_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ORPHAN_MAKER, *make_shards(tmp_path, [5])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        reader = os.pidfd_open(int(trainer.stdout.readline()))
        trainer.send_signal(signal.SIGKILL)
    ended, _, _ = select.select([reader], [], [], 60)
    os.close(reader)
    assert ended


@pytest.mark.parametrize(("workers", "prefetch"), [(-1, 2), (1, 0)])
def test_wrong_settings_are_an_error(tmp_path: Path, workers: int, prefetch: int) -> None:
    with pytest.raises(DataError, match="workers="):
        PrefetchLoader(_reader(make_shards(tmp_path, [1])).read, _batches(), workers=workers, prefetch=prefetch)


def test_fetching_in_the_readers_and_decoding_here_is_reading(tmp_path: Path) -> None:
    # as with DALI on the GPU, which only the training process can use
    path = str(tmp_path / "x.tar")
    write_shard(
        path, [good_sample(0), ("torn", {"png": good_sample(1)[1]["png"][:90], "txt": b"words"}), good_sample(2)]
    )
    whole, reader = _reader([path]).read(np.arange(12)), _reader([path])
    with PrefetchLoader(reader.fetch, [np.arange(6), np.arange(6, 12)], workers=1) as loader:
        batches = [reader.decode(encoded) for encoded in loader]
    assert [key for batch in batches for key in batch.keys] == whole.keys
    assert [bad for batch in batches for bad in batch.bad] == whole.bad and len(whole.bad) == 4
    assert all(batch.images.equal(whole.images[6 * n : 6 * n + 6]) for n, batch in enumerate(batches))


def test_a_rank_without_rows_reads_an_empty_batch(tmp_path: Path) -> None:
    batch = _reader(make_shards(tmp_path, [2])).read(np.arange(0))
    assert batch.images.shape == (0, 3, 16, 16) and batch.tokens.shape == (0, 8)


def _die(positions: np.ndarray) -> SampleBatch:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _wait_for_ever(positions: np.ndarray) -> SampleBatch:
    select.select([], [], [])
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (_die, "(killed by signal|exited unexpectedly)"),
        pytest.param(_wait_for_ever, "timed out after 1", marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_dies_or_stalls_is_an_error(read: Callable[[np.ndarray], SampleBatch], words: str) -> None:
    with (
        PrefetchLoader(read, _batches(), workers=1, stall_timeout_s=1) as loader,
        pytest.raises(DataError, match=rf"the readers gave no batch \(.*{words}.*data\.stall_timeout_s"),
    ):
        next(loader)
    assert multiprocessing.active_children() == []


def test_a_reader_that_is_stopped_after_its_batch_was_queued_is_an_error(tmp_path: Path) -> None:
    with PrefetchLoader(_reader(make_shards(tmp_path, [9])).read, _batches(), workers=1, stall_timeout_s=2) as loader:
        (reader,) = multiprocessing.active_children()
        queue = loader._iterator._worker_result_queue  # type: ignore[union-attr]
        assert queue._reader.poll(60)  # the batch is there, the memory that it names is still the reader's
        os.kill(reader.pid or 0, signal.SIGSTOP)
        os.waitid(os.P_PID, reader.pid or 0, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(DataError, match=r"the readers gave no batch .*data\.stall_timeout_s"):
            for _ in range(3):
                next(loader)
    assert multiprocessing.active_children() == []
