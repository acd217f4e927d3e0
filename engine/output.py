"""Standard output and error of a job whose log cannot be written: lines are lost, and no more.

The disk of a redirected log is full, the reader of a pipe (`| tee`, a terminal over ssh) has gone: Python raises where
something is printed, and whoever prints next would end a training that is sound. The run folder has every step.
"""

import sys
from typing import Any, TextIO


class Lossy:
    """A stream of text that is written as far as it can be. Everything else is asked of the stream itself."""

    def __init__(self, stream: TextIO, name: str, other: TextIO):
        """name: what a person calls the stream. other: where it is said, once, that lines are lost."""
        self._stream, self._name, self._other = stream, name, other
        self._is_said = False

    def write(self, text: str) -> int:
        """Write it, or lose it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._say(error)
            return len(text)

    def flush(self) -> None:
        """Have what was written where the stream leads, if it can be."""
        try:
            self._stream.flush()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if self._is_said:
            return
        self._is_said = True
        try:
            self._other.write(f"WARNING: {self._name} cannot be written ({error.strerror}): lines are lost, no more\n")
            self._other.flush()
        except OSError:  # it is the same pipe or disk
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lose_lines_and_no_more() -> None:
    """Let nothing that this process prints end it."""
    out, err = sys.stdout, sys.stderr
    if out is not None and err is not None:  # else nothing is written at all
        sys.stdout, sys.stderr = Lossy(out, "standard output", err), Lossy(err, "standard error", out)  # type: ignore[assignment]
