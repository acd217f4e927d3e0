"""One job a run folder: a lock that dies with its process.

A POSIX record lock on run_dir/run.lock: the kernel drops it when the process ends, however it ends, and forked reader
processes do not inherit it, so a lock left by a killed job never has to be cleared by hand. Where a shared file system
does not carry locks between machines, the file's host and age tell of a job on another one.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError

LOCK_FILE = "run.lock"
_ALIVE_S = 180.0
"""A job of another host whose file is younger than this is taken to be alive."""
_TOUCH_EVERY_S = 30.0


class RunLock:
    """Held from construction until `release` or the end of the process."""

    def __init__(self, run_dir: Path):
        """Raises CheckpointError when the folder cannot be written or another job holds it."""
        self._path = run_dir / LOCK_FILE
        self._touched = time.monotonic()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"run_dir {run_dir} cannot be written: {error.strerror}") from error
        try:
            self._acquire(run_dir)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _acquire(self, run_dir: Path) -> None:
        holder = self._holder()
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"run_dir {run_dir} is in use by process {holder.get('pid')} on {holder.get('host')}: two jobs would "
                "overwrite each other's checkpoints; end that job or set another run_dir"
            ) from None
        age_s = time.time() - os.fstat(self._descriptor).st_mtime
        if holder and holder["host"] != socket.gethostname() and age_s < _ALIVE_S:
            raise CheckpointError(
                f"run_dir {run_dir} was in use {age_s:.0f} s ago by process {holder['pid']} on {holder['host']}; if "
                f"that job has ended, delete {self._path}"
            )
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def _holder(self) -> dict[str, object]:
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}  # empty: released in order, or never held
        return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else {}

    def touch(self) -> None:
        """Show other machines that this job lives; cheap enough for every step."""
        if time.monotonic() - self._touched > _TOUCH_EVERY_S:
            self._touched = time.monotonic()
            os.utime(self._descriptor)

    def release(self) -> None:
        """Give the folder back."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)  # closing drops the lock
