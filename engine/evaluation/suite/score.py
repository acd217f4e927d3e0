"""Measures of a listed set from its embeddings, on one rank."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer, clean
from engine.evaluation.ranking import TILE_ROWS, Rows, score, tiles
from engine.evaluation.retrieval import mean_recall, recall
from engine.evaluation.sets.listing import Listing
from engine.evaluation.suite.features import Features
from engine.evaluation.suite.metrics import average_precisions, classification, ranks_and_predictions
from engine.evaluation.suite.texts import DistinctClasses

_KS = (1, 5, 10)


@dataclass(frozen=True)
class Captions:
    """The different captions of a retrieval set, and which samples have which."""

    tokens: Tensor
    """int64 [M, context]."""
    texts: list[str]
    of_sample: list[list[int]]
    """Numbers of the captions of every sample."""


def distinct_captions(listing: Listing, tokenizer: Tokenizer) -> Captions:
    """Captions with the same tokens are one. Raises DataError if there is none."""
    number: dict[bytes, int] = {}
    rows, texts = [], []
    of_sample = []
    for captions in listing.test.captions:
        worded = [caption for caption in captions if clean(caption)]
        tokens = tokenizer.encode(worded)
        numbers = []
        for text, row in zip(worded, tokens, strict=True):
            identity = row.tobytes()
            if identity not in number:
                number[identity] = len(number)
                rows.append(row)
                texts.append(text)
            numbers.append(number[identity])
        of_sample.append(numbers)
    if not rows:
        raise DataError(f"{listing.folder}: no sample has a caption")
    return Captions(torch.from_numpy(np.stack(rows)), texts, of_sample)


def score_classification(
    listing: Listing, features: Features, images: Rows, classes: DistinctClasses, weights: Tensor
) -> dict[str, float]:
    """weights: fp32 [C, D] of the different classes."""
    assert listing.test.labels is not None
    rows = features.scored
    labels = classes.numbers[torch.from_numpy(listing.test.labels)[rows]]
    ranks, predicted = ranks_and_predictions(images, rows, weights, labels)
    groups = [listing.test.groups[row] for row in rows.tolist()] if listing.test.groups else []
    return classification(ranks, predicted, labels, len(classes), groups)


def score_multilabel(
    listing: Listing, features: Features, images: Rows, classes: DistinctClasses, weights: Tensor
) -> dict[str, float]:
    """A picture may have any number of classes; equal names share what either is given."""
    assert listing.test.labels is not None
    rows = features.scored
    truth = torch.zeros(len(rows), len(classes), dtype=torch.uint8)
    given = torch.from_numpy(listing.test.labels)[rows]
    for column, number in enumerate(classes.numbers.tolist()):
        truth[:, number] |= given[:, column]
    scores = []
    for part in tiles(len(rows), TILE_ROWS):
        first, last = int(rows[part][0]), int(rows[part][-1]) + 1
        scores.append(score(images[slice(first, last)][rows[part] - first], weights))
    return average_precisions(torch.cat(scores), truth) | {"chance": float(truth.double().mean())}


class _Chosen:
    """Some rows of many, a part at a time."""

    def __init__(self, images: Rows, rows: list[int]):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> Tensor:
        chosen = self._rows[rows]
        if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
            return self._images[slice(chosen[0], chosen[0] + len(chosen))]
        return torch.cat([self._images[slice(row, row + 1)] for row in chosen])


def score_retrieval(features: Features, images: Rows, captions: Captions, text: Tensor) -> dict[str, float]:
    """text: fp32 [M, D] of the different captions. Pictures with the same pixels are one picture."""
    identities = features.pictures()
    number: dict[bytes, int] = {}
    chosen: list[int] = []
    pairs: set[tuple[int, int]] = set()
    for row in features.scored.tolist():
        if not captions.of_sample[row]:
            continue
        identity = identities[row].tobytes()
        if identity not in number:
            number[identity] = len(number)
            chosen.append(row)
        pairs |= {(number[identity], caption) for caption in captions.of_sample[row]}
    used = sorted({caption for _, caption in pairs})
    at = {caption: place for place, caption in enumerate(used)}
    pairs_at = torch.tensor(sorted((image, at[caption]) for image, caption in pairs), dtype=torch.int64)
    ks = tuple(k for k in _KS if k <= min(len(chosen), len(used)))
    found = recall(_Chosen(images, chosen), text[used], pairs_at, ks=ks)
    both = (found["image_to_text_recall_at_1"] + found["text_to_image_recall_at_1"]) / 2
    chance = len(pairs) / len(chosen) / len(used)
    return found | {
        "mean_recall": mean_recall(found),
        "mean_recall_at_1": both,
        "chance": chance,
        "pictures": len(chosen),
        "captions": len(used),
    }
