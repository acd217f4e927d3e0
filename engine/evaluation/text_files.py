"""Small text files that people write: class names, templates, captions, labels."""

import os
import re
from pathlib import Path

from data.errors import DataError

_LINE_END = re.compile(r"\r\n|\n|\r")
"""Not str.splitlines: it also cuts at form feeds and U+2028, which stand within captions."""


def read_lines(path: Path, what: str, *, numbered: bool = False) -> list[str]:
    """The lines of a UTF-8 file, a byte-order mark, surrounding blanks and empty lines taken off.

    what: what the file holds, for the message. numbered: the number of a line means something, so that an empty one
    before the last is refused. Raises DataError for a file that is missing, empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {what}, one a line") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} in line {line}): "
            f"save it as UTF-8 (iconv -f latin1 -t utf-8 {path.name})"
        ) from None
    given = [line.strip() for line in _LINE_END.split(text)]
    lines = [line for line in given if line]
    if not lines:
        raise DataError(f"{path} is empty: {what}, one a line")
    if numbered and "" in given[: len(lines)]:
        raise DataError(f"{path}: line {given.index('') + 1} is empty, and labels count lines: {what}, one a line")
    return lines


def caption_lines(caption: str | None) -> list[str]:
    """The captions of a sample: one a line; none for None."""
    return [line.strip() for line in _LINE_END.split(caption or "") if line.strip()]


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
