"""What all commands share: help, one line for what is refused, outputs looked at before the work, progress.

Imports neither torch nor megatron-core, so that a mistake answers at once.
"""

import argparse
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data.errors import DataError
from engine.checkpoint.format.errors import CheckpointError
from engine.config.read import ConfigError
from models.config import ModelConfigError

T = TypeVar("T")
NO_SHARDS: dict[str, Any] = {"data": {"shards": ["-"]}}
"""Part of a config tree for commands that build a model and read no data."""
PROBE_BYTES = 1 << 16
"""Bytes that a place must take before work starts whose result goes there."""
_TOLD_EVERY = 32
"""Items between two words to a bar: a word costs ten microseconds or so."""
MOST_COUNT, MOST_RANKS = 10**10, 1 << 20
"""Samples, steps, files; ranks of a job: what is above is a slip of the pen, and would be counted through."""
_INTERRUPTED, _PIPE_CLOSED = 130, 141
"""Exit statuses of a shell's command that SIGINT or SIGPIPE ended."""


class CommandError(ValueError):
    """What a command refuses; the message is one line with the values and the fix."""


REFUSED: tuple[type[Exception], ...] = (
    CommandError,
    ConfigError,
    ModelConfigError,
    DataError,
    CheckpointError,
    OSError,
)
"""Mistakes of the caller or of the machine: one line, no traceback."""


# --- help --------------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of description and examples, and adds the default to options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        told = (
            "default" in text or action.default in (None, False, "", argparse.SUPPRESS, []) or not action.option_strings
        )
        return text if told else f"{text} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def command_parser(
    command: str, description: str | None, examples: Sequence[str], *, room: str = "tools"
) -> argparse.ArgumentParser:
    """The parser of `python -m ROOM.COMMAND`: what it does, its options with their defaults, examples that can run."""
    return _Parser(
        prog=f"python -m {room}.{command}",
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=_Help,
    )


# --- ending ------------------------------------------------------------------------------------------------------


def answer(command: Callable[[], int], *also: type[Exception]) -> int:
    """Run a command: its exit status, or 1 after one line on standard error for what is refused.

    also: further exceptions of this command that are an answer and not a fault of the program.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough; the interpreter must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return complain("interrupted", _INTERRUPTED)
    except REFUSED + also as error:
        return complain(_in_words(error))


def complain(message: str, status: int = 1) -> int:
    """Print the line of an error; the exit status."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error)


# --- outputs -----------------------------------------------------------------------------------------------------


def check_file(path: Path, size_bytes: int = 0) -> None:
    """Raise CommandError unless a file of `size_bytes` (0: not known) can be written at `path`, before any work."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder where a file is to be written: name a file, such as {path / 'out'}")
    if not path.parent.is_dir():
        raise CommandError(_no_folder(path))
    if path.exists() and not path.is_file():
        return  # a device or a pipe takes what it takes
    _probe(path.parent, path, size_bytes)
    if path.exists():
        with _refusing(path), path.open("r+b"):
            pass


def check_folder(path: Path, size_bytes: int = 0) -> None:
    """Raise CommandError unless files can be written in the folder `path`, which is made later if it is not there."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CommandError(f"{path} cannot be made: {place} is a file")
    _probe(place, path, size_bytes)


def _no_folder(path: Path) -> str:
    place = path.parent
    if place.exists():
        return f"{path} cannot be written: {place} is a file"
    return f"{path} cannot be written: there is no folder {place}; mkdir -p {shlex.quote(str(place))}, or another path"


def _probe(folder: Path, path: Path, size_bytes: int) -> None:
    with _refusing(path), tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(PROBE_BYTES))
        probe.flush()
        os.fsync(probe.fileno())  # network file systems say it as late as here
    if (free := shutil.disk_usage(folder).free) < size_bytes:
        needs = f"{size_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise CommandError(f"{path} cannot be written: {needs}; free some, or another path")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}; another path, or mend that") from None


# --- progress ----------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.4g} {task.fields['unit']}/s")


@contextmanager
def progress(what: str, total: float | None, unit: str, *, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar with rate and time left on standard error; yields what is called with the units done since the last call.

    It is quiet where standard error is no terminal, and with shown=False: the other ranks of a job.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):  # rich before 15 ends a bar that is switched off with an empty line
        yield lambda done: None
        return
    count = TextColumn(
        "{task.completed:,.0f}" + ("" if total is None else " of {task.total:,.0f}") + " {task.fields[unit]}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), count, _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, unit=unit)
        yield lambda done: bar.advance(task, done)


def counted(what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one after the other, under a bar that is told of them."""
    with progress(what, len(items), unit) as done:
        for number, item in enumerate(items, 1):
            yield item
            if number % _TOLD_EVERY == 0 or number == len(items):
                done((number - 1) % _TOLD_EVERY + 1)


@contextmanager
def hashing(size_bytes: float) -> Iterator[Callable[[int], None]]:
    """The progress of reading a checkpoint's files once; yields what `Checkpoint.verify` tells its bytes."""
    with progress("checking hashes", size_bytes / 1e6, "MB") as done:
        yield lambda read_bytes: done(read_bytes / 1e6)


# --- option types ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    return _between(text, 1, MOST_COUNT)


def whole(text: str) -> int:
    """An option's whole number, at least 0."""
    return _between(text, 0, MOST_COUNT)


def ranks(text: str) -> int:
    """An option's number of ranks or GPUs, at least 1 and no more than anybody has."""
    return _between(text, 1, MOST_RANKS)


def _between(text: str, least: int, most: int) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} is above {most:,}")
    return value


def amount(text: str) -> float:
    """An option's finite number, at least 0; 6e9 is one."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


# --- tables ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[object]], *, indent: int = 2) -> str:
    """Lines of columns as wide as their longest cell; cells that begin with a digit go to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))] if cells else []
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(" " * indent + "  ".join(padded).rstrip())
    return "\n".join(lines)
