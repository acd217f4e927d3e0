"""Batches prepared ahead by reader processes, delivered in order.

Behind the readers a thread of the training process has the next batch ready: it takes the readers' memory over, which
waits for the hand-over and copies, while the step before runs. What the thread meets, an error or the end, arrives in
its order, when that batch is asked for.
"""

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError

Batch = TypeVar("Batch")
_PR_SET_PDEATHSIG = 1
_PATIENCE_S = 5.0  # torch's own, for a reader that is asked to end
_READER_LOST = ("exited unexpectedly", "killed by signal")  # of torch's messages


class _ReadBatches(Dataset[Any]):
    """Map-style: the "index" is an array of positions, the value its batch, or the error that reading it
    gave.
    """

    def __init__(self, read: Callable[[np.ndarray], Any]) -> None:
        self._read = read

    def __getitem__(self, positions: np.ndarray) -> Any:
        try:
            return self._read(positions)
        except DataError as error:
            return error  # raised in the training process, without the traceback of a reader process


class PrefetchLoader(Generic[Batch]):
    """Iterates over `read(positions)` of each array in `batches`, in order; `batches` may be endless.

    workers: reader processes (0: read in this process when asked, without a thread). prefetch: batches that each
    prepares ahead. stall_timeout_s: no batch for so long after it was asked for is an error; 0 waits for ever. take:
    makes what next() gives of the batches in their order, such as several in one; it runs one ahead, in the thread. The
    readers are forked: they share the reader's indices and start at once, where a spawned process would import the
    training program anew. Readers and thread end with `close()`, with the loader or the program, and within seconds of
    this process's death. Raises DataError (from next()) with a reader's own message, or when a reader died or stalls.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Any],
        batches: Iterable[np.ndarray],
        *,
        workers: int,
        prefetch: int = 2,
        stall_timeout_s: float = 0,
        take: Callable[[Iterator[Any]], Batch] = next,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise DataError(f"data.workers={workers} must be >= 0, and batches prepared ahead {prefetch} >= 1")
        self._readers = _Readers(read, batches, workers, prefetch)
        self._take = take
        self._ahead = _Ahead(self._readers, take) if workers else None
        self._stall_timeout_s = stall_timeout_s or None
        self._end = weakref.finalize(self, _end, self._readers, self._ahead, os.getpid())
        # Before multiprocessing, which waits at exit for its processes: readers are deaf to what it ends them with.
        self._end.atexit = False
        atexit.register(self._end)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._end.alive:
            raise StopIteration
        try:
            return self._take(self._readers) if self._ahead is None else self._ahead.get(self._stall_timeout_s)
        except DataError:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if not (isinstance(error, TimeoutError) or any(words in str(error) for words in _READER_LOST)):
                raise
            self._readers.kill()
            self.close()
            raise DataError(
                f"the readers gave no batch ({error}): a reader died (out of memory? lower data.prefetch_batches or "
                "data.workers) or waits for storage longer than data.stall_timeout_s"
            ) from error

    def close(self) -> None:
        """Ends readers and thread; prepared batches are dropped. May be called twice."""
        self._end()
        atexit.unregister(self._end)

    def __enter__(self) -> "PrefetchLoader[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Readers:
    """The reader processes, and an iterator over what they give; a reader's DataError is raised."""

    def __init__(
        self, read: Callable[[np.ndarray], Any], batches: Iterable[np.ndarray], workers: int, prefetch: int
    ) -> None:
        loader: DataLoader = DataLoader(
            _ReadBatches(read),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_init_worker,
            multiprocessing_context="fork" if workers else None,
        )
        others = set(multiprocessing.active_children())
        self.iterator: Iterator[Any] | None = iter(loader)
        self._processes: list[BaseProcess] = [
            child for child in multiprocessing.active_children() if child not in others
        ]
        self.killed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.iterator is None:
            raise StopIteration
        batch = next(self.iterator)
        if isinstance(batch, DataError):
            raise batch
        return batch

    def kill(self) -> None:
        """End them without asking: whoever waits for their batches or their memory hears that they are gone."""
        for _ in range(2):
            with suppress(RuntimeError):  # torch's, which the first dead reader raises once in the main thread
                for process in self._processes:
                    process.kill()
                    process.join()
        self.killed = True

    def end(self) -> None:
        """Let each finish what it reads, and kill those that hang."""
        self.iterator = None  # its finaliser stops and joins the processes
        if any(process.is_alive() for process in self._processes):  # readers ignore what torch ends them with
            self.kill()


class _Ahead(Generic[Batch]):
    """A thread that has the next batch ready, and no more than that one."""

    def __init__(self, readers: _Readers, take: Callable[[Iterator[Any]], Batch]) -> None:
        self._readers, self._take_one = readers, take
        self._changed = threading.Condition()
        self._ready: list[Batch] = []
        self._last: BaseException | None = None
        """What ended the thread: StopIteration, or an error."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batch ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._may_take():
            try:
                batch = self._take_one(self._readers)
            except BaseException as error:  # whatever it is, the one who asks must hear of it
                with self._changed:
                    self._last = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(batch)
                self._changed.notify_all()
            del batch  # its memory is the receiver's

    def _may_take(self) -> bool:
        """Wait until the last batch was fetched; False when there shall be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or not self._ready)
            return not self._stopping

    def get(self, timeout_s: float | None) -> Batch:
        """The next batch, or what ended the thread. Raises TimeoutError when there is neither for so long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._last is not None, timeout_s):
                raise TimeoutError(f"timed out after {timeout_s:g} seconds")
            if not self._ready:
                assert self._last is not None
                raise self._last
            batch = self._ready.pop()
            self._changed.notify_all()
            return batch

    def stop(self, patience_s: float) -> bool:
        """Take no other batch. Whether the thread has ended within so long: it waits for the one that it is taking."""
        with self._changed:
            self._stopping = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(patience_s)
        return not self._thread.is_alive()


def _end(readers: _Readers, ahead: _Ahead | None, owner: int) -> None:
    """The thread first, since it uses the readers. owner: process that has them; a copy of the loader in one that was
    forked has neither.
    """
    if os.getpid() != owner:
        return
    # Without readers the thread ends when torch looks for them next, within seconds.
    if ahead is not None and not ahead.stop(0 if readers.killed else _PATIENCE_S):
        readers.kill()
    readers.end()


def _as_it_is(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """A console handler inherited by the fork may hold a lock that a thread of the parent had: use a fresh
    one.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever signals all processes of a job means the training process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with it the readers end, however it ends
    log = logging.getLogger("data")
    log.handlers = [logging.StreamHandler()]
    log.propagate = False
