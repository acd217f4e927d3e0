"""Tokenizers by a file of the user's: a tokenizer.json, or a SentencePiece model. Nothing is fetched.

SigLIP's are a SentencePiece model (32,000 ids; `</s>` ends a caption and pads it), SigLIP 2's is Gemma's (256,000 ids;
`<eos>` ends, `<pad>` pads). What is put around a caption is the file's own affair: a JSON has a template for it, a
SentencePiece model an end.
"""

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.errors import DataError
from data.tokenizer import Tokenizer, clean

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PADS, _ENDS = ("<pad>", "[PAD]", "<|pad|>"), ("<eos>", "</s>", "<|endoftext|>", "[SEP]", "<|end_of_text|>")


def canonical(text: str) -> str:
    """SigLIP's cleaning: repaired and unescaped as CLIP's, without punctuation, lower case, single spaces."""
    return " ".join(clean(text).replace("_", " ").translate(_PUNCTUATION).split())


CLEANING: dict[str, Callable[[str], str]] = {"clip": clean, "canonical": canonical, "none": lambda text: text}
"""data.cleaning -> what is done to a caption before it is cut into tokens."""


class FileTokenizer(Tokenizer):
    """Rows of `context_length` ids from a file; over-length captions keep their end."""

    def __init__(self, path: Path, context_length: int, cleaning: str) -> None:
        """Raises DataError for a file that is no tokenizer."""
        if not path.is_file():
            raise DataError(f"data.tokenizer {path} does not exist: name a tokenizer.json or a SentencePiece .model")
        self.context_length, self._clean = context_length, CLEANING[cleaning]
        read = _sentencepiece if path.suffix == ".model" else _json
        self._ids, self.size, self.pad_id, self.end_id = read(path, context_length)
        self._empty = len(self._ids(""))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [len(texts), context_length]."""
        rows = np.full((len(texts), self.context_length), self.pad_id, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self._ids(self._clean(text))
            row[: len(ids)] = ids
        return rows

    def is_empty(self, text: str, ids: np.ndarray) -> bool:
        """Whether nothing stands between what the file puts around a caption."""
        return len(self._ids(self._clean(text))) <= self._empty


Read = tuple[Callable[[str], list[int]], int, int, int | None]
"""Text to ids, how many ids there are, the one that pads, the one that ends a caption (None: none)."""


def _json(path: Path, context_length: int) -> Read:
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise DataError(f"data.tokenizer {path} is no tokenizer.json: {error}") from None
    padding = found.padding
    named = next((found.token_to_id(name) for name in _PADS if found.token_to_id(name) is not None), None)
    found.no_padding()
    found.enable_truncation(context_length)
    last = found.encode("a").ids[-1:]
    ends = {found.token_to_id(name) for name in _ENDS}
    end = last[0] if last and last[0] in ends else None
    pad = padding["pad_id"] if padding else named if named is not None else end if end is not None else 0
    return lambda text: found.encode(text).ids, found.get_vocab_size(), pad, end


def _sentencepiece(path: Path, context_length: int) -> Read:
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            f"data.tokenizer {path} needs the package sentencepiece ({error}): pip install sentencepiece"
        ) from None
    try:
        found: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"data.tokenizer {path} is no SentencePiece model: {error}") from None
    end = found.eos_id() if found.eos_id() >= 0 else None
    pad = found.pad_id() if found.pad_id() >= 0 else end if end is not None else 0
    ending = [] if end is None else [end]
    room = context_length - len(ending)
    return lambda text: [*found.encode(text)[:room], *ending], found.get_piece_size(), pad, end


def make_tokenizer(name: str, cleaning: str, context_length: int) -> Tokenizer:
    """The tokenizer of data.tokenizer and data.cleaning. Raises DataError for a file that is none."""
    if name == "clip":
        return Tokenizer(context_length)
    return FileTokenizer(Path(name), context_length, "canonical" if cleaning == "auto" else cleaning)
