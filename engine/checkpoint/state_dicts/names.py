"""The names of a state dict without what the programs that trained it put around them.

DistributedDataParallel, torch.compile, FSDP, activation checkpointing, DeepSpeed and Lightning each wrap modules, and
each wrapper is a component of the names below it: `module._orig_mod.visual.blocks.0._checkpoint_wrapped_module.norm1`.
"""

from collections.abc import Iterable

from engine.checkpoint.format.errors import CheckpointError

_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Components that no model has, wherever they stand: torch.compile, FSDP (and its first releases), activation
checkpointing, Lightning's strategies."""
_LEADING = frozenset(("module", "model", "state_dict"))
"""Components that no layout begins with: DistributedDataParallel and DeepSpeed, Lightning and timm, nested saving."""
_ROOTS = frozenset(
    (
        "visual", "text", "logit_scale", "logit_bias", "vision_model", "text_model", "vision", "trunk", "encoder",
        "embeddings", "layer", "layers", "blocks", "transformer", "norm", "head", "rope", "patch_embed",
        "token_embedding", "ln_final", "ln_pre", "ln_post", "conv1", "visual_projection", "text_projection", "lm_head",
    )
)  # fmt: skip
"""First components of the layouts with further components behind them: never taken for a wrapper."""


def clean_names(keys: Iterable[str], source: str) -> dict[str, str]:
    """Name without wrappers -> key of the file. Raises CheckpointError where two keys would be the same tensor."""
    cleaned = {key: _unwrapped(key) for key in keys}
    while prefix := _common_prefix(cleaned.values()):
        cleaned = {key: name.removeprefix(prefix) for key, name in cleaned.items()}
    out: dict[str, str] = {}
    for key, name in cleaned.items():
        if name in out:
            raise CheckpointError(
                f"{source}: {out[name]!r} and {key!r} are both {name!r} without the prefixes of wrappers; save the "
                "state dict of one of the two models"
            )
        out[name] = key
    return out


def _unwrapped(key: str) -> str:
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts.pop(0)
    return ".".join(parts)


def _common_prefix(names: Iterable[str]) -> str:
    """`net.` where every name begins with it and `net` is no part of a layout, otherwise nothing."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return f"{first}." if first and first not in _ROOTS else ""
