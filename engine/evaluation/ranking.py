"""Ranks of the right answers, streamed over tiles of queries: what zero-shot and retrieval have in common.

Scores are cosines: dot products of L2-normalised embeddings, summed in float64 and rounded to float32.
Products of float32 numbers are exact in float64, so neither the tile size, nor the BLAS library, nor TF32
changes a rank, and two candidates with the same embedding tie exactly.

Ties: the candidate with the lower index comes first, as in a stable sort by falling score.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS = 512


def score_tiles(queries: Tensor, candidates: Tensor, *, tile_rows: int = TILE_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the score matrix, a tile at a time.

    Args:
        queries: [Q, D], L2-normalised.
        candidates: [C, D], L2-normalised, on the device of `queries`.
        tile_rows: queries per tile; peak memory is about 14 bytes x tile_rows x C beside a
            float64 copy of the candidates.

    Yields:
        The slice of queries and their scores, float32 [rows, C].

    Raises:
        ValueError: shapes do not match, there is nothing to rank, or an embedding is not finite (NaN compares
            false with everything, so it would count as a perfect rank).
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"embeddings must be [Q, D] and [C, D] of one D, got {list(queries.shape)} and {list(candidates.shape)}"
        )
    if len(queries) == 0 or len(candidates) == 0:
        raise ValueError(f"nothing to rank: {len(queries)} queries, {len(candidates)} candidates")
    for name, embeddings in (("query", queries), ("candidate", candidates)):
        bad_rows = int((~torch.isfinite(embeddings).all(dim=1)).sum())
        if bad_rows:
            raise ValueError(f"{bad_rows} of {len(embeddings)} {name} embeddings are not finite; check the weights")
    columns = candidates.double().T
    for start in range(0, len(queries), tile_rows):
        rows = slice(start, min(start + tile_rows, len(queries)))
        yield rows, (queries[rows].double() @ columns).float()


def rank_of(scores: Tensor, target: Tensor) -> Tensor:
    """int64 [rows]: candidates that stand before `target` (int64 [rows], an index each); 0 is the best rank.

    Args:
        scores: float32 [rows, C].
        target: int64 [rows], each in [0, C).
    """
    own = scores.gather(1, target[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (index < target[:, None]))
    return before.sum(dim=1)


def share_within(ranks: Tensor, k: int) -> float:
    """Share (0..1) of `ranks` (int64 [Q], 0 is best) among the first k."""
    return int((ranks < k).sum()) / len(ranks)


def check_ks(ks: tuple[int, ...], candidates: int, what: str) -> None:
    """Refuse a k that no ranking of so many candidates can fail.

    Raises:
        ValueError: a k below 1 or above the number of candidates.
    """
    if not ks or min(ks) < 1 or max(ks) > candidates:
        raise ValueError(f"ks {ks} must lie between 1 and the number of {what}, which is {candidates}")


def check_indices(indices: Tensor, count: int, length: int, what: str) -> None:
    """Refuse labels that are not int64 [length] in [0, count).

    Raises:
        ValueError: another type, shape or range.
    """
    if indices.dtype != torch.int64 or list(indices.shape) != [length]:
        raise ValueError(f"{what} must be int64 [{length}], got {indices.dtype} {list(indices.shape)}")
    if length and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise ValueError(f"{what} must lie in [0, {count}), got {int(indices.min())} to {int(indices.max())}")
