"""How far an evaluation is: a bar on a terminal, a line every few seconds elsewhere, on rank 0 alone."""

import sys
import time

_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.2
_BAR_CELLS = 24


class Progress:
    """Counts samples, or another unit, against a clock."""

    def __init__(self, what: str, total: int, *, shown: bool, done: int = 0, unit: str = "samples"):
        """what: the name at the head of the line. done: of an earlier run, which cost no time now. unit: of both."""
        self._unit = unit
        self._what, self._total, self._shown, self._first = what, total, shown, done
        self._terminal = sys.stderr.isatty()
        self._began = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._began

    def advance(self, done: int) -> None:
        """Say it if there is somebody to tell and the last word was a while ago. done: samples so far, of all."""
        now = time.perf_counter()
        if not self._shown or now - self._last < (_BAR_EVERY_S if self._terminal else _LINE_EVERY_S):
            return
        self._last = now
        rate = max(done - self._first, 1) / (now - self._began)
        words = f"{done:,} of {self._total:,}  {rate:,.1f} {self._unit}/s  {(self._total - done) / rate:,.0f} s left"
        if self._terminal:
            filled = _BAR_CELLS * done // max(self._total, 1)
            bar = "█" * filled + "░" * (_BAR_CELLS - filled)
            print(f"\r\033[K{self._what} {bar} {words}", end="", file=sys.stderr, flush=True)
        elif done < self._total:
            print(f"{self._what}: {words}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave no line behind."""
        if self._shown and self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def finish(self, words: str) -> None:
        """The last line."""
        if self._shown:
            start = "\r\033[K" if self._terminal else ""
            print(f"{start}{self._what}: {words}", file=sys.stderr, flush=True)
