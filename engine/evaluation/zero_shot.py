"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1; the EVA-CLIP evaluation does the same).

Pure functions on tensors of one process: gathering embeddings over ranks is the caller's part.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from engine.evaluation.ranking import TILE_ROWS, Rows, best_ranks, check_indices, check_ks, share_within


def class_weights(text_embeddings: Tensor, templates_per_class: int) -> Tensor:
    """One embedding per class: L2-normalise the prompts, mean over a class's templates, L2-normalise.

    Args:
        text_embeddings: [C * T, D], the T prompts of class 0 first; any scale, any float type.
        templates_per_class: T.

    Returns:
        float32 [C, D].

    Raises:
        ValueError: the rows are not a multiple of T, or the prompts of a class cancel out.
    """
    rows = len(text_embeddings)
    if text_embeddings.ndim != 2 or templates_per_class < 1 or rows == 0 or rows % templates_per_class:
        raise ValueError(
            f"text embeddings {list(text_embeddings.shape)} are not [classes x templates, D] "
            f"with {templates_per_class} templates per class"
        )
    prompts = normalize(text_embeddings.float(), dim=-1).unflatten(0, (-1, templates_per_class))
    mean = prompts.mean(dim=1)
    if bool((mean.norm(dim=-1) == 0).any()):
        raise ValueError("the prompt embeddings of a class are zero or cancel out; check the weights")
    return normalize(mean, dim=-1)


def top_k_accuracy(
    image: Rows,
    classes: Rows,
    labels: Tensor,
    ks: tuple[int, ...] = (1, 5),
    *,
    tile_rows: int = TILE_ROWS,
) -> dict[str, float]:
    """Share (0..1) of images whose class is among the k best scores, for each k.

    Args:
        image: [N, D], L2-normalised.
        classes: [C, D], L2-normalised (`class_weights`), of C different classes.
        labels: int64 [N] in [0, C).
        ks: each between 1 and C.
        tile_rows: images scored at once; the [N, C] matrix never exists.

    Returns:
        {"top1": ..., "top5": ...}. Ties count against the model (engine/evaluation/ranking.py).

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked.
    """
    check_ks(ks, len(classes), "classes")
    check_indices(labels, len(classes), len(image), "labels")
    ranks = best_ranks(image, classes, torch.stack([torch.arange(len(image)), labels], dim=1), tile_rows=tile_rows)
    return {f"top{k}": share_within(ranks, k) for k in ks}
