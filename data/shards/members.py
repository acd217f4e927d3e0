"""The members of one uncompressed tar, whoever wrote it: all of them, or a count of what is left out.

Python's tarfile parses each header (ustar, GNU, pax, long names, sparse maps). What it does not do is done here: the
walk goes on behind an end mark (tars that were appended with `cat`, or with `tar -A` by another program) and behind a
damaged header (at the next block that is a header), links are read as the member they name, and everything that is no
file of this tar is counted under one of the names in `LEFT_OUT`. Nothing of a tar is ever extracted, so absolute names
and names with ".." are names like others.
"""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import BinaryIO

from data.errors import DataError

LEFT_OUT = {
    "directory": "a folder's own entry",
    "dangling_link": "a link whose target is not a file of this tar",
    "other_type": "a device, a pipe, a volume label or another entry without content",
}
"""Members that are no files: counted by these names, and what each means."""

BLOCK_BYTES = 512
_RECORD_BYTES = 10_240  # what tar writers fill up with zeros: 20 blocks
_MOST_HEADER_BYTES = 1024 * 1024  # of a long name or a pax header: more is damage
_CHUNK_BYTES = 1024 * 1024
_MOST_LINKS = 8
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K")
_UNPARSABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError)
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

Extent = tuple[int, int]
"""(where in the member, bytes) of one stretch of a sparse member."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int
    """Where its bytes begin in the tar."""
    size: int
    """Bytes of the file."""
    extents: tuple[Extent, ...] | None = None
    """Stretches of a sparse file that the tar holds, one behind the other; the rest is zeros."""


@dataclass(kw_only=True)
class Walk:
    """What a tar holds."""

    members: list[Member]
    """Files in the order of the tar; links as the file that they name."""
    left_out: Counter[str]
    """Members that are no files, by the names of `LEFT_OUT`."""
    behind_end_mark: int
    """Members, of those in `members` and `left_out`, that stand behind an end mark."""
    skipped_bytes: int
    """Bytes that are neither members nor zeros."""
    zero_tail_bytes: int
    """Zeros at the end of the file beyond what a writer fills up with: lost content, or a large blocking factor."""
    truncated: bool
    """The file ends without an end mark, or within a member."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Link:
    """A link until its target is known."""

    name: str
    target: str


def walk(stream: BinaryIO, size_bytes: int, name: str) -> Walk:
    """Reads the headers from front to back; `name` is for messages. Raises DataError for what is no tar."""
    return _Walker(stream, size_bytes, name).run()


class _Walker:
    def __init__(self, stream: BinaryIO, size_bytes: int, name: str) -> None:
        self._stream, self._size, self._name = stream, size_bytes, name
        self._found: list[Member | _Link] = []
        self._left_out: Counter[str] = Counter()
        self._behind = self._skipped = 0
        self._passed_end = False
        self._tar = _headers_of(stream)

    def run(self) -> Walk:
        at, end_of_last, zeros = 0, 0, 0
        while at < self._size:
            block = self._read(at, BLOCK_BYTES)
            if not any(block):
                following = self._next_block(at, zero=True)
                zeros, at = following - at, following
                self._passed_end = True
                continue
            due = self._member(at, block)
            zeros = 0
            if due is None:
                if not self._found and not self._left_out:
                    raise DataError(self._no_tar(block))
                due = self._next_block(at + BLOCK_BYTES, zero=False)
                self._skipped += due - at
            else:
                end_of_last = due
            at = due
        return Walk(
            members=list(self._resolved()),
            left_out=self._left_out,
            behind_end_mark=self._behind,
            skipped_bytes=self._skipped,
            zero_tail_bytes=zeros if zeros > _RECORD_BYTES + 2 * BLOCK_BYTES else 0,
            truncated=zeros < BLOCK_BYTES or end_of_last > self._size,
        )

    def _read(self, at: int, size: int) -> bytes:
        self._stream.seek(at)
        return self._stream.read(size)

    def _no_tar(self, block: bytes) -> str:
        packed = next((kind for magic, kind in _MAGICS.items() if block.startswith(magic)), None)
        what = f"it is {packed}-compressed: unpack it" if packed else "its first block is no tar header: rebuild it"
        return f"{self._name} is not an uncompressed tar ({what}) or leave it out of data.shards"

    def _member(self, at: int, block: bytes) -> int | None:
        """Takes the member whose header stands there; where the next header is due, None if this is no header."""
        try:
            if block[156:157] in _EXTENDED and tarfile.TarInfo.frombuf(
                block, tarfile.ENCODING, "surrogateescape"
            ).size not in range(_MOST_HEADER_BYTES):
                return None
            self._stream.seek(at)
            info = tarfile.TarInfo.fromtarfile(self._tar)
        except _UNPARSABLE:
            return None
        following = self._tar.offset
        if following <= at or info.size < 0:
            return None
        self._take(info)
        self._behind += self._passed_end
        return following

    def _take(self, info: tarfile.TarInfo) -> None:
        if info.isreg():
            sparse: list[Extent] | None = info.sparse  # type: ignore[assignment]  # an undocumented list of pairs
            extents = None if sparse is None else tuple((int(start), int(size)) for start, size in sparse)
            self._found.append(Member(name=info.name, offset=info.offset_data, size=info.size, extents=extents))
        elif info.islnk():
            self._found.append(_Link(name=info.name, target=info.linkname))
        elif info.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
            self._found.append(_Link(name=info.name, target=target))
        else:
            self._left_out["directory" if info.isdir() else "other_type"] += 1

    def _resolved(self) -> Iterator[Member]:
        """Links become the files that they name, as they would on a disk where the tar was unpacked."""
        links = any(isinstance(found, _Link) for found in self._found)
        by_name = {posixpath.normpath(found.name): found for found in self._found} if links else {}
        for found in self._found:
            target: Member | _Link | None = found
            for _ in range(_MOST_LINKS):
                if not isinstance(target, _Link):
                    break
                target = by_name.get(posixpath.normpath(target.target))
            if isinstance(target, Member):
                yield target if target is found else replace(target, name=found.name)
            else:
                self._left_out["dangling_link"] += 1

    def _next_block(self, at: int, *, zero: bool) -> int:
        """The first block from `at` on that is not all zeros (zero), or that may be a header; else the file's end."""
        while at < self._size:
            chunk = self._read(at, _CHUNK_BYTES)
            if not chunk:
                break
            found = _first_not_zero(chunk) if zero else _first_header(chunk)
            if found is not None:
                return at + found
            at += len(chunk)
        return self._size


def _first_not_zero(chunk: bytes) -> int | None:
    kept = chunk.lstrip(b"\0")
    return (len(chunk) - len(kept)) // BLOCK_BYTES * BLOCK_BYTES if kept else None


def _first_header(chunk: bytes) -> int | None:
    """Offset of the first block with a header's magic and check sum."""
    at = chunk.find(b"ustar")
    while at >= 0:
        start = at - 257
        if start >= 0 and start % BLOCK_BYTES == 0 and _is_header(chunk[start : start + BLOCK_BYTES]):
            return start
        at = chunk.find(b"ustar", at + 1)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except _UNPARSABLE:
        return False
    return True


def _headers_of(stream: BinaryIO) -> tarfile.TarFile:
    """A TarFile that parses headers of the stream where it stands; it holds no members of its own."""
    tar = tarfile.TarFile(fileobj=BytesIO(), mode="w", encoding="utf-8", errors="surrogateescape")
    tar.fileobj = stream
    return tar
