"""Embeddings of class prompts and captions: each different text once, kept on disk for the next run."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from engine.evaluation.embedder import Embedder
from engine.evaluation.scores import check_embeddings
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
    """Embeddings by (checkpoint, tokens), as files of the folder; a folder of None keeps nothing."""

    def __init__(self, folder: Path | None, checkpoint: str, world: Axis):
        """checkpoint: a digest of the weights, the precision and what else changes an embedding."""
        self._folder, self._checkpoint, self._world = folder, checkpoint, world

    def classes(self, embedder: Embedder, classes: DistinctClasses) -> Tensor:
        """fp32 [C, D], L2-normalised. Collective over the mesh."""
        return self._cached("classes", classes.tokens, classes.templates, lambda: _embed_classes(embedder, classes))

    def captions(self, embedder: Embedder, tokens: Tensor, captions: Sequence[str]) -> Tensor:
        """fp32 [M, D] of different captions. Collective over the mesh."""
        return self._cached("captions", tokens, 1, lambda: _embed_texts(embedder, tokens, captions))

    def _cached(self, kind: str, tokens: Tensor, templates: int, embed) -> Tensor:
        digest = blake2b(digest_size=16)
        for part in (
            self._checkpoint.encode(),
            str((kind, templates, tuple(tokens.shape))).encode(),
            tokens.numpy().tobytes(),
        ):
            digest.update(part)
        path = self._folder / f"{kind}_{digest.hexdigest()}.npy" if self._folder is not None else None
        known = (
            np.load(path, allow_pickle=False) if path is not None and self._world.rank == 0 and path.is_file() else None
        )
        if (found := everyone(known, self._world)[0]) is not None:
            return torch.from_numpy(found)
        embeddings = embed()
        if path is not None and self._world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial.npy")
            np.save(partial, embeddings.numpy(), allow_pickle=False)
            partial.replace(path)
        return embeddings


def _embed_classes(embedder: Embedder, classes: DistinctClasses) -> Tensor:
    """Prompts of as many classes at once as bounds the memory."""
    step = max(1, _PROMPTS_AT_ONCE // classes.templates)
    parts = []
    for first in range(0, len(classes), step):
        tokens = classes.tokens[first * classes.templates : (first + step) * classes.templates]
        names = [name for name in classes.names[first : first + step] for _ in range(classes.templates)]
        text = check_embeddings(embedder.texts(tokens).cpu(), "text", names)
        parts.append(class_weights(text, classes.templates))
    return torch.cat(parts)


def _embed_texts(embedder: Embedder, tokens: Tensor, captions: Sequence[str]) -> Tensor:
    parts = [
        check_embeddings(embedder.texts(tokens[first : first + _PROMPTS_AT_ONCE]).cpu(), "text", captions[first:])
        for first in range(0, len(tokens), _PROMPTS_AT_ONCE)
    ]
    return torch.cat(parts)
