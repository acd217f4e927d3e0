"""Where every sample of a tar shard lies, read from the tar headers.

`data/shards/members.py` finds the members of a tar, `data/shards/grouping.py` says which sample each belongs to, and
this file puts both into a few arrays. A sample without image or caption stays in the index, so that it is met, counted
and replaced while reading; so does one whose data the end of a truncated tar cuts off. Members that no sample reads are
counted by reason (`ShardIndex.odd`): samples and counts together are all members of the tar.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.shards.grouping import UNUSED, Found, Place, group
from data.shards.members import LEFT_OUT, Member, walk

__all__ = ["ODD", "Place", "ShardIndex", "Span", "Strings", "build_index"]

Span = tuple[int, int]
"""(offset, size) in bytes of a member; a sparse one has the offset -2 - its number among `ShardIndex.sparse`."""
ReadAt = Callable[[int, int], bytes]
"""(offset, size) to the bytes there; fewer where the file ends before."""

ODD = {
    **LEFT_OUT,
    **UNUSED,
    "behind_end_mark": "members behind an end mark: read like the others",
    "skipped_bytes": "bytes that are no member: damage, or a header that was lost",
    "zero_tail_bytes": "zeros behind the last member: lost content, or a writer with a large blocking factor",
}
"""What a tar may hold beside samples; the first two groups are members, the last entries are about the tar."""
_SILENT = frozenset(("directory", "other_suffix"))
_ABSENT = -1
_FIRST_SPARSE = -2
_DIGESTED_TEXT_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Strings:
    """Strings of any length one behind another: a long one costs its own bytes, not those of all others."""

    content: np.ndarray
    """uint8 [bytes]: UTF-8."""
    ends: np.ndarray
    """int64 [n]: where each string ends."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Packs the strings; bytes that are no UTF-8 survive."""
        encoded = [string.encode(errors="surrogateescape") for string in strings]
        content = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(content=content, ends=np.cumsum(list(map(len, encoded)), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        start = int(self.ends[number - 1]) if number else 0
        return self.content[start : int(self.ends[number])].tobytes()

    def text(self, number: int) -> str:
        """The string for people: what is no UTF-8 becomes a replacement character."""
        return self[number].decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Members of the n samples of one shard, in the order of their first member; about 80 bytes a sample."""

    keys: Strings
    """Sample keys."""
    spans: np.ndarray
    """int64 [n, 3, 2]: span of image, caption and metadata; offset -1 where the member is missing."""
    frames: np.ndarray
    """int64 [f, 2]: spans of the frames of all samples that are frame folders."""
    frame_starts: np.ndarray
    """int64 [n + 1]: sample i has the frames frame_starts[i] ... frame_starts[i + 1] - 1."""
    texts: np.ndarray
    """int64 [t, 3]: span of the further texts of all samples, and the number of their name in `text_names`."""
    text_starts: np.ndarray
    """int64 [n + 1]: sample i has the further texts text_starts[i] ... text_starts[i + 1] - 1."""
    text_names: Strings
    """Names of further texts, such as "syn.txt"."""
    sparse: np.ndarray
    """int64 [e, 3]: (where in the member, offset in the tar, bytes) of the stretches of all sparse members."""
    sparse_starts: np.ndarray
    """int64 [s + 1]: sparse member i has the stretches sparse_starts[i] ... sparse_starts[i + 1] - 1."""
    odd: Mapping[str, int]
    """Members that no sample reads, and what is odd about the tar, by the names of `ODD`."""
    truncated: bool
    """The tar ends early or is damaged; `spans` holds what is whole."""
    digest: int
    """Hash (64 bits) of all keys, member sizes and text: what `data/fingerprint.py` compares."""

    def __len__(self) -> int:
        return len(self.spans)

    def key(self, sample: int) -> str:
        """The sample's key as text."""
        return self.keys.text(sample)

    def span(self, sample: int, place: Place) -> Span | None:
        """The sample's member; None if it has none."""
        offset, size = self.spans[sample, place].tolist()
        return None if offset == _ABSENT else (offset, size)

    def present(self) -> np.ndarray:
        """bool [n, 3]: whether each sample has an image (or clip, or frames), a caption, metadata."""
        present = self.spans[:, :, 0] != _ABSENT
        present[:, Place.IMAGE] |= np.diff(self.frame_starts) > 0
        return present

    def frame_spans(self, sample: int) -> list[Span]:
        """The sample's frames in their order; empty unless it is a frame folder."""
        first, last = self.frame_starts[sample : sample + 2].tolist()
        return [(offset, size) for offset, size in self.frames[first:last].tolist()]

    def text_spans(self, sample: int) -> dict[str, Span]:
        """The sample's further texts by their names."""
        first, last = self.text_starts[sample : sample + 2].tolist()
        return {self.text_names.text(name): (offset, size) for offset, size, name in self.texts[first:last].tolist()}

    def read(self, span: Span, read_at: ReadAt) -> bytes:
        """The member's content; fewer bytes where the tar ends before."""
        offset, size = span
        if offset > _FIRST_SPARSE:
            return read_at(offset, size)
        number = _FIRST_SPARSE - offset
        first, last = self.sparse_starts[number : number + 2].tolist()
        content, end = bytearray(size), 0
        for start, at, length in self.sparse[first:last].tolist():
            piece = read_at(at, length)
            content[start : start + len(piece)] = piece
            if len(piece) < length:
                return bytes(content[: start + len(piece)])
            end = start + length
        return bytes(content) if end <= size else b""


def build_index(stream: BinaryIO, name: str) -> ShardIndex:
    """Read the headers of one tar from front to back; `name` is for messages. Raises DataError if it is no tar or is
    cut before the end of its first sample; one that holds no sample is a warning.
    """
    size_bytes = stream.seek(0, os.SEEK_END)
    if not size_bytes:
        raise DataError(f"{name} is empty (0 bytes): fetch it again or leave it out of data.shards")
    try:
        found = walk(stream, size_bytes, name)
        samples, unused = group(found.members)
        if found.truncated and (not found.members or found.members[0].offset + found.members[0].size > size_bytes):
            raise DataError(
                f"{name} is cut before the end of its first sample: rebuild it or leave it out of data.shards"
            )
        odd = {
            **found.left_out,
            **unused,
            "behind_end_mark": found.behind_end_mark,
            "skipped_bytes": found.skipped_bytes,
            "zero_tail_bytes": found.zero_tail_bytes,
        }
        index = _to_arrays(samples, {reason: count for reason, count in odd.items() if count}, found.truncated)
        index = replace(index, digest=_digest(index, stream))
    except OSError as error:
        raise DataError(f"shard {name} cannot be read ({error.strerror})") from error
    _warn(index, name)
    return index


def _warn(index: ShardIndex, name: str) -> None:
    if not len(index):
        _log.warning("%s holds no sample (key.jpg with key.txt)%s", name, _in_words(index.odd))
        return
    if index.truncated:
        _log.warning("%s is truncated or damaged: the %d samples up to the damage are used", name, len(index))
    if said := {reason: count for reason, count in index.odd.items() if reason not in _SILENT}:
        _log.warning("%s: %d samples%s", name, len(index), _in_words(said))


def _in_words(odd: Mapping[str, int]) -> str:
    return "".join(f"; {count} {reason} ({ODD[reason]})" for reason, count in odd.items())


class _Spans:
    """Members to spans; collects the stretches of the sparse ones."""

    def __init__(self) -> None:
        self.stretches: list[tuple[int, int, int]] = []
        self.starts = [0]

    def of(self, member: Member | None) -> Span:
        """The member's span."""
        if member is None:
            return _ABSENT, 0
        if member.extents is None:
            return member.offset, member.size
        at = member.offset
        for start, length in member.extents:
            if length:
                self.stretches.append((start, at, length))
            at += length
        self.starts.append(len(self.stretches))
        return _FIRST_SPARSE - (len(self.starts) - 2), member.size


def _to_arrays(samples: Mapping[str, Found], odd: Mapping[str, int], truncated: bool) -> ShardIndex:
    spans, found = _Spans(), list(samples.values())
    of_places = [[spans.of(sample.places.get(place)) for place in Place] for sample in found]
    frames = [[spans.of(sample.frames[number]) for number in sorted(sample.frames)] for sample in found]
    names = {name: number for number, name in enumerate(sorted({name for sample in found for name in sample.texts}))}
    texts = [[(*spans.of(member), names[name]) for name, member in sample.texts.items()] for sample in found]
    return ShardIndex(
        keys=Strings.of(samples),
        spans=np.array(of_places, dtype=np.int64).reshape(-1, len(Place), 2),
        frames=_joined(frames, 2),
        frame_starts=np.cumsum([0, *map(len, frames)], dtype=np.int64),
        texts=_joined(texts, 3),
        text_starts=np.cumsum([0, *map(len, texts)], dtype=np.int64),
        text_names=Strings.of(names),
        sparse=np.array(spans.stretches, dtype=np.int64).reshape(-1, 3),
        sparse_starts=np.array(spans.starts, dtype=np.int64),
        odd=odd,
        truncated=truncated,
        digest=0,
    )


def _joined(lists: Sequence[Sequence[tuple[int, ...]]], width: int) -> np.ndarray:
    return np.array([row for rows in lists for row in rows], dtype=np.int64).reshape(-1, width)


def _digest(index: ShardIndex, stream: BinaryIO) -> int:
    """The hash of every sample's key, of the size of each member in its place, and of the text itself (captions and
    metadata, the first 64 KiB of a member). Where the members lie does not count, so a shard that is packed again is
    the same shard; pictures count by their size alone, for hashing them would read the whole shard.
    """
    digest = blake2b(digest_size=8)
    spans = index.spans.copy()
    spans[:, :, 0] = np.where(spans[:, :, 0] == _ABSENT, _ABSENT, 0)
    for array in (spans, index.frames[:, 1], index.frame_starts, index.texts[:, 1:], index.text_starts):
        digest.update(np.ascontiguousarray(array).astype("<i8").tobytes())
    for strings in (index.keys, index.text_names):
        digest.update(strings.content.tobytes() + strings.ends.astype("<i8").tobytes())

    def read_at(offset: int, size: int) -> bytes:
        stream.seek(offset)
        return stream.read(min(size, _DIGESTED_TEXT_BYTES))

    texts = [*index.spans[:, Place.CAPTION :].reshape(-1, 2).tolist(), *index.texts[:, :2].tolist()]
    for offset, size in texts:
        if offset > _ABSENT or (offset <= _FIRST_SPARSE and size <= _DIGESTED_TEXT_BYTES):
            digest.update(index.read((offset, size), read_at))
    return int.from_bytes(digest.digest(), "big")
