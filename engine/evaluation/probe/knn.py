"""k nearest neighbours by cosine, weighted as in DINO (k 20, temperature 0.07)."""

import numpy as np
import torch
from torch.nn.functional import normalize

from engine.evaluation.ranking import TILE_ROWS, score, tiles


def knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, *, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """Predicted labels of `test`, from features [N, D] and [M, D], L2-normalised here; a tile of queries at a time."""
    candidates, of_candidate = normalize(torch.from_numpy(train)), torch.from_numpy(labels)
    predicted = []
    for part in tiles(len(test), TILE_ROWS):
        values, index = score(normalize(torch.from_numpy(test[part])), candidates).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(values), classes, dtype=torch.float64)
        votes.scatter_add_(1, of_candidate[index], (values.double() / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted).numpy()
