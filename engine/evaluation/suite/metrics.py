"""Measures of a set, all of them shares (0..1), from ranks and predictions that no order or layout changes.

A rank is the number of wrong classes that score at least as high as the right one (engine/evaluation/ranking.py), so a
tie counts against the model. Classes with the same prompts are one class to the model: either is right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.evaluation.ranking import TILE_ROWS, Rows, score, tiles

_ELEVEN = 11


def ranks_and_predictions(images: Rows, rows: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rank of the right class, predicted class), int64 [n] each, of the images `rows` (int64 [n], of [N, D]).

    classes: fp32 [C, D], different ones; labels: int64 [n] in [0, C). A prediction is the label where the rank is 0,
    else the best wrong class.
    """
    ranks, predicted = torch.empty_like(labels), torch.empty_like(labels)
    for part in tiles(len(rows), TILE_ROWS):
        scores = score(_gather(images, rows[part]), classes)
        own = labels[part][:, None]
        right = scores.gather(1, own)
        others = scores.scatter(1, own, -torch.inf)
        ranks[part] = (others >= right).sum(dim=1)
        predicted[part] = torch.where(ranks[part] == 0, labels[part], others.argmax(dim=1))
    return ranks, predicted


def _gather(images: Rows, rows: Tensor) -> Tensor:
    """Rows rise, so one slice of the file holds a tile."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return images[slice(first, last)][rows - first]


def classification(
    ranks: Tensor, predicted: Tensor, labels: Tensor, classes: int, groups: Sequence[str] = ()
) -> dict[str, float]:
    """All measures of a set with one label a picture.

    Args:
        ranks, predicted: int64 [N], of different classes as the model tells them apart.
        labels: int64 [N], of the same.
        classes: how many different classes there are.
        groups: the group of every picture, for the worst one.
    """
    right = ranks == 0
    top5 = ranks < 5
    present = labels.unique()
    recalls = torch.stack([right[labels == label].double().mean() for label in present])
    measures = {"top1": float(right.double().mean())}
    measures["top5"] = float(top5.double().mean())
    measures["mean_top1_top5"] = (measures["top1"] + measures["top5"]) / 2
    measures |= {"mean_per_class": float(recalls.mean()), "macro_f1": _macro_f1(predicted, labels)}
    measures["macro_f1_present"] = _macro_f1(predicted, labels, present)
    if groups:
        of_group = {g: torch.tensor([group == g for group in groups]) for g in sorted(set(groups))}
        measures["worst_group"] = min(float(right[m].double().mean()) for m in of_group.values())
        measures["worst_group_top5"] = min(float(top5[m].double().mean()) for m in of_group.values())
    return measures | {"chance": 1 / classes}


def _macro_f1(predicted: Tensor, labels: Tensor, classes: Tensor | None = None) -> float:
    """Over `classes`; None: those that are a label or a prediction, as scikit-learn's f1_score(average="macro")."""
    scores = []
    for label in torch.cat([labels, predicted]).unique() if classes is None else classes:
        hits = int(((predicted == label) & (labels == label)).sum())
        scores.append(2 * hits / (int((predicted == label).sum()) + int((labels == label).sum())))
    return sum(scores) / len(scores)


def average_precisions(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over classes of both forms of average precision.

    Args:
        scores: float32 [N, C].
        truth: [N, C], 1 where a picture has the class. Classes without a picture do not count.

    Pictures of equal score stand at one threshold, as in scikit-learn's average_precision_score; the 11-point form is
    VOC 2007's: the mean of the best precision at recall 0, 0.1, … 1.
    """
    areas, elevens = [], []
    for column in range(scores.shape[1]):
        positive = truth[:, column].bool()
        if not bool(positive.any()):
            continue
        order = scores[:, column].argsort(descending=True, stable=True)
        ordered, hits = scores[order, column], positive[order].double().cumsum(0)
        ends = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
        precision = (hits / torch.arange(1, len(hits) + 1, dtype=torch.float64))[ends]
        found = hits[ends] / hits[-1]
        areas.append(float((precision * found.diff(prepend=torch.zeros(1, dtype=torch.float64))).sum()))
        best = [precision[found >= step / (_ELEVEN - 1) - 1e-12].max() for step in range(_ELEVEN)]
        elevens.append(float(torch.stack(best).mean()))
    if not areas:
        raise ValueError("no class has a picture")
    return {"average_precision": sum(areas) / len(areas), "average_precision_11": sum(elevens) / len(elevens)}
