"""A flag that threads wait for, for a time that no step of the machine's clock makes longer, and questions that may
never be answered.

Python's own timed waits (`threading.Event.wait`, `Thread.join`) follow the wall clock where it was built against a C
library without sem_clockwait (glibc before 2.30: conda's and uv's builds): a clock that is set back by an hour while a
wait is under way makes it an hour longer, and a thread that is to speak every second is silent for so long. The
kernel's poll counts the seconds that pass.
"""

import contextlib
import os
import select
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
ANSWER_S = 5.0
"""What a store that somebody still runs takes at the most, all ranks asking at once."""


class Flag:
    """Down at first; whoever waits goes on as soon as it is up. For any number of threads of one process."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)

    def set(self) -> None:
        """Raise it."""
        if not self.is_set():
            os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Take it down."""
        if self.is_set():
            os.eventfd_read(self._descriptor)

    def is_set(self) -> bool:
        """Whether it is up."""
        return self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Return when it is up, or after so many seconds; whether it is up."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(1000 * timeout_s))


def answer_of(question: Callable[[], T], otherwise: T) -> T:
    """What a store answers. One whose host has gone raises RuntimeError, one whose host stands still or cannot be
    reached says nothing, for minutes or for ever: `otherwise`, then. Nobody is asked when the interpreter ends (a
    script that has never left its job), because threads no longer start: starting one would wait for ever.
    """
    if sys.is_finalizing():
        return otherwise
    answers, over = list[T](), Flag()

    def ask() -> None:
        try:
            with contextlib.suppress(RuntimeError):
                answers.append(question())
        finally:
            over.set()

    threading.Thread(target=ask, name="asks the store", daemon=True).start()
    over.wait(ANSWER_S)
    return answers[0] if answers else otherwise
