"""Ranks of the right answers, streamed over tiles of queries: what zero-shot and retrieval have in common.

Scores are cosines: dot products of L2-normalised embeddings, summed in float64 and rounded to float32.
Products of float32 numbers are exact in float64, so neither the tile size, nor the BLAS library, nor TF32
changes a rank, and two candidates with the same embedding tie exactly.

Ties, everywhere: a right answer has to score higher than every wrong one, so a tie counts against the model, and
no order of samples or candidates changes a score. Candidates that are the same to the model (equal captions, equal
class names, equal pictures) are one candidate, and right if any of them is; the callers see to that.
"""

from typing import Protocol

import torch
from torch import Tensor

TILE_ROWS = 512
TILE_COLUMNS = 2048
"""A tile of scores and its comparisons take 512 x 2,048 x (8 + 4 + 1 + 1) bytes, 15 MB."""


class Rows(Protocol):
    """Embeddings [N, D] that can be read a part at a time: a tensor, or a file of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def tiles(length: int, size: int) -> list[slice]:
    """Consecutive parts of `size`, the last one shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def score(queries: Tensor, candidates: Tensor) -> Tensor:
    """Cosines float32 [Q, C] of L2-normalised [Q, D] and [C, D].

    Raises:
        ValueError: shapes do not match, or an embedding is not finite (NaN compares
            false with everything, so it would count as a perfect rank).
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"embeddings must be [Q, D] and [C, D] of one D, got {list(queries.shape)} and {list(candidates.shape)}"
        )
    for name, embeddings in (("query", queries), ("candidate", candidates)):
        bad_rows = int((~torch.isfinite(embeddings).all(dim=1)).sum())
        if bad_rows:
            raise ValueError(f"{bad_rows} of {len(embeddings)} {name} embeddings are not finite; check the weights")
    return (queries.double() @ candidates.double().T).float()


def best_ranks(
    queries: Rows, candidates: Rows, right: Tensor, *, tile_rows: int = TILE_ROWS, tile_columns: int = TILE_COLUMNS
) -> Tensor:
    """int64 [Q]: wrong candidates that score at least as high as a query's best right one; 0 is the best rank.

    Args:
        queries: [Q, D], L2-normalised.
        candidates: [C, D], L2-normalised.
        right: int64 [P, 2], pairs (query, candidate) in any order; every query has at least one.
        tile_rows, tile_columns: what is scored at once; they bound the memory, whatever Q and C are.

    Raises:
        ValueError: shapes, ranges or values that cannot be ranked, or a query without a right answer.
    """
    if len(queries) == 0 or len(candidates) == 0:
        raise ValueError(f"nothing to rank: {len(queries)} queries, {len(candidates)} candidates")
    check_indices(right[:, 0], len(queries), len(right), "queries of the right answers")
    check_indices(right[:, 1], len(candidates), len(right), "right answers")
    without = len(queries) - len(torch.unique(right[:, 0]))
    if without:
        raise ValueError(f"{without} of {len(queries)} queries have no right answer; drop them before scoring")
    right = right[right[:, 0].argsort(stable=True)]
    ranks = torch.empty(len(queries), dtype=torch.int64)
    for rows in tiles(len(queries), tile_rows):
        first, last = torch.searchsorted(right[:, 0].contiguous(), torch.tensor([rows.start, rows.stop])).tolist()
        of_tile = right[first:last] - torch.tensor([rows.start, 0])
        ranks[rows] = _ranks_of_tile(queries[rows], candidates, of_tile, tile_columns)
    return ranks


def _ranks_of_tile(queries: Tensor, candidates: Rows, right: Tensor, tile_columns: int) -> Tensor:
    """right: with queries counted from the first of the tile. The scores of a tile are the same in both passes."""
    columns = tiles(len(candidates), tile_columns)
    best = torch.full((len(queries),), -torch.inf)
    kept: dict[int, Tensor] = {}
    for part in columns:
        of_part = right[(right[:, 1] >= part.start) & (right[:, 1] < part.stop)]
        if len(of_part):
            scores = score(queries, candidates[part])
            best.scatter_reduce_(0, of_part[:, 0], scores[of_part[:, 0], of_part[:, 1] - part.start], "amax")
            kept = {part.start: scores}  # one tile is often all there is
    before = torch.zeros(len(queries), dtype=torch.int64)
    for part in columns:
        of_part = right[(right[:, 1] >= part.start) & (right[:, 1] < part.stop)]
        known = kept.get(part.start)
        wrong = (score(queries, candidates[part]) if known is None else known) >= best[:, None]
        wrong[of_part[:, 0], of_part[:, 1] - part.start] = False
        before += wrong.sum(dim=1)
    return before


def both_ranks(
    queries: Rows, candidates: Rows, right: Tensor, *, tile_rows: int = TILE_ROWS, tile_columns: int = TILE_COLUMNS
) -> tuple[Tensor, Tensor]:
    """`best_ranks` of the queries among the candidates and of the candidates among the queries, int64 [Q] and [C], from
    one pass over the scores. Every query and every candidate is in a pair of `right`.
    """
    check_indices(right[:, 0], len(queries), len(right), "queries of the right answers")
    check_indices(right[:, 1], len(candidates), len(right), "right answers")
    for side, count in ((0, len(queries)), (1, len(candidates))):
        without = count - len(torch.unique(right[:, side]))
        if without or not count:
            raise ValueError(f"{without} of {count} {('queries', 'candidates')[side]} have no partner; drop them first")
    rows, columns = tiles(len(queries), tile_rows), tiles(len(candidates), tile_columns)
    pairs = _pairs_of_tiles(right, tile_rows, tile_columns)
    of_query = torch.full((len(queries),), -torch.inf)
    of_candidate = torch.full((len(candidates),), -torch.inf)
    for (i, j), own in pairs.items():
        found = score(queries[rows[i]], candidates[columns[j]])[own[:, 0], own[:, 1]]
        of_query[rows[i]].scatter_reduce_(0, own[:, 0], found, "amax")
        of_candidate[columns[j]].scatter_reduce_(0, own[:, 1], found, "amax")
    query_ranks = torch.zeros(len(queries), dtype=torch.int64)
    candidate_ranks = torch.zeros(len(candidates), dtype=torch.int64)
    for i, of_tile in enumerate(rows):
        mine = queries[of_tile]
        for j, part in enumerate(columns):
            scores = score(mine, candidates[part])
            if (i, j) in pairs:
                own = pairs[i, j]
                scores[own[:, 0], own[:, 1]] = -torch.inf
            query_ranks[of_tile] += _count(scores >= of_query[of_tile, None], 1)
            candidate_ranks[part] += _count(scores >= of_candidate[None, part], 0)
    return query_ranks, candidate_ranks


def _count(mask: Tensor, dim: int) -> Tensor:
    """Trues along `dim`; summing bool itself widens to int64 first, which takes four to ten times as long."""
    return mask.view(torch.uint8).sum(dim, dtype=torch.int32)


def _pairs_of_tiles(right: Tensor, tile_rows: int, tile_columns: int) -> dict[tuple[int, int], Tensor]:
    """The pairs of every tile that has some, counted from the tile's corner."""
    size = torch.tensor([tile_rows, tile_columns])
    tile = right // size
    order = (tile[:, 0] * (int(tile[:, 1].max()) + 1) + tile[:, 1]).argsort(stable=True)
    corners, counts = torch.unique_consecutive(tile[order], dim=0, return_counts=True)
    parts = (right % size)[order].split(counts.tolist())
    return {(i, j): part for (i, j), part in zip(corners.tolist(), parts, strict=True)}


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
