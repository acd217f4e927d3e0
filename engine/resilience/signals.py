"""Wishes from outside: a signal asks a run to stop in order, a file asks it to stop or to save.

SIGTERM (a scheduler that takes the nodes, a service manager), SIGINT (Ctrl-C), SIGUSR1 (`sbatch --signal`) and SIGHUP
(a terminal that is closed: torchrun passes it on) are a wish during training: the step under way is finished, saved,
the run folder given back. A second one, or one before the first step, ends the process at once; the run folder is
given back all the same. The wish is taken down by a thread, so that it counts while the main thread waits for another
rank, however long that takes.

`touch run_dir/STOP` is the same wish for whoever cannot send signals; `touch run_dir/SAVE` asks for a checkpoint.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.resilience.exit import STOPPED, leave

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_ONE_WISH_S = 1.0
"""A scheduler signals torchrun and the ranks, and torchrun passes its own on: signals this close are one wish."""
_PR_SET_PDEATHSIG = 1
_staying: dict[Path, tuple[int, int]] = {}
"""STOP and SAVE files that were heard and cannot be removed -> which ones they are."""


class Wishes:
    """What this process was asked for. Entered by the main thread, before readers are forked."""

    def __init__(self) -> None:
        self.training = False
        """Whether steps are being made: a signal then waits for the end of one."""
        self.before_leaving: list[Callable[[], None]] = []
        """Run when a signal ends the process at once (giving back the run folder)."""
        self.stop = ""
        """Why this rank wants the run to stop; empty: it does not."""
        self.cut_short = ""
        """Why the step under way is not finished, for those who run before leaving; empty: there is none."""
        self._asked_s = 0.0
        self._ours, self._python = socket.socketpair()
        self._python.setblocking(False)

    def __enter__(self) -> "Wishes":
        self._wakeup = signal.set_wakeup_fd(self._python.fileno(), warn_on_full_buffer=False)
        # the thread is who acts
        self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in _heard()}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._python.close()  # ends the thread

    @contextmanager
    def wait_for_steps(self) -> Iterator[None]:
        """Inside, a first signal is a wish for the end of a step. It stays one after an error: torchrun ends the others
        when one rank has failed, and what this one has to say about it must not be lost.
        """
        self.training = True
        yield
        self.training = False

    def _listen(self) -> None:
        while heard := self._ours.recv(64):
            for number in heard:
                if number in SIGNALS:
                    self._take(signal.Signals(number))
        self._ours.close()

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.stop and now - self._asked_s <= _ONE_WISH_S:
            return
        if not self.stop and self.training:
            self.stop, self._asked_s = number.name, now
            return
        again = bool(self.stop)
        at_once = f"{number.name}{' again' if again else ''}: stopped at once"
        self.cut_short = at_once if again else ""
        for action in self.before_leaving:
            with contextlib.suppress(OSError):
                action()
        if again or "RANK" not in os.environ:  # torchrun ends the others this way when one rank has failed
            print(at_once, file=sys.stderr, flush=True)
        leave(128 + number if again else STOPPED)


def _heard() -> list[signal.Signals]:
    """All of them, but SIGHUP where nohup has it ignored; torchrun does not heed nohup, ends by it and passes it on."""
    outlives = "RANK" not in os.environ and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (outlives and number is signal.SIGHUP)]


def asked_by_file(run_dir: Path, name: str) -> bool:
    """Whether run_dir/STOP or run_dir/SAVE is there; it is taken away, so that it asks once.

    One that cannot be taken away asks once all the same, until it is touched again, and that is said.
    """
    path = run_dir / name
    try:
        path.unlink()
    except OSError as error:
        try:
            found = path.lstat()
        except OSError:  # not there; of a read-only folder the first error says nothing about that
            _staying.pop(path, None)
            return False
        mark = found.st_ino, found.st_mtime_ns
        if _staying.get(path) == mark:
            return False
        if path not in _staying:
            again = "every start stops at it" if name == STOP_FILE else "every start saves once for it"
            print(
                f"WARNING: {path} was heard, but cannot be removed ({error.strerror}): remove it, {again}",
                file=sys.stderr,
                flush=True,
            )
        _staying[path] = mark
    return True


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send `number` to this process when the thread that started it ends: no orphans hold devices."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), number)
