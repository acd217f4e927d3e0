"""Which sample a member of a tar belongs to, and what it is to it.

The rule (docs/data_files.md, "Keys"). A name is cut at its *last* dot: the suffix, in lower case, says what the member
is, the rest is the key of its sample. So `img_7 v2.0 (clean).jpg` and `img_7 v2.0 (clean).txt` are one sample, whatever
dots the key has. Then, for what has no partner under that key:

* a picture whose key goes on behind the key of another picture (`x.seg.png` beside `x.jpg`), and that has no text of
  its own, is a further picture of that sample: counted, not read;
* pictures `K.000.jpg`, `K.001.jpg`, ... (digits) without texts of their own are the frames of clip K if there is a
  `K.txt` or `K.json`, or if they are at least two and their numbers run from 0 or 1 without a gap;
* a text or metadata whose key goes on behind the key of another sample (`x.syn.txt` beside `x.jpg`) is a further text
  of that sample under the rest of its name (`syn.txt`), which data.captions can choose;
* everything else is a sample of its own, which lacks something: it is met, counted and replaced while reading.

Of two members for one place the first in the tar counts, a picture that can be decoded before one that cannot.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from data.shards.members import Member


class Place(IntEnum):
    """What a member is to its sample: the second axis of `ShardIndex.spans`."""

    IMAGE = 0
    CAPTION = 1
    METADATA = 2


UNUSED = {
    "other_suffix": "neither picture, clip, text nor metadata by its last suffix",
    "second_member": "a second member for a place that is taken, or a second frame of one number",
    "further_picture": "a picture beside the sample's own (x.seg.png beside x.jpg)",
    "not_data": "what macOS has put there (._name, __MACOSX/)",
}
"""Files of a tar that no sample reads: counted by these names, and what each means."""

_DECODED = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "mp4", "m4v", "webm", "mkv", "mov", "avi")
_NOT_DECODED = ("bmp", "tif", "tiff", "heic", "heif", "jxl", "jp2", "svg", "wmv", "flv", "mpg", "mpeg", "ogv", "3gp")
_PICTURES = frozenset((*_DECODED, *_NOT_DECODED))
_FRAME_SUFFIXES = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif"))
_TEXTS = {"txt": Place.CAPTION, "json": Place.METADATA}
_NUMBER = re.compile(r"[0-9]{1,18}")
_SYSTEM_NAME = re.compile(r"(?:^|/)(?:\._[^/]*$|__MACOSX/)")
_MOST_PREFIXES = 32  # dots of a key that are looked at: a name of a thousand dots must not cost a million look-ups


@dataclass(kw_only=True)
class Found:
    """Members of one sample."""

    places: dict[Place, Member] = field(default_factory=dict)
    frames: dict[int, Member] = field(default_factory=dict)
    texts: dict[str, Member] = field(default_factory=dict)
    """Further texts and metadata by the rest of their name ("syn.txt"), in lower case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A member with its name cut at the last dot."""

    key: str
    suffix: str
    place: Place
    member: Member


def group(members: Iterable[Member]) -> tuple[dict[str, Found], Counter[str]]:
    """Samples by key in the order of each one's first member, and how many members no sample reads, by the names of
    `UNUSED`: every member is in exactly one place or counted once.
    """
    unused: Counter[str] = Counter()
    entries = []
    for member in members:
        entry = _cut(member)
        if isinstance(entry, str):
            unused[entry] += 1
        else:
            entries.append(entry)
    names = _Names(entries)
    samples: dict[str, Found] = {}
    for entry in entries:
        reason = _add(samples, entry, names)
        if reason is not None:
            unused[reason] += 1
    return samples, unused


def _cut(member: Member) -> _Entry | str:
    """The member's entry, or why it has none."""
    if _SYSTEM_NAME.search(member.name):
        return "not_data"
    key, dot, suffix = member.name.rpartition(".")
    suffix = suffix.lower()
    place = Place.IMAGE if suffix in _PICTURES else _TEXTS.get(suffix)
    if not dot or place is None:
        return "other_suffix"
    return _Entry(key=key, suffix=suffix, place=place, member=member)


class _Names:
    """The keys of a shard by what stands under them."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._pictures: dict[str, Member] = {}
        self._texts: set[str] = set()
        for entry in entries:
            if entry.place is Place.IMAGE:
                kept = self._pictures.get(entry.key)
                if kept is None or (_can_decode(entry.member) and not _can_decode(kept)):
                    self._pictures[entry.key] = entry.member
            else:
                self._texts.add(entry.key)
        self._clips = self._find_clips()
        self._samples = self._clips | {key for key in self._pictures if self._is_own(key)}

    def is_first_picture(self, entry: _Entry) -> bool:
        """Whether this one of several pictures under one key is read."""
        return self._pictures[entry.key] is entry.member

    def goes_behind_picture(self, key: str) -> bool:
        """Another picture's key is the beginning of this picture's, which has no text of its own."""
        return key not in self._texts and any(prefix in self._pictures for prefix in _prefixes(key))

    def clip_of(self, key: str) -> tuple[str, int] | None:
        """(clip, number) if the pictures under the key are a frame."""
        frame = self._frame_name(key)
        return frame if frame is not None and frame[0] in self._clips and key not in self._texts else None

    def owner_of_text(self, key: str) -> str:
        """The key of the sample that a text belongs to."""
        if key in self._samples:
            return key
        prefixes = list(_prefixes(key))
        owners = [prefix for prefix in prefixes if prefix in self._samples]
        return owners[0] if owners else next((p for p in reversed(prefixes) if p in self._texts), key)

    def _is_own(self, key: str) -> bool:
        """The picture under the key has a sample of its own."""
        return not self.goes_behind_picture(key) and self.clip_of(key) is None

    def _find_clips(self) -> set[str]:
        numbers: dict[str, set[int]] = {}
        pictures: set[str] = set()
        for key in self._pictures:
            frame = self._frame_name(key)
            if frame is None or self.goes_behind_picture(key):
                continue
            if key in self._texts:
                pictures.add(frame[0])  # numbers that are pictures: part of the key
            else:
                numbers.setdefault(frame[0], set()).add(frame[1])
        return {clip for clip, found in numbers.items() if clip in self._texts or _in_a_row(found, clip in pictures)}

    def _frame_name(self, key: str) -> tuple[str, int] | None:
        """(clip, number) of a key that could be a frame's."""
        clip, dot, number = key.rpartition(".")
        is_name = bool(dot and clip) and not clip.endswith("/") and _NUMBER.fullmatch(number) is not None
        return (clip, int(number)) if is_name and _suffix(self._pictures[key]) in _FRAME_SUFFIXES else None


def _in_a_row(numbers: set[int], beside_pictures: bool) -> bool:
    first, last = min(numbers), max(numbers)
    return not beside_pictures and len(numbers) >= 2 and first in (0, 1) and last - first + 1 == len(numbers)


def _suffix(member: Member) -> str:
    return member.name.rpartition(".")[2].lower()


def _can_decode(member: Member) -> bool:
    return _suffix(member) in _DECODED


def _prefixes(key: str) -> Iterator[str]:
    """Beginnings of the key that end before a dot of its last component, the longest first."""
    start, at = key.rfind("/") + 1, len(key)
    for _ in range(_MOST_PREFIXES):
        at = key.rfind(".", start + 1, at)
        if at < 0:
            return
        yield key[:at]


def _add(samples: dict[str, Found], entry: _Entry, names: _Names) -> str | None:
    """Puts the entry into its sample; why not, if no sample reads it."""
    if entry.place is Place.IMAGE:
        if names.goes_behind_picture(entry.key):
            return "further_picture"
        frame = names.clip_of(entry.key)
        if frame is not None:
            frames = samples.setdefault(frame[0], Found()).frames
            return None if frames.setdefault(frame[1], entry.member) is entry.member else "second_member"
        sample = samples.setdefault(entry.key, Found())
        if not names.is_first_picture(entry):
            return "second_member"
        sample.places[Place.IMAGE] = entry.member
        return None
    owner = names.owner_of_text(entry.key)
    sample = samples.setdefault(owner, Found())
    if owner == entry.key:
        taken = sample.places.setdefault(entry.place, entry.member)
    else:
        taken = sample.texts.setdefault(f"{entry.key[len(owner) + 1 :]}.{entry.suffix}".lower(), entry.member)
    return None if taken is entry.member else "second_member"
