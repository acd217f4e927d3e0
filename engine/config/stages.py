"""Which blocks of the vision tower a pipeline stage (or a chunk of it) holds: evenly, by hand, or by cost.

Arithmetic only: config checks and the planner use it where no process group, and no torch, exists.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from models.config import ModelConfig
from models.tensors.flops import block_flops, embedding_flops, head_flops, last_block_flops


def stage_layers(depth: int, stages: int, counts: Sequence[int] | None = None) -> list[range]:
    """Blocks of each stage (in tower order; with virtual stages, of each chunk).

    counts: blocks of each, by hand. None: as even as can be, the remainder on the middle stages, since the first one
    also embeds patches and the last one projects.
    """
    if counts is None:
        counts = even_layers(depth, stages)
    starts = [0, *accumulate(counts)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def even_layers(depth: int, stages: int) -> list[int]:
    """Blocks of each stage, the remainder on the middle ones."""
    base, extra = divmod(depth, stages)
    first = (stages - extra) // 2
    return [base + (first <= stage < first + extra) for stage in range(stages)]


def balanced_layers(model: ModelConfig, *, stages: int, virtual: int, tokens: int) -> list[int]:
    """Blocks of each of the stages x virtual chunks, in tower order, so that the dearest chunk costs least.

    Costs are FLOPs of one sample of `tokens` kept tokens: patch embedding on the first chunk, the last block's own cost
    and the projection of the pooled token on the last. The other blocks are alike, so handing each to the cheapest
    chunk so far is optimal; ties go to the rank with the least work, then to the middle chunk. Raises ValueError where
    a chunk would get no block.
    """
    chunks, depth = stages * virtual, model.vision.depth
    if stages < 1 or virtual < 1 or chunks > depth:
        raise ValueError(
            f"{depth} blocks cannot be balanced over {stages} stages x {virtual} chunks: each needs at least one block"
        )
    cost = chunk_costs(model, [1] * chunks, tokens)
    block = block_flops(model.vision, tokens)
    counts = [1] * chunks

    def place(chunk: int) -> tuple[float, float, float]:
        return cost[chunk], sum(cost[chunk % stages :: stages]), abs(chunk - (chunks - 1) / 2)

    for _ in range(depth - chunks):
        cheapest = min(range(chunks), key=place)
        counts[cheapest] += 1
        cost[cheapest] += block
    return counts


def chunk_costs(model: ModelConfig, counts: Sequence[int], tokens: int) -> list[int]:
    """Forward FLOPs of one sample in each chunk of `counts` blocks."""
    vision = model.vision
    cost = [count * block_flops(vision, tokens) for count in counts]
    cost[0] += embedding_flops(vision, tokens)
    cost[-1] += last_block_flops(vision, tokens) - block_flops(vision, tokens) + head_flops(model, tokens)
    return cost
