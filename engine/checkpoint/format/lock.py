"""One job a run folder, one evaluation a folder of results: a lock that dies with its process.

A POSIX record lock on run_dir/run.lock: the kernel drops it when the process ends, however it ends, and forked reader
processes do not inherit it, so a lock left by a killed job never has to be cleared by hand. Where a shared file system
does not carry locks between machines, the file tells of a job on another one (engine/checkpoint/format/machine.py; one
that has booted since is another one). Whether that one lives is watched, not computed: its file is touched all the
time, and clocks of two machines need not agree. A job that its scheduler starts again on other machines takes the
folder at once: the scheduler has ended the start before. A holder that was only stopped for so long (its host, or the
network to the files), and lives again, finds another name in the file: it ends without another word to the folder.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.machine import machine_of
from engine.resilience.exit import leave
from engine.waits import Flag

LOCK_FILE = "run.lock"
_TOUCH_EVERY_S = 15.0
PATIENCE_S = 120.0
"""A holder on another machine whose file stands still for so long is gone; file systems show changes a minute late."""
_POLL_S = 0.5
_PROCESS = uuid.uuid4().hex
"""A second lock of the same process, which the kernel grants, has not been taken by a stranger."""


class RunLock:
    """Held from construction until `release` or the end of the process."""

    def __init__(self, run_dir: Path, *, patience_s: float = PATIENCE_S, named: str = "run_dir"):
        """patience_s: how long the file of a holder on another machine is watched. named: what people call the folder.

        Raises CheckpointError when the folder cannot be written or another job holds it.
        """
        self._path, self._patience_s, self._named = run_dir / LOCK_FILE, patience_s, named
        self._released, self._closing = Flag(), threading.RLock()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{named} {run_dir} cannot be written: {error.strerror}") from error
        try:
            self._acquire(run_dir)
        except BaseException:
            os.close(self._descriptor)
            raise
        threading.Thread(target=self._keep_fresh, name="run.lock", daemon=True).start()

    def _acquire(self, run_dir: Path) -> None:
        holder = self._holder()
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{self._named} {run_dir} is in use by process {holder.get('pid')} on {holder.get('host')}: two jobs "
                f"would overwrite each other's files; end that job or give another {self._named}"
            ) from None
        machine = machine_of(run_dir)
        self._taken_by = ""
        if holder and holder.get("machine") != machine and not _same_job(holder):
            self._watch(run_dir, holder)
        held_by = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine, "job": _job()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(held_by | {"process": _PROCESS}).encode(), 0)

    def _holder(self) -> dict[str, object]:
        return _holder_in(os.pread(self._descriptor, 4096, 0))

    def taken_by(self) -> str:
        """Who has taken the folder from this holder, which was thought to be gone; empty: nobody."""
        with self._closing:  # a closed descriptor's number may be another file's by then
            if not self._taken_by and not self._released.is_set():
                try:
                    holder = self._holder()  # not by name: who closes any descriptor of the file gives up the lock
                except OSError:  # the file system is away
                    return ""
                if holder and holder.get("process") != _PROCESS:
                    self._taken_by = f"process {holder['pid']} on {holder['host']}"
            return self._taken_by

    def _watch(self, run_dir: Path, holder: dict[str, object]) -> None:
        """Until the holder's file has stood still for long enough. Raises CheckpointError if it is touched."""
        who = f"process {holder['pid']} on {holder['host']}"
        if holder["host"] == socket.gethostname():
            who += " (before it booted, or another machine or container of this name)"
        print(
            f"{self._named} {run_dir} was left by {who} without being given back: watching for "
            f"{self._patience_s:.0f} s whether it lives",
            file=sys.stderr,
            flush=True,
        )
        began, mark = time.monotonic(), self._mark()
        while time.monotonic() - began < self._patience_s:
            time.sleep(min(_POLL_S, self._patience_s / 4))
            if self._mark() != mark and self._holder():
                raise CheckpointError(
                    f"{self._named} {run_dir} is in use by {who}, which touched {self._path} just now: end that job or "
                    f"give another {self._named}"
                )

    def _mark(self) -> tuple[int, int]:
        try:
            status = self._path.stat()  # by name: a network file system asks its server anew
        except FileNotFoundError:
            raise CheckpointError(f"{self._path} was removed while its holder was watched: start again") from None
        return status.st_mtime_ns, status.st_size

    def _keep_fresh(self) -> None:
        while not self._released.wait(_TOUCH_EVERY_S):
            if who := self.taken_by():
                self._end(who)
            with self._closing, suppress(OSError):  # the file system is away: the next touch tells
                if not self._released.is_set():
                    os.utime(self._descriptor)

    def _end(self, who: str) -> None:
        folder = f"{self._named} {self._path.parent}"
        line = f"error: {folder} was taken by {who} while this process stood still, or could not be seen: it ends"
        print(line, file=sys.stderr, flush=True)
        leave(1)

    def release(self) -> None:
        """Give the folder back; a second time does nothing. Where the file cannot be emptied any more, that is left to
        the next holder, who will find out that nobody lives.
        """
        with self._closing:
            if not self._released.is_set():
                with suppress(OSError):
                    if not self.taken_by():
                        os.ftruncate(self._descriptor, 0)
                self._released.set()
                os.close(self._descriptor)  # closing drops the lock


def _holder_in(content: bytes) -> dict[str, object]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}  # empty: released in order, or never held
    return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else {}


def _same_job(holder: dict[str, object]) -> bool:
    return _job() != "" and holder.get("job") == _job()


def _job() -> str:
    """What the scheduler calls this job; it stays when the job is started again after a failure, on whatever hosts."""
    number = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm {number}" if number else ""
