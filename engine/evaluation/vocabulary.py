"""The tokenizer of a model's captions, also where its token table is smaller than the tokenizer's: toy models."""

from collections.abc import Sequence

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.tokenizer import EOT, SOT, VOCAB_SIZE, Tokenizer
from data.vocabulary.files import make_tokenizer
from models.config import TextConfig


class FoldedTokenizer(Tokenizer):
    """Token ids folded into a smaller table; its two highest ids are start and end of text, as in the full one.

    Different words may get the same id: enough to run a toy model, and nothing to read a score of texts from.
    """

    def __init__(self, context_length: int, size: int):
        """size: ids of the table, at least 3."""
        super().__init__(context_length)
        self._size = size

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [len(texts), context_length]."""
        ids = super().encode(texts)
        folded = ids % (self._size - 2)
        folded[ids == SOT], folded[ids == EOT] = self._size - 2, self._size - 1
        return folded


def tokenizer_of(text: TextConfig, data: DataConfig | None = None) -> Tokenizer:
    """What encodes the captions for this text tower; data: of its job. Raises DataError where no tokenizer fits."""
    if data is not None and data.tokenizer != "clip":
        return make_tokenizer(data.tokenizer, data.cleaning, text.context_length)
    if text.vocab_size > VOCAB_SIZE:
        raise DataError(
            f"the model has {text.vocab_size:,} token ids and CLIP's tokenizer {VOCAB_SIZE:,}: name the model's own in "
            "data.tokenizer (a tokenizer.json or a SentencePiece .model)"
        )
    if text.vocab_size < VOCAB_SIZE:
        return FoldedTokenizer(text.context_length, text.vocab_size)
    return Tokenizer(text.context_length)


def remark_on(text: TextConfig) -> str:
    """What people are told of the tokenizer; empty for the usual one."""
    if text.vocab_size >= VOCAB_SIZE:
        return ""
    return (
        f"WARNING: the model has {text.vocab_size:,} token ids and the tokenizer {VOCAB_SIZE:,}: ids are folded into "
        "its table, so what is scored with texts shows that the command runs, and no more"
    )
