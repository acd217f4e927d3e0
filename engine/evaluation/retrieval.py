"""Image-text retrieval, both directions, with any number of captions per image (five in Flickr30K, COCO).

Recall@k as the EVA-CLIP paper's tables report it: image to text counts a hit if any of the image's captions
is among the k best; text to image has one right image per caption. Pure functions on tensors of one process.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from engine.evaluation.ranking import TILE_ROWS, check_indices, check_ks, rank_of, score_tiles, share_within


class Prediction(TypedDict):
    """One caption proposed for an image."""

    caption: str
    """The caption."""
    score: float
    """Cosine of the two embeddings, -1..1."""


def recall(
    image: Tensor,
    text: Tensor,
    text_to_image: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    *,
    tile_rows: int = TILE_ROWS,
) -> dict[str, float]:
    """Recall@k (0..1) of both directions.

    Args:
        image: [N, D], L2-normalised.
        text: [M, D], L2-normalised, on the same device.
        text_to_image: int64 [M]: the image of each caption, in [0, N); every image has at least one.
        ks: each between 1 and min(N, M).
        tile_rows: queries scored at once; the [N, M] matrix never exists.

    Returns:
        {"image_to_text_recall_at_1": ..., "text_to_image_recall_at_1": ...}, both keys for every k. Ties: the
        lower index comes first (engine/evaluation/ranking.py).

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked, or an image without a caption.
    """
    check_ks(ks, min(len(image), len(text)), "images and captions")
    check_indices(text_to_image, len(image), len(text), "text_to_image")
    without_caption = len(image) - len(torch.unique(text_to_image))
    if without_caption:
        raise ValueError(f"{without_caption} of {len(image)} images have no caption; drop them before scoring")
    ranks = {
        "image_to_text": _ranks_of_best_caption(image, text, text_to_image, tile_rows),
        "text_to_image": torch.cat(
            [rank_of(scores, text_to_image[rows]) for rows, scores in score_tiles(text, image, tile_rows=tile_rows)]
        ),
    }
    return {
        f"{direction}_recall_at_{k}": share_within(of_direction, k)
        for direction, of_direction in ranks.items()
        for k in ks
    }


def _ranks_of_best_caption(image: Tensor, text: Tensor, text_to_image: Tensor, tile_rows: int) -> Tensor:
    """int64 [N]: rank of each image's best own caption among all M."""
    ranks = []
    for rows, scores in score_tiles(image, text, tile_rows=tile_rows):
        image_index = torch.arange(rows.start, rows.stop, device=scores.device)
        own = text_to_image[None, :] == image_index[:, None]
        # argmax returns the first maximum, which is the tie rule.
        best = scores.masked_fill(~own, -torch.inf).argmax(dim=1)
        ranks.append(rank_of(scores, best))
    return torch.cat(ranks)


def mean_recall(*results: dict[str, float]) -> float:
    """Mean of every recall of one or several data sets.

    The paper's MR is the mean of 12: two data sets x two directions x R@1/5/10.
    """
    recalls = [value for result in results for value in result.values()]
    if not recalls:
        raise ValueError("mean_recall needs at least one result of recall()")
    return sum(recalls) / len(recalls)


def predictions(
    image: Tensor, text: Tensor, captions: Sequence[str], k: int = 3, *, tile_rows: int = TILE_ROWS
) -> list[list[Prediction]]:
    """The k best captions of every image, best first, ready for JSON.

    Args:
        image: [N, D], L2-normalised.
        text: [M, D], L2-normalised, on the same device.
        captions: the M captions in the order of `text`.
        k: between 1 and M.
        tile_rows: images scored at once.

    Returns:
        N lists of k. Ties: the lower caption index comes first.

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked.
    """
    check_ks((k,), len(text), "captions")
    if len(captions) != len(text):
        raise ValueError(f"{len(captions)} captions for {len(text)} text embeddings")
    best: list[list[Prediction]] = []
    for _, scores in score_tiles(image, text, tile_rows=tile_rows):
        values, index = scores.sort(dim=1, descending=True, stable=True)
        for row_values, row_index in zip(values[:, :k].tolist(), index[:, :k].tolist(), strict=True):
            best.append(
                [Prediction(caption=captions[i], score=value) for i, value in zip(row_index, row_values, strict=True)]
            )
    return best
