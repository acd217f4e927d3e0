"""Blocks of input read ahead by threads, so that decoding goes on while the towers compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def ahead(read: Callable[[Unit], Result], units: Iterable[Unit], *, threads: int, depth: int) -> Iterator[Result]:
    """`read` of every unit, in order, at most `depth` of them ahead of the consumer on `threads` threads.

    Decoders release the interpreter's lock, so threads are enough. What `read` raises is raised here, at its turn.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluation-reader")
    waiting: deque[Future[Result]] = deque()
    rest = iter(units)
    try:
        waiting.extend(pool.submit(read, unit) for unit in islice(rest, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, unit) for unit in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
