"""Remote shards (http, https, s3, gs, ...) through fsspec, copied whole into a bounded local cache.

Whole, because the order permutes samples within groups of shards: every sample of a shard is wanted soon, and
one sequential read costs a store one request where 10,000 samples would cost 20,000 with a round trip each.
The copies outlive the run; two processes never fetch one shard at a time, and a copy appears under its name
only when it is complete. Remote shards are taken as immutable: a changed shard needs another name.

fsspec and its protocol packages are the extra `remote`; nothing else imports them.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.errors import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_HTTP_OK_TO_RETRY = (408, 429)  # timeout, too many requests: the only client errors that pass by themselves
_LONGEST_WAIT_S = 60.0
_STALE_PART_S = 24 * 3600
_OWN_PART = re.compile(r"([0-9a-f]{2})[0-9a-f]{22}-.*\.part")

_log = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    """A URL with a protocol, as opposed to a path of this machine."""
    return _URL.match(path) is not None


class Absent(Exception):
    """The remote file does not exist, or may not be read."""


class Remote:
    """Reads of whole remote files with retries and a timeout.

    A store that is busy or away is asked again until `retries` further attempts were made and `patience_s` have passed
    since the first failure, so that a short outage does not end a run. The waits double up to a minute, each shortened
    at random so that the readers of a job do not come back all at once, and are at least what the server asks for in
    Retry-After.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        retries: int,
        patience_s: float = 0.0,
        first_wait_s: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """timeout_s: of one attempt. first_wait_s: before the first retry."""
        self._timeout_s = timeout_s
        self._retries = retries
        self._patience_s = patience_s
        self._first_wait_s = first_wait_s
        self._sleep, self._clock = sleep, clock
        self._systems: dict[tuple[int, str], Any] = {}

    def fetch(self, url: str, target: Path) -> None:
        """Write the file to `target`, which is complete when it appears. Raises Absent, or DataError after
        the last attempt.
        """
        part = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            self._attempts(url, lambda: self._copy(url, part))
            os.replace(part, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def glob(self, pattern: str) -> list[str]:
        """URLs that match, sorted."""
        system, path = self._system(pattern), pattern
        found = self._attempts(pattern, lambda: system.glob(path))
        return sorted(system.unstrip_protocol(name) for name in found)

    def _attempts(self, url: str, action: Callable[[], Any]) -> Any:
        first_failure_s: float | None = None
        attempt = 0
        while True:
            attempt += 1
            try:
                return action()
            except (FileNotFoundError, PermissionError) as error:
                raise Absent(f"{url}: {error}") from error
            except DataError:
                raise
            except Exception as error:  # every protocol package has exceptions of its own
                status = getattr(error, "status", None)
                if isinstance(status, int) and 400 <= status < 500 and status not in _HTTP_OK_TO_RETRY:
                    raise Absent(f"{url}: {error}") from error
                problem, asked_s = f"{type(error).__name__}: {error}".rstrip(": "), _retry_after_s(error)
            now = self._clock()
            first_failure_s = now if first_failure_s is None else first_failure_s
            tried_s = now - first_failure_s
            if attempt > self._retries and tried_s >= self._patience_s:
                break
            wait_s = min(self._first_wait_s * 2 ** min(attempt - 1, 16), _LONGEST_WAIT_S) * random.uniform(0.5, 1)
            wait_s = max(wait_s, min(asked_s, _LONGEST_WAIT_S))
            _log.warning("%s: attempt %d failed (%s), the next in %.1f s", url, attempt, problem, wait_s)
            self._sleep(wait_s)
        raise DataError(
            f"{url} could not be read in {attempt} attempts of at most {self._timeout_s:g} s within {tried_s:.0f} s "
            f"(the last: {problem}): check the network, or raise data.remote_patience_s, data.remote_retries or "
            "data.remote_timeout_s"
        )

    def _copy(self, url: str, part: Path) -> None:
        system = self._system(url)
        if not system.async_impl:
            system.get_file(url, str(part))
        else:
            from fsspec.asyn import sync

            sync(system.loop, self._copy_in_time, system, url, str(part))
        expected = system.info(url).get("size")
        if expected is not None and part.stat().st_size != expected:
            raise OSError(f"{part.stat().st_size} of {expected} bytes arrived")

    async def _copy_in_time(self, system: Any, url: str, part: str) -> None:
        await asyncio.wait_for(system._get_file(system._strip_protocol(url), part), self._timeout_s)

    def _system(self, url: str) -> Any:
        """The file system of the URL's protocol; one a process, for its connections do not survive a fork."""
        try:
            import fsspec

            protocol = url.split("://", 1)[0]
            key = (os.getpid(), protocol)
            if key not in self._systems:
                self._systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True)
            return self._systems[key]
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{url} is remote and needs more packages ({error}): pip install 'eva-megatron[remote]', for s3:// "
                "also s3fs, for gs:// gcsfs"
            ) from error


def _retry_after_s(error: Exception) -> float:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: seconds or a date); 0 if it does not."""
    headers = getattr(error, "headers", None)
    if not isinstance(headers, Mapping) or (asked := headers.get("Retry-After")) is None:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(asked))
    with contextlib.suppress(TypeError, ValueError):
        now = headers.get("Date")  # by the clock of who asks; ours may be hours off
        now_s = parsedate_to_datetime(now).timestamp() if now else time.time()
        return max(0.0, parsedate_to_datetime(asked).timestamp() - now_s)
    return 0.0


class ShardCache:
    """Local copies of remote shards, at most `max_bytes` of them beside those in flight.

    Safe for any number of processes on one machine. A copy that is deleted while a reader has it open stays
    readable to that reader; its room on the disk is free when it is closed.
    """

    def __init__(self, folder: Path, *, max_bytes: int, remote: Remote) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._remote = remote

    def open(self, url: str) -> int:
        """Descriptor of the copy, fetched if need be. Raises DataError."""
        while True:
            path = self._path(url)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(url, path)
                continue  # another process may have evicted it again before it is open
            self._note_use(descriptor)
            return descriptor

    def _note_use(self, descriptor: int) -> None:
        """Let the copy go after all that were used before it, also where the clock was set back since."""
        clock = self._folder / "used.lock"
        last_ns = clock.stat().st_mtime_ns if clock.exists() else 0
        now = (max(time.time_ns(), last_ns + 1),) * 2
        try:
            os.utime(descriptor, ns=now)
            clock.touch()
            os.utime(clock, ns=now)
        except PermissionError:  # of another user, who lets us write to it
            os.utime(descriptor)

    def _path(self, url: str) -> Path:
        return self._folder / cached_name(url)

    def _fetch(self, url: str, path: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"{path.name[:2]}.lock"):
            if path.exists():
                return  # fetched by the process that held the lock
            incoming = path.with_name(f"{path.name}.whole.part")
            try:
                self._remote.fetch(url, incoming)
            except Absent as absent:
                raise DataError(f"remote shard {absent}: correct data.shards or the access rights") from absent
            with self._locked("evict.lock"):
                self._make_room(url, incoming.stat().st_size)
                os.replace(incoming, path)

    def _make_room(self, url: str, size: int) -> None:
        if size > self._max_bytes:
            raise DataError(
                f"{url} has {size / 1e9:.3f} GB, more than data.cache_gb={self._max_bytes / 1e9:g}: raise it to hold "
                "two shuffle groups of shards at least"
            )
        copies = []
        for file in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.suffix == ".part" and time.time() - status.st_mtime > _STALE_PART_S:
                    self._remove_left_part(file)
                elif file.suffix not in (".part", ".lock"):
                    copies.append((status.st_mtime_ns, status.st_size, file))
        total = size + sum(copy_size for _, copy_size, _ in copies)
        for _, copy_size, file in sorted(copies):
            if total <= self._max_bytes:
                break
            file.unlink()
            total -= copy_size

    def _remove_left_part(self, file: Path) -> None:
        """Remove what a killed process has left half fetched, unless it only looks old since the clock was set: who
        fetches holds a lock.
        """
        own = _OWN_PART.fullmatch(file.name)
        if own is None:
            return
        with open(self._folder / f"{own[1]}.lock", "wb") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one process at a time; the kernel releases it when a holder dies."""
        with open(self._folder / name, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cached_name(url: str) -> str:
    """File name of a URL's copy: distinct for each URL, with its last part in it for people."""
    base = re.sub(r"[^\w.-]", "_", url.rstrip("/").rpartition("/")[2])[-80:]
    return f"{sha256(url.encode()).hexdigest()[:24]}-{base}"
