"""Batches prepared ahead by reader processes, delivered in order."""

import ctypes
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError

Batch = TypeVar("Batch")
_PR_SET_PDEATHSIG = 1
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
        self._iterator: Iterator[Batch | DataError] | None = iter(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if not any(words in str(error) for words in _READER_LOST):
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

    def close(self) -> None:
        """Ends the readers; prepared batches are dropped. May be called twice."""
        self._iterator = None  # the iterator's finaliser stops and joins its processes

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
