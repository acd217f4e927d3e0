"""Captions to CLIP token ids.

The byte-pair encoding is that of data/bpe.py; the cleaning before it is that of EVA-CLIP's tokenizer.py: repair of
mis-decoded text (ftfy), HTML entities (twice: web captions are often escaped twice), whitespace, lower case. A literal
"<end_of_text>" in a caption becomes the special id, as there.
"""

import html
from collections.abc import Sequence

import ftfy
import numpy as np

from data.bpe import SPECIAL, encoder
from data.errors import DataError

VOCAB_SIZE = 49_408
SOT, EOT = SPECIAL["<start_of_text>"], SPECIAL["<end_of_text>"]
PAD = 0
LONGEST = 1 << 14
"""Characters of a text that are looked at: many times what fills a row; 100 MB would take a reader minutes."""


def clean(text: str) -> str:
    """Repaired, unescaped, lower-case text with single spaces."""
    if not _is_plain(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _is_plain(text: str) -> bool:
    """Whether there is nothing to repair: most captions, of whose time ftfy would take the larger half."""
    return text.isascii() and text.isprintable() and "&" not in text


class Tokenizer:
    """CLIP byte-pair encoding to rows of `context_length` ids."""

    size = VOCAB_SIZE
    """Ids of the vocabulary."""
    pad_id = PAD
    """Id behind the end of a caption."""
    end_id: int | None = EOT
    """Id that ends a caption; None where nothing does."""

    def __init__(self, context_length: int) -> None:
        if context_length < 2:
            raise DataError(f"context length {context_length}: start and end of text alone need 2")
        self.context_length = context_length
        self._bpe = encoder()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [len(texts), context_length]: SOT, ids, EOT, zeros; over-length rows are cut and end with
        EOT.
        """
        rows = np.full((len(texts), self.context_length), PAD, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [SOT, *self._bpe(clean(text[:LONGEST]))[: self.context_length - 2], EOT]
            row[: len(ids)] = ids
        return rows

    def is_empty(self, text: str, ids: np.ndarray) -> bool:
        """Whether a text, whose ids are given, has nothing between start and end."""
        return bool(ids[1] == EOT)
