"""`run_dir/log/rank_RRRRR.jsonl`: what a rank says, one JSON object a line with time, rank and step (log.json).

Takes down what goes to standard error and to Python's logging, which also go where they went before, and, on rank 0,
the record of every step. A log that cannot be written does not end the training.
"""

import contextlib
import json
import logging
import math
import sys
import threading
import time
from typing import Any, TextIO

from engine.record import Callback, Record, RunInfo

FOLDER = "log"


class JsonLog(Callback):
    """The log of this rank."""

    def __init__(self, rank: int):
        self.rank, self.step = rank, 0
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self._handler = _Handler(self)
        self._stderr: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Begin to listen; goes on in the file of an earlier start."""
        folder = run.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.step = run.start_step
        self._file = (folder / f"rank_{self.rank:05d}.jsonl").open("a", buffering=1, encoding="utf-8")
        self._stderr, sys.stderr = sys.stderr, _Tee(sys.stderr, self)
        logging.getLogger().addHandler(self._handler)
        self.write("info", f"starts at step {run.start_step} as {run.layout}")

    def on_step(self, record: Record) -> None:
        self.step = int(record["step"]) + 1
        if self.rank == 0:
            self.write("info", "step", record={name: _finite(value) for name, value in record.items()})

    def on_end(self, record: Record) -> None:
        """Give standard error back."""
        self.write("info", "ends")
        logging.getLogger().removeHandler(self._handler)
        if isinstance(sys.stderr, _Tee):
            sys.stderr = self._stderr
        if self._file is not None:
            with contextlib.suppress(OSError):  # it may have a line that the disk refuses
                self._file.close()
            self._file = None

    def write(self, level: str, message: str, **more: Any) -> None:
        """One line."""
        entry = {"time": time.time(), "level": level, "rank": self.rank, "step": self.step, "message": message, **more}
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(entry, default=str) + "\n")
            except OSError:
                return  # nobody can be told by this way; metrics and status say that the disk refuses


class _Handler(logging.Handler):
    def __init__(self, log: JsonLog):
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(record.levelname.lower(), record.getMessage(), logger=record.name)


class _Tee:
    """Standard error, whose lines are also taken down."""

    def __init__(self, stream: TextIO, log: JsonLog):
        self._stream, self._log, self._begun = stream, log, ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(None, lines):
            level = "error" if line.startswith("error") else "warning" if line.startswith("WARNING") else "info"
            self._log.write(level, line)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
