"""Image-text retrieval, both directions, with any number of captions per image (five in Flickr30K, COCO).

Recall@k as the EVA-CLIP paper's tables report it: image to text counts a hit if any of the image's captions
is among the k best; text to image if any image that has the caption is. Pure functions on tensors of one process.
"""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from engine.evaluation.ranking import TILE_ROWS, Rows, both_ranks, check_ks, score, share_within, tiles

_DIRECTIONS = ("image_to_text", "text_to_image")


class Prediction(TypedDict):
    """One caption proposed for an image."""

    caption: str
    """The caption."""
    score: float
    """Cosine of the two embeddings, -1..1."""


def recall(
    image: Rows, text: Rows, pairs: Tensor, ks: tuple[int, ...] = (1, 5, 10), *, tile_rows: int = TILE_ROWS
) -> dict[str, float]:
    """Recall@k (0..1) of both directions.

    Args:
        image: [N, D], L2-normalised, of N different pictures.
        text: [M, D], L2-normalised, of M different captions.
        pairs: int64 [P, 2]: (image, caption) that belong together; an image may have several captions and a caption
            several images, and each of them is a right answer. Every image and every caption is in a pair.
        ks: each between 1 and min(N, M).
        tile_rows: queries scored at once; the [N, M] matrix never exists.

    Returns:
        {"image_to_text_recall_at_1": ..., "text_to_image_recall_at_1": ...}, both keys for every k. Ties count
        against the model (engine/evaluation/ranking.py).

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked, or an image or caption without the other.
    """
    check_ks(ks, min(len(image), len(text)), "images and captions")
    ranks = dict(zip(_DIRECTIONS, both_ranks(image, text, pairs, tile_rows=tile_rows), strict=True))
    return {
        f"{direction}_recall_at_{k}": share_within(of_direction, k)
        for direction, of_direction in ranks.items()
        for k in ks
    }


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
        N lists of k. For showing only: of equal scores the one with the lower index stands first.

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked.
    """
    check_ks((k,), len(text), "captions")
    if len(captions) != len(text):
        raise ValueError(f"{len(captions)} captions for {len(text)} text embeddings")
    best: list[list[Prediction]] = []
    for rows in tiles(len(image), tile_rows):
        values, index = score(image[rows], text).sort(dim=1, descending=True, stable=True)
        for row_values, row_index in zip(values[:, :k].tolist(), index[:, :k].tolist(), strict=True):
            best.append(
                [Prediction(caption=captions[i], score=value) for i, value in zip(row_index, row_values, strict=True)]
            )
    return best
