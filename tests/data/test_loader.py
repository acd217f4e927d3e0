"""Reader processes and the thread behind them change nothing but the waiting: same batches, order and errors; none is
left behind.
"""

import gc
import itertools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.loader import PrefetchLoader, _Ahead
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
    assert _none_is_left()
    assert next(loader, None) is None


def _none_is_left() -> bool:
    return not multiprocessing.active_children() and not any(
        thread.name == "batch ahead" for thread in threading.enumerate()
    )


def _numbers(positions: np.ndarray) -> int:
    """The number of the batch; that with the number 2 cannot be read."""
    if positions[0] == 12:
        raise DataError("the third is bad")
    return int(positions[0]) // 6


def _two(batches: Iterator[int]) -> list[int]:
    return [next(batches), next(batches)]


def test_one_batch_is_taken_ahead_and_what_was_met_arrives_in_its_order() -> None:
    for workers in (0, 2):
        with PrefetchLoader(_numbers, _batches(), workers=workers) as loader:
            assert [next(loader), next(loader)] == [0, 1]
            with pytest.raises(DataError, match=r"^the third is bad$"):
                next(loader)
            assert next(loader, None) is None and _none_is_left()
        with PrefetchLoader(_numbers, _batches(), workers=workers, take=_two) as loader:
            assert next(loader) == [0, 1]
            with pytest.raises(DataError, match=r"^the third is bad$"):
                next(loader)

    taken: list[int] = []

    def take(batches: Iterator[int]) -> int:
        taken.append(next(batches))
        if len(taken) == 2:
            raise ValueError("of the thread")
        return taken[-1]

    with PrefetchLoader(_numbers, _batches(), workers=1, take=take) as loader:
        ahead: Any = loader._ahead
        with ahead._changed:
            assert ahead._changed.wait_for(lambda: ahead._ready, 300) and taken == [0]  # before anything was asked for
        assert next(loader) == 0
        with ahead._changed:
            assert ahead._changed.wait_for(lambda: ahead._last is not None, 60) and taken == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="of the thread"):
                next(loader)
    assert _none_is_left()


def test_the_end_and_a_forgotten_loader_leave_no_thread() -> None:
    loader = PrefetchLoader(_numbers, _batches(2), workers=1)
    assert list(loader) == [0, 1] and next(loader, None) is None
    loader.close()
    assert _none_is_left()
    loader = PrefetchLoader(_numbers, _batches(), workers=1)
    assert next(loader) == 0
    del loader
    gc.collect()
    assert _none_is_left()


def test_a_loader_that_was_forked_with_leaves_the_other_process_alone() -> None:
    held, done = threading.Event(), threading.Event()

    def hold(lock: Any) -> None:  # as the thread may, at the moment of the fork
        with lock:
            held.set()
            done.wait()

    with PrefetchLoader(_numbers, _batches(2), workers=1) as loader:
        assert next(loader) == 0
        holder = threading.Thread(target=hold, args=(loader._ahead._changed,))  # type: ignore[union-attr]
        holder.start()
        held.wait()
        child = os.fork()
        if child == 0:
            loader.close()
            os._exit(0)
        ended, _, _ = select.select([os.pidfd_open(child)], [], [], 300)
        done.set()
        holder.join()
        assert ended and os.waitpid(child, 0)[1] == 0
        assert next(loader) == 1


_ORPHAN_MAKER = """
import itertools, multiprocessing, os, sys
import numpy as np
from tests.data.test_loader import _batches, _reader
from data.loader import PrefetchLoader
child = os.fork()
loader = PrefetchLoader(_reader(sys.argv[1:]).read, _batches(), workers=1)
next(loader)
if child == 0:
    raise SystemExit(3)  # nobody closes it
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
print(multiprocessing.active_children()[0].pid, flush=True)
sys.stdin.read()
"""


def test_readers_end_when_the_training_process_ends_without_closing_or_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ORPHAN_MAKER, *make_shards(tmp_path, [5])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        reader = os.pidfd_open(int(trainer.stdout.readline()))
        trainer.send_signal(signal.SIGKILL)
    ended, _, _ = select.select([reader], [], [], 300)
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


def _wait_for_ever(positions: np.ndarray) -> SampleBatch:
    select.select([], [], [])
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("dies", "stall_timeout_s", "words"),
    [(True, 300, "(killed by signal|exited unexpectedly)"), (False, 0.5, "timed out")],
)
def test_a_reader_that_dies_or_stalls_is_an_error(dies: bool, stall_timeout_s: float, words: str) -> None:
    with PrefetchLoader(_wait_for_ever, _batches(), workers=1, stall_timeout_s=stall_timeout_s) as loader:
        (reader,) = multiprocessing.active_children()
        main = threading.get_ident()

        def kill() -> None:
            while _Ahead.get.__code__ not in _functions_of(main):  # torch tells of the death wherever this thread is
                os.sched_yield()
            reader.kill()

        if dies:
            threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(DataError, match=rf"the readers gave no batch \(.*{words}.*data\.stall_timeout_s"):
            next(loader)
    assert multiprocessing.active_children() == []


def _functions_of(thread: int) -> list[CodeType]:
    frame: FrameType | None = sys._current_frames()[thread]
    found: list[CodeType] = []
    while frame is not None:
        found.append(frame.f_code)
        frame = frame.f_back
    return found


def test_a_reader_that_is_stopped_after_its_batch_was_queued_is_an_error(tmp_path: Path) -> None:
    with PrefetchLoader(_reader(make_shards(tmp_path, [9])).read, _batches(), workers=1, stall_timeout_s=0.5) as loader:
        (reader,) = multiprocessing.active_children()
        ahead: Any = loader._ahead
        with ahead._changed:
            assert ahead._changed.wait_for(lambda: ahead._ready, 300)
        queue = loader._readers.iterator._worker_result_queue  # type: ignore[union-attr]
        assert queue._reader.poll(300)  # the second batch is there, the memory that it names is still the reader's
        os.kill(reader.pid or 0, signal.SIGSTOP)
        os.waitid(os.P_PID, reader.pid or 0, os.WSTOPPED | os.WNOWAIT)
        next(loader)
        with pytest.raises(DataError, match=r"the readers gave no batch \(timed out after 0.5 .*data\.stall_timeout_s"):
            next(loader)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_close_does_not_wait_for_a_reader_that_hangs() -> None:
    loader = PrefetchLoader(_wait_for_ever, _batches(), workers=2)
    loader.close()
    assert multiprocessing.active_children() == []
