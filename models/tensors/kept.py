"""Which outputs of a block's matrix products may be kept, and what they take; plain arithmetic, no torch."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from models.config import TextConfig, VisionConfig

LEVELS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fc2": ("fc2",),
    "fc2+proj": ("fc2", "proj"),
    "fc2+proj+qkv": ("fc2", "proj", "qkv"),
    "all": ("fc2", "proj", "qkv", "fc1"),
}
"""train.keep_outputs -> kinds of products whose outputs are kept, most FLOPs spared per byte first."""


@lru_cache(maxsize=4096)
def kept_elements(
    tower: VisionConfig | TextConfig,
    level: str,
    *,
    blocks: int,
    tokens: int,
    pooled: int | None,
    tensor: int = 1,
    sequence: bool = False,
) -> int:
    """Elements that one pass over `tokens` packed tokens keeps on a rank, in `blocks` blocks.

    pooled: rows that the last of them answers with (padding included), where it ends a tower whose head reads one token
    of each sample; None otherwise. tensor, sequence: ranks of the tensor axis, and whether they split the tokens.
    """
    split = {"qkv": tensor, "fc1": tensor, "fc2": tensor if sequence else 1, "proj": tensor if sequence else 1}
    return sum(_rows(kind, blocks, tokens, pooled) * _width(tower, kind) // split[kind] for kind in LEVELS[level])


def spared_flops(
    tower: VisionConfig | TextConfig, level: str, *, blocks: int, tokens: int, pooled: int | None, tensor: int = 1
) -> int:
    """FLOPs of the products that a repeated pass over `tokens` does not multiply on a rank (2 per multiply-add)."""
    return sum(
        2 * _rows(kind, blocks, tokens, pooled) * _width(tower, kind) * _inputs(tower, kind) // tensor
        for kind in LEVELS[level]
    )


def choose_levels(budget_bytes: float, sizes: Sequence[dict[str, int]]) -> list[str]:
    """The highest level of every part that the budget holds; what spares more FLOPs per byte goes first.

    sizes: of each part, its bytes by level.
    """
    chosen, left = ["none"] * len(sizes), budget_bytes - sum(size["none"] for size in sizes)
    for below, level in pairwise(LEVELS):
        for i, size in enumerate(sizes):
            more = size[level] - size[below]
            if chosen[i] == below and more <= left:
                chosen[i], left = level, left - more
    return chosen


def _rows(kind: str, blocks: int, tokens: int, pooled: int | None) -> int:
    """Rows of all blocks' products of a kind; the last block's keys and values are those of all tokens."""
    if pooled is None:
        return blocks * tokens
    return (blocks - 1) * tokens + (tokens if kind == "qkv" else pooled)


def _width(tower: VisionConfig | TextConfig, kind: str) -> int:
    """Output features of a product, on all tensor ranks together."""
    if kind in ("fc2", "proj"):
        return tower.width
    return _channels(tower) * 3 if kind == "qkv" else _hidden(tower) * (2 if _gated(tower) else 1)


def _inputs(tower: VisionConfig | TextConfig, kind: str) -> int:
    return {"fc2": _hidden(tower), "proj": _channels(tower), "qkv": tower.width, "fc1": tower.width}[kind]


def _hidden(tower: VisionConfig | TextConfig) -> int:
    return tower.mlp_hidden if isinstance(tower, VisionConfig) else tower.hidden


def _channels(tower: VisionConfig | TextConfig) -> int:
    return tower.heads * tower.head_width if isinstance(tower, VisionConfig) else tower.width


def _gated(tower: VisionConfig | TextConfig) -> bool:
    return tower.mlp == "swiglu"
