"""Sizes that a tower may have: a size of nothing, or one that no machine holds, is a slip of the pen."""

from collections.abc import Mapping
from typing import Any

Limits = Mapping[str, tuple[float, float]]
"""Field -> the least and the most that it may be; a field that is null is left alone."""

MOST_CONTEXT = 1024
"""Most token ids of a caption."""
_MOST_WIDTH, _MOST_HIDDEN, _MOST_DEPTH = 1 << 17, 1 << 20, 1 << 10
MODEL: Limits = {"embed_dim": (1, _MOST_WIDTH), "fp8_bf16_blocks": (0, _MOST_DEPTH)}
VISION: Limits = {
    "image_size": (1, 1 << 14),
    "patch_size": (1, 1 << 10),
    "depth": (1, _MOST_DEPTH),
    "width": (1, _MOST_WIDTH),
    "head_width": (1, 1 << 12),
    "mlp_hidden": (1, _MOST_HIDDEN),
    "norm_eps": (1e-30, 1),
    "rope_grid": (1, 1 << 14),
    "layer_scale": (-1e3, 1e3),
    "registers": (0, 1 << 10),
    "pool_heads": (1, 1 << 12),
    "pool_mlp_hidden": (1, _MOST_HIDDEN),
}
TEXT: Limits = {
    "context_length": (2, MOST_CONTEXT),
    "vocab_size": (1, 1 << 24),
    "width": (1, _MOST_WIDTH),
    "depth": (1, _MOST_DEPTH),
    "heads": (1, 1 << 12),
    "mlp_hidden": (1, _MOST_HIDDEN),
    "norm_eps": (1e-30, 1),
    "pad_id": (0, 1 << 24),
}


def outside(section: str, values: Any, limits: Limits) -> str | None:
    """What is wrong with the first field of `values` (a dataclass) that is out of its limits: key, value and limit."""
    for name, (least, most) in limits.items():
        value = getattr(values, name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not least <= entry <= most:
                limit = f"at least {least:,}" if not entry >= least else f"at most {most:,}"
                return f"{section}.{name} is {entry}: it must be {limit}"
    return None
