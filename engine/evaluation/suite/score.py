"""Measures of a listed set from its embeddings, on one rank."""

import math
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer, clean
from engine.evaluation.ranking import TILE_ROWS, Rows, score, tiles
from engine.evaluation.retrieval import mean_recall, recall
from engine.evaluation.sets.associations import Question
from engine.evaluation.sets.listing import Listing
from engine.evaluation.suite.features import Features
from engine.evaluation.suite.metrics import average_precisions, classification, ranks_and_predictions
from engine.evaluation.suite.texts import DistinctClasses

_KS = (1, 5, 10)


@dataclass(frozen=True)
class Captions:
    """The different captions of a retrieval set, and which samples have which."""

    texts: list[str]
    identity: str
    """A digest of their tokens."""
    pairs: np.ndarray
    """int64 [P, 2]: (sample, number of a caption of it), by sample."""


def distinct_captions(listing: Listing, tokenizer: Tokenizer) -> Captions:
    """Captions with the same tokens are one; the prompt of a question is its caption. DataError if there is none."""
    number: dict[bytes, int] = {}
    texts: list[str] = []
    pairs: list[tuple[int, int]] = []
    for sample, captions in enumerate(listing.test.captions or [[q.prompt] for q in listing.test.questions]):
        worded = [caption for caption in captions if clean(caption)]
        for text, tokens in zip(worded, tokenizer.encode(worded), strict=True):
            identity = blake2b(tokens.tobytes(), digest_size=16).digest()
            if identity not in number:
                number[identity] = len(number)
                texts.append(text)
            pairs.append((sample, number[identity]))
    if not texts:
        raise DataError(f"{listing.folder}: no sample has a caption")
    every = blake2b(b"".join(number), digest_size=16).hexdigest()
    return Captions(texts, every, np.array(pairs, dtype=np.int64))


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
    """Some rows of many, rising, a part at a time."""

    def __init__(self, images: Rows, rows: np.ndarray):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> Tensor:
        chosen = self._rows[rows]
        return self._images[slice(int(chosen[0]), int(chosen[-1]) + 1)][torch.from_numpy(chosen - chosen[0])]


def score_retrieval(features: Features, images: Rows, captions: Captions, text: Rows) -> dict[str, float]:
    """text: fp32 [M, D] of the different captions. Pictures with the same pixels are one picture."""
    pairs = captions.pairs[np.isin(captions.pairs[:, 0], features.scored.numpy())]
    if not len(pairs):
        raise DataError("no sample has both a picture that can be read and a caption: there is nothing to retrieve")
    samples, sample = np.unique(pairs[:, 0], return_inverse=True)
    identities = features.pictures()[samples].view("V16")[:, 0]
    _, first, picture = np.unique(identities, return_index=True, return_inverse=True)
    rising = np.argsort(first)  # rows of the file are read forwards
    place = np.empty_like(rising)
    place[rising] = np.arange(len(rising))
    used, caption = np.unique(pairs[:, 1], return_inverse=True)
    right = torch.from_numpy(np.unique(np.stack([place[picture[sample]], caption], axis=1), axis=0))
    chosen = samples[first[rising]]
    ks = tuple(k for k in _KS if k <= min(len(chosen), len(used)))
    found = recall(_Chosen(images, chosen), _Chosen(text, used), right, ks=ks)
    both = (found["image_to_text_recall_at_1"] + found["text_to_image_recall_at_1"]) / 2
    chance = len(right) / len(chosen) / len(used)
    return found | {
        "mean_recall": mean_recall(found),
        "mean_recall_at_1": both,
        "chance": chance,
        "pictures": len(chosen),
        "captions": len(used),
    }


def score_associations(
    questions: list[Question], features: Features, captions: Captions, text: Rows
) -> dict[str, float]:
    """Means over the questions of which every picture could be read.

    text: fp32 [M, D] of the different prompts. Of pictures that score alike, the wrong ones are chosen first.
    """
    readable, images = set(features.scored.tolist()), features.rows()
    shares: dict[int, list[float]] = {}
    chances: list[float] = []
    for question, prompt in zip(questions, captions.pairs[:, 1].tolist(), strict=True):
        if not readable.issuperset(question.candidates):
            continue
        scores = score(
            text[slice(prompt, prompt + 1)], torch.cat([images[slice(row, row + 1)] for row in question.candidates])
        )[0]
        is_right = [row in question.right for row in question.candidates]
        order = sorted(range(len(is_right)), key=lambda at: (-float(scores[at]), is_right[at]))
        right = len(question.right)
        hits = sum(is_right[at] for at in order[:right])
        shares.setdefault(len(is_right), []).append(hits / (2 * right - hits))
        chances.append(_chance_of_jaccard(len(is_right), right))
    if not chances:
        raise DataError("no question has all of its pictures: none can be scored")
    every = [share for of_size in shares.values() for share in of_size]
    many = [share for size, of_size in shares.items() if 10 <= size <= 12 for share in of_size]
    measures = {"jaccard": sum(every) / len(every), "chance": sum(chances) / len(chances)}
    if many:
        measures["jaccard_10_12"] = sum(many) / len(many)
    return measures | {"questions": len(every), "pictures": len(readable)}


def _chance_of_jaccard(candidates: int, right: int) -> float:
    """The mean Jaccard index of `right` pictures drawn without replacement."""
    ways = math.comb(candidates, right)
    return sum(
        math.comb(right, hits) * math.comb(candidates - right, right - hits) / ways * hits / (2 * right - hits)
        for hits in range(right + 1)
    )
