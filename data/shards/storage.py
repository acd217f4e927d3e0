"""Shards and the small files that belong to them, wherever they lie: the one place that tells local from
remote.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.config import DataConfig
from data.errors import DataError
from data.shards.remote import Absent, Remote, ShardCache, cached_name, is_remote


class Storage:
    """Opens shards; knows where their indices may lie."""

    def __init__(
        self,
        *,
        cache_dir: str = "",
        cache_gb: float = DataConfig.cache_gb,
        timeout_s: float = DataConfig.remote_timeout_s,
        retries: int = DataConfig.remote_retries,
        patience_s: float = DataConfig.remote_patience_s,
    ) -> None:
        """The settings are those of `data.*`; without cache_dir only local shards can be read."""
        self._folder = Path(cache_dir) if cache_dir else None
        self.remote = Remote(timeout_s=timeout_s, retries=retries, patience_s=patience_s)
        self._cache: ShardCache | None = None
        if self._folder is not None:
            self._cache = ShardCache(self._folder / "shards", max_bytes=int(cache_gb * 1e9), remote=self.remote)

    @classmethod
    def of(cls, config: DataConfig) -> "Storage":
        """The storage of a data config."""
        return cls(
            cache_dir=config.cache_dir,
            cache_gb=config.cache_gb,
            timeout_s=config.remote_timeout_s,
            retries=config.remote_retries,
            patience_s=config.remote_patience_s,
        )

    def open(self, shard: str) -> int:
        """Read-only descriptor of the whole shard; fetches a remote one. Raises DataError."""
        if is_remote(shard):
            return self._need_cache(shard).open(shard)
        try:
            return os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {shard} cannot be read ({error.strerror})") from error

    def stamp(self, shard: str) -> tuple[int, int] | None:
        """(size in bytes, mtime in ns) that an index must agree with; None for a remote shard (immutable)."""
        if is_remote(shard):
            return None
        try:
            status = os.stat(shard)
        except OSError as error:
            raise DataError(f"shard {shard} cannot be read ({error.strerror})") from error
        return status.st_size, status.st_mtime_ns

    def side_files(self, name: str) -> Iterator[str]:
        """Local places of a small file that belongs beside `name`'s shard, in the order to try and to write;
        a remote one is copied into cache_dir first, if it exists.
        """
        if not is_remote(name):
            yield name
        if self._folder is None:
            return
        copy = self._folder / "index" / cached_name(name if is_remote(name) else os.path.abspath(name))
        if is_remote(name) and not copy.exists():
            self._fetch_side_file(name, copy)
        yield str(copy)

    def write(self, name: str, save: Callable[[BinaryIO], None]) -> str | None:
        """Write a small file that belongs beside `name`'s shard where the first place takes it: whole, or not at all.
        The place; None if none took it.
        """
        for file in self.side_files(name):
            with contextlib.suppress(OSError), _replacing(file) as stream:
                save(stream)
                return file
        return None

    def _fetch_side_file(self, url: str, copy: Path) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.remote.fetch(url, copy)
        except Absent:
            return  # it is optional: the index is built from the shard then

    def _need_cache(self, shard: str) -> ShardCache:
        if self._cache is None:
            raise DataError(f"{shard} is remote: set data.cache_dir to a local folder with data.cache_gb of room")
        return self._cache


@contextlib.contextmanager
def _replacing(file: str) -> Iterator[BinaryIO]:
    """A stream to a temporary name beside the file, which takes the file's name when all is written."""
    temporary = f"{file}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
