"""Blocks of shards to rows of a table of embeddings: what is there is embedded, what is not is marked or left out."""

import numpy as np
import torch

from engine.config.read import Config
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, SampleInput
from engine.evaluation.scores import LeftOut
from engine.evaluation.vocabulary import tokenizer_of

_ABSENT = ("missing_image", "missing_caption", "empty_caption")
"""Reasons that say of one side that it is not there; any other says that something is there and cannot be read."""


class ShardRows:
    """Embeds blocks and keeps account of what is left out."""

    def __init__(self, source: SampleInput, embedder: Embedder, config: Config, *, keep: bool):
        """keep: unreadable samples become rows of NaN with a mark, instead of being left out."""
        self._source, self._embedder, self.keeps_all = source, embedder, keep
        self._tokenizer = tokenizer_of(config.model.text, config.data)
        self.left_out = LeftOut(kept=keep)
        self.samples = 0

    def columns(self, block: Block) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(columns, which of their rows are valid). Collective over the mesh."""
        count = block.stop - block.start
        assert block.pixels is not None and block.has_image is not None
        has_image = block.has_image.numpy()
        has_text = np.array([caption is not None for caption in block.captions], dtype=bool)
        values, valid = {}, {}
        if self._source.has_images:
            embedded = self._embedder.images(block.pixels, count).cpu().numpy()
            values["image_embeddings"], valid["image_embeddings"] = _or_nan(embedded, has_image), has_image
        if self._source.has_tokens:
            values["text_embeddings"], valid["text_embeddings"] = self._texts(block, has_text), has_text
        rows = self._rows(block, np.logical_or.reduce(list(valid.values())))
        columns = {name: column[rows] for name, column in values.items()}
        columns |= {f"{name.removesuffix('_embeddings')}_valid": of_column[rows] for name, of_column in valid.items()}
        columns["keys"] = np.array([block.keys[row] for row in rows], dtype=np.str_)
        return columns, {name: of_column[rows] for name, of_column in valid.items()}

    def _texts(self, block: Block, has_text: np.ndarray) -> np.ndarray:
        captions = [caption for caption in block.captions if caption is not None]
        tokens = torch.from_numpy(self._tokenizer.encode(captions))
        texts = np.full((len(block.captions), self._embedder.encoders.embed_dim), np.nan, dtype=np.float32)
        texts[has_text] = self._embedder.texts(tokens).cpu().numpy()
        return texts

    def _rows(self, block: Block, something: np.ndarray) -> np.ndarray:
        """Which samples become rows; something: bool [rows], one side at least is valid."""
        wanted = {"image": self._source.has_images, "caption": self._source.has_tokens}
        sides = [side for side, present in wanted.items() if present]
        judged = [bad for bad in block.bad if bad.reason not in _ABSENT or not something[bad.position - block.start]]
        if len(sides) == 1:  # nobody asks for the other side
            judged = [bad for bad in judged if bad.reason != f"missing_{'caption' if sides == ['image'] else 'image'}"]
        self.samples += block.stop - block.start
        self.left_out.samples += judged
        if self.keeps_all:
            return np.arange(block.stop - block.start)
        gone = {bad.position - block.start for bad in judged}
        return np.array([row for row in range(block.stop - block.start) if row not in gone], dtype=np.int64)


def _or_nan(embeddings: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid[:, None], embeddings, np.float32(np.nan))
