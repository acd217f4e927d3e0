"""Batches prepared ahead by reader processes, delivered in order."""

import logging
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.reader import SampleBatch, SampleReader


class _ReadBatches(Dataset[SampleBatch | DataError]):
    """Map-style: the "index" is an array of positions, the value its batch, or the error that reading it
    gave.
    """

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader

    def __getitem__(self, positions: np.ndarray) -> SampleBatch | DataError:
        try:
            return self._reader.read(positions)
        except DataError as error:
            return error  # raised in the training process, without the traceback of a reader process


class PrefetchLoader:
    """Iterates over the SampleBatch of each array in `batches`, in order; `batches` may be endless.

    workers: reader processes (0: read in this process when asked). prefetch: batches that each prepares
    ahead. The readers are forked: they share the reader's indices and start at once, where a spawned process
    would import the training program anew. They end with `close()`, with the loader, and within seconds of
    this process's death. Raises DataError (from next()) with a reader's own message.
    """

    def __init__(self, reader: SampleReader, batches: Iterable[np.ndarray], *, workers: int, prefetch: int = 2) -> None:
        if workers < 0 or prefetch < 1:
            raise DataError(f"data.workers={workers} must be >= 0 and data.prefetch_batches={prefetch} >= 1")
        loader: DataLoader = DataLoader(
            _ReadBatches(reader),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_init_worker,
            multiprocessing_context="fork" if workers else None,
        )
        self._iterator: Iterator[SampleBatch | DataError] | None = iter(loader)

    def __iter__(self) -> Iterator[SampleBatch]:
        return self

    def __next__(self) -> SampleBatch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        if isinstance(batch, DataError):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """Ends the readers; prepared batches are dropped. May be called twice."""
        self._iterator = None  # the iterator's finaliser stops and joins its processes

    def __enter__(self) -> "PrefetchLoader":
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
    log = logging.getLogger("data")
    log.handlers = [logging.StreamHandler()]
    log.propagate = False
