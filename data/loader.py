"""Batches prepared ahead by reader processes, delivered in order."""

import ctypes
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError

Batch = TypeVar("Batch")
_PR_SET_PDEATHSIG = 1
_MOST_SLACK_S = 30.0  # torch's own time-out comes first where it works
_READER_LOST = ("exited unexpectedly", "killed by signal", "timed out")  # of torch's messages


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

    workers: reader processes (0: read in this process when asked). prefetch: batches that each prepares
    ahead. stall_timeout_s: no batch for so long is an error; 0 waits for ever. The readers are forked: they
    share the reader's indices and start at once, where a spawned process would import the training program
    anew. They end with `close()`, with the loader, and within seconds of this process's death. Raises
    DataError (from next()) with a reader's own message, or when a reader died or stalls.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Batch],
        batches: Iterable[np.ndarray],
        *,
        workers: int,
        prefetch: int = 2,
        stall_timeout_s: float = 0,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise DataError(f"data.workers={workers} must be >= 0, and batches prepared ahead {prefetch} >= 1")
        loader: DataLoader = DataLoader(
            _ReadBatches(read),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_init_worker,
            multiprocessing_context="fork" if workers else None,
            timeout=stall_timeout_s if workers else 0,
        )
        others = set(multiprocessing.active_children())
        self._iterator: Iterator[Batch | DataError] | None = iter(loader)
        self._readers = [child for child in multiprocessing.active_children() if child not in others]
        self._stall_timeout_s = stall_timeout_s if workers else 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            with self._readers_end_if_stalled() as stalled:
                batch = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if not (stalled.is_set() or any(words in str(error) for words in _READER_LOST)):
                raise
            self.close()
            raise DataError(
                f"the readers gave no batch ({error}): a reader died (out of memory? lower data.prefetch_batches or "
                "data.workers) or waits for storage longer than data.stall_timeout_s"
            ) from error
        if isinstance(batch, DataError):
            self.close()
            raise batch
        return batch

    @contextmanager
    def _readers_end_if_stalled(self) -> Iterator[threading.Event]:
        """Kills the readers when the block takes longer than the time-out and torch has not noticed: a reader that is
        stopped after its batch was queued leaves this process waiting in the hand-over of the batch's memory, which has
        no time-out of its own. Yields whether that was done.
        """
        stalled = threading.Event()

        def end() -> None:
            stalled.set()
            for reader in self._readers:
                reader.kill()

        if not self._stall_timeout_s:
            yield stalled
            return
        timer = threading.Timer(self._stall_timeout_s + min(self._stall_timeout_s, _MOST_SLACK_S), end)
        timer.daemon = True
        timer.start()
        try:
            yield stalled
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the readers; prepared batches are dropped. May be called twice."""
        self._iterator = None  # the iterator's finaliser stops and joins its processes
        for reader in self._readers:
            if reader.is_alive():  # it hangs, and readers ignore what torch ends them with
                reader.kill()
                reader.join()

    def __enter__(self) -> "PrefetchLoader[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """A console handler inherited by the fork may hold a lock that a thread of the parent had: use a fresh
    one.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # whoever signals all processes of a job means the training process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with it the readers end, however it ends
    log = logging.getLogger("data")
    log.handlers = [logging.StreamHandler()]
    log.propagate = False
