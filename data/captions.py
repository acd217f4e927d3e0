"""Which text of a sample is its caption: several captions a picture, and parts of long ones.

`data.captions` gives each text a weight. A name says where the text lies:

* `txt`: the caption member (`key.txt`);
* `json.FIELD` (`json.a.b` for nested ones): a string of the metadata, or one of a list of strings;
* `syn.txt`: a further member of the sample (`key.syn.txt`);
* any of them with `.lines` at its end: one line of it that is not empty.

The text, line, list entry and sentence are functions of (seed, position) alone, so a run resumes exactly at any layout.
Where the chosen text is missing, empty or unusable, the others follow in the order of the config (weight 0: only then),
and the sample is counted; a sample without any is a bad one. Outside training nothing is drawn: the first text of the
config that is there, its first line or list entry, and its first sentence.
"""

import json
import re
from collections.abc import Callable, Mapping

import numpy as np

from data.errors import DataError, Rejected
from data.order.stateless import uniform

CAPTION, METADATA = "txt", "json"
_NAME = re.compile(r"(?:txt|json(?:\.[^.]+)+|.+\.txt)(?:\.lines)?")
_SENTENCES = re.compile(r"all|random|first [1-9][0-9]*")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_MOST_BYTES = 16 * 1024  # no context length reaches that far: such a text is no caption
_MOST_METADATA_BYTES = 1024 * 1024

Member = Callable[[str], tuple[int, Callable[[], bytes]] | None]
"""A member's name to its size and what reads it; None if the sample has no such member."""


def check_captions(weights: Mapping[str, float], sentences: str) -> None:
    """Raises DataError for settings that cannot be used."""
    wrong = [name for name in weights if not _NAME.fullmatch(name)]
    if wrong:
        raise DataError(
            f"data.captions names {wrong[0]!r}: use txt, json.FIELD or NAME.txt (a further member), each with .lines "
            "for one of its lines"
        )
    if weights and not (all(weight >= 0 for weight in weights.values()) and any(weights.values())):
        raise DataError(f"data.captions has the weights {dict(weights)}: none may be negative, one must be above 0")
    if not _SENTENCES.fullmatch(sentences):
        raise DataError(f"data.sentences is {sentences!r}: choose all, random or first N")


class CaptionChoice:
    """The caption of a sample by position; see the module text."""

    def __init__(self, weights: Mapping[str, float], sentences: str, *, seed: int, train: bool) -> None:
        """weights, sentences: as data.captions ({} means the caption member alone) and data.sentences."""
        self._names = list(weights) or [CAPTION]
        self._borders = np.cumsum(list(weights.values()) or [1.0])
        self._sentences = sentences
        self._seed, self._train = seed, train

    def order(self, position: int) -> list[str]:
        """Names of the texts: the chosen one first, then the others in the order of the config."""
        if not self._train or len(self._names) == 1:
            return self._names
        draw = self._draw(position, "caption") * self._borders[-1]
        chosen = self._names[int(np.searchsorted(self._borders, draw, side="right"))]
        return [chosen, *(name for name in self._names if name != chosen)]

    def read(self, name: str, position: int, member: Member) -> str:
        """The caption of that name, before cleaning. Raises Rejected."""
        text, lines = name.removesuffix(".lines"), name.endswith(".lines")
        if text.startswith(f"{METADATA}."):
            found = _field(_content(METADATA, member, _MOST_METADATA_BYTES), text.split(".")[1:])
        else:
            found = [_content(text, member, _MOST_BYTES)]
        if lines:
            found = [line for entry in found for line in entry.splitlines()]
        found = [entry.strip() for entry in found if entry.strip()] if lines or len(found) > 1 else found
        if not found:
            raise Rejected("empty_caption")
        caption = self._one(found, position, "caption entry")
        if len(caption.encode()) > _MOST_BYTES:
            raise Rejected("caption_too_long")
        return self._cut(caption, position).strip()

    def _cut(self, caption: str, position: int) -> str:
        """The sentences that are wanted."""
        if self._sentences == "all":
            return caption
        sentences = [part.strip() for part in _END_OF_SENTENCE.split(caption) if part.strip()]
        if not sentences:
            return ""
        if self._sentences == "random":
            return self._one(sentences, position, "caption sentence")
        return " ".join(sentences[: int(self._sentences.split()[1])])

    def _one(self, entries: list[str], position: int, purpose: str) -> str:
        draw = self._draw(position, purpose) if self._train and len(entries) > 1 else 0.0
        return entries[int(draw * len(entries))]

    def _draw(self, position: int, purpose: str) -> float:
        return float(uniform(self._seed, purpose, np.array([position], dtype=np.int64), 1)[0, 0])


def _content(name: str, member: Member, most_bytes: int) -> str:
    found = member(name)
    if found is None:
        raise Rejected("missing_caption")
    size, read = found
    if size > most_bytes:
        raise Rejected("caption_too_long")
    try:
        return read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8") from error


def _field(text: str, path: list[str]) -> list[str]:
    """The strings of a field of the metadata."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("missing_caption") from error
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    found = [entry for entry in values if isinstance(entry, str)]
    if not found:
        raise Rejected("missing_caption")
    return found
