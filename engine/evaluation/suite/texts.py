"""Embeddings of class prompts and captions: each different text once, kept on disk for the next run."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from engine.evaluation.embedder import Embedder
from engine.evaluation.scores import check_embeddings
from engine.evaluation.suite.features import FileRows
from engine.evaluation.zero_shot import class_weights
from engine.parallel.agree import everyone
from engine.parallel.mesh import Axis

_PROMPTS_AT_ONCE = 8192


class DistinctClasses:
    """Classes as the model tells them apart: those whose prompts have the same tokens are one."""

    def __init__(self, names: Sequence[str], templates: Sequence[str], tokenizer: Tokenizer):
        """templates: {c} stands for the name."""
        first: dict[bytes, int] = {}
        rows, numbers = [], []
        for name in names:
            tokens = tokenizer.encode([template.replace("{c}", name) for template in templates])
            identity = tokens.tobytes()
            if identity not in first:
                first[identity] = len(first)
                rows.append(tokens)
            numbers.append(first[identity])
        self.tokens = torch.from_numpy(np.concatenate(rows))
        """int64 [different classes x templates, context]."""
        self.numbers = torch.tensor(numbers, dtype=torch.int64)
        """int64 [names]: which of the different classes a name is."""
        self.templates = len(templates)
        self.names = [names[numbers.index(number)] for number in range(len(first))]

    def __len__(self) -> int:
        return len(self.names)


class TextCache:
    """Embeddings by (checkpoint, tokens), as files of the folder."""

    def __init__(self, folder: Path, checkpoint: str, world: Axis):
        """checkpoint: a digest of the weights, the precision and what else changes an embedding."""
        self._folder, self._checkpoint, self._world = folder, checkpoint, world

    def classes(self, embedder: Embedder, classes: DistinctClasses) -> Tensor:
        """fp32 [C, D], L2-normalised. Collective over the mesh."""
        tokens = blake2b(classes.tokens.numpy().tobytes(), digest_size=16).hexdigest()
        path = self._folder / f"classes_{self._digest('classes', classes.templates, classes.tokens.shape, tokens)}.npy"
        known = np.load(path, allow_pickle=False) if self._world.rank == 0 and path.is_file() else None
        if (found := everyone(known, self._world)[0]) is not None:
            return torch.from_numpy(found)
        embeddings = embed_classes(embedder, classes)
        if self._world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial.npy")
            np.save(partial, embeddings.numpy(), allow_pickle=False)
            partial.replace(path)
        return embeddings

    def captions(self, embedder: Embedder, texts: Sequence[str], tokenizer: Tokenizer, identity: str) -> FileRows:
        """fp32 [M, D] of different captions, in a file that the first rank may read; an earlier run is taken up.

        identity: a digest of their tokens. Collective over the mesh.
        """
        width, first_rank = embedder.encoders.embed_dim, self._world.rank == 0
        path = self._folder / f"captions_{self._digest('captions', identity)}.f32"
        partial = path.with_name(path.name + ".partial")
        done = 0
        if first_rank:
            path.parent.mkdir(parents=True, exist_ok=True)
            done = len(texts) if path.is_file() else _whole_blocks(partial, 4 * width)
        start = everyone(done, self._world)[0]
        for first in range(start, len(texts), _PROMPTS_AT_ONCE):
            part = texts[first : first + _PROMPTS_AT_ONCE]
            embedded = embedder.texts(torch.from_numpy(tokenizer.encode(part))).cpu()
            check_embeddings(embedded, "text", part)
            if first_rank:
                with partial.open("ab") as file:
                    file.write(embedded.numpy().tobytes())
        if first_rank and not path.is_file():
            partial.replace(path)
        return FileRows(path, width)

    def _digest(self, *told: object) -> str:
        return blake2b(repr((self._checkpoint, *told)).encode(), digest_size=16).hexdigest()


def embed_classes(embedder: Embedder, classes: DistinctClasses) -> Tensor:
    """Prompts of as many classes at once as bounds the memory."""
    step = max(1, _PROMPTS_AT_ONCE // classes.templates)
    parts = []
    for first in range(0, len(classes), step):
        tokens = classes.tokens[first * classes.templates : (first + step) * classes.templates]
        names = [name for name in classes.names[first : first + step] for _ in range(classes.templates)]
        text = check_embeddings(embedder.texts(tokens).cpu(), "text", names)
        parts.append(class_weights(text, classes.templates))
    return torch.cat(parts)


def _whole_blocks(partial: Path, row_bytes: int) -> int:
    """Rows of the whole blocks in a file that a kill has left; what is behind them is cut off."""
    if not partial.is_file():
        return 0
    rows = partial.stat().st_size // row_bytes // _PROMPTS_AT_ONCE * _PROMPTS_AT_ONCE
    os.truncate(partial, rows * row_bytes)
    return rows
