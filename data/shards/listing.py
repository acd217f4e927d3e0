"""An ordered list of tar files from the shard list of a config, and bytes out of them.

An entry is a file, a folder (its `*.tar`, sorted), a glob (sorted) or a brace pattern: `{00000..00031}`
counts with the zero padding of its first number, `{a,b}` lists; all of them also as URLs (a remote folder
ends with a slash). The order of the list is the order of the shards, and with it part of the sample order:
the same entries must be given again to resume a run.
"""

import os
import re
from collections.abc import Sequence
from glob import escape, glob, has_magic
from itertools import product
from pathlib import Path

from data.errors import DataError
from data.shards.lru import Lru
from data.shards.remote import is_remote
from data.shards.storage import Storage

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMOTE_MAGIC = re.compile(r"[*\[]")  # a question mark starts the query of a URL


def expand_shards(entries: str | Sequence[str], storage: Storage) -> list[str]:
    """Paths and URLs of all shards in order. Raises DataError for an empty list, a pattern without a match or a
    missing file (remote files are not asked for one by one).
    """
    patterns = [entries] if isinstance(entries, str) else list(entries)
    if not patterns:
        raise DataError(
            "data.shards is empty: name at least one tar shard, e.g. data.shards=[shards/{00000..00007}.tar]"
        )
    return [path for pattern in patterns for path in _expand(pattern, storage)]


def _expand(pattern: str, storage: Storage) -> list[str]:
    paths = [path for name in expand_braces(pattern) for path in _files(name, pattern, storage)]
    for path in paths:
        if not is_remote(path) and not os.path.isfile(path):
            raise DataError(f"shard {path} (from data.shards entry {pattern!r}) does not exist: correct the entry")
    return paths


def _files(name: str, pattern: str, storage: Storage) -> list[str]:
    if is_remote(name):
        if not name.endswith("/") and not _REMOTE_MAGIC.search(name):
            return [name]
        found = storage.remote.glob(f"{name}*.tar" if name.endswith("/") else name)
    elif os.path.isdir(name):
        found = sorted(str(path) for path in Path(name).glob("*.tar"))
    elif has_magic(name) and not os.path.exists(name):
        found = sorted(glob(_literal_folders(name), recursive=True))
    else:
        return [name]
    if not found:
        place = name if is_remote(name) else os.path.abspath(name)
        raise DataError(f"data.shards entry {pattern!r} matches no .tar file: check the path {place}")
    return found


def _literal_folders(name: str) -> str:
    """The glob with the names of folders that are there, such as `[v2]`, taken as they are."""
    parts = Path(name).parts
    return str(
        Path(*(escape(part) if os.path.isdir(Path(*parts[: at + 1])) else part for at, part in enumerate(parts)))
    )


def expand_braces(pattern: str) -> list[str]:
    """Every combination of the pattern's braces, in order; raises DataError for a range that counts down."""
    parts = _BRACES.split(pattern)  # text and brace content alternate
    choices = [[part] if place % 2 == 0 else _alternatives(part, pattern) for place, part in enumerate(parts)]
    return ["".join(combination) for combination in product(*choices)]


def _alternatives(content: str, pattern: str) -> list[str]:
    counted = _RANGE.fullmatch(content)
    if counted is None:
        return content.split(",")
    first, last = counted.groups()
    if int(last) < int(first):
        raise DataError(f"data.shards entry {pattern!r}: the range {{{content}}} counts down; swap its ends")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


class ShardFiles:
    """Byte ranges of the shards; keeps at most `max_open` files open.

    `os.pread` has no file position, so forked readers may share a descriptor.
    """

    def __init__(self, shards: Sequence[str], *, max_open: int, storage: Storage) -> None:
        self._shards = shards
        self._descriptors: Lru[int, int] = Lru(max_open, lambda shard: storage.open(shards[shard]), os.close)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file ends before. Raises DataError when the disk
        fails.
        """
        try:
            return os.pread(self._descriptors[shard], size, offset)
        except OSError as error:
            raise DataError(
                f"shard {self._shards[shard]}: reading {size} bytes at {offset} failed ({error})"
            ) from error
