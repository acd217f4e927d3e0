"""Settings of a job that the search does not choose: those that are given, and what no price knows.

What the search finds, or an option of the command names, is `CHOSEN`. What takes neither time nor memory nor messages
of a step is `FREE`, what does and is not priced `UNPRICED`, which is said in a line. All else is priced: a test walks
the schema.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from engine.config.help.fields import settings
from engine.config.read import Config, refuse_repeats, resolve
from engine.config.text import split_override
from tools.cost.layout import PlanError

CHOSEN = (
    *("objective", "model.*", "phases*", "mim.*", "data.frames"),
    *("parallel.tensor", "parallel.pipeline", "parallel.sequence", "parallel.virtual", "parallel.round_size"),
    *("parallel.shard", "parallel.shard_ranks", "parallel.layers"),
    *("train.steps", "train.global_batch_size", "train.micro_batch_size", "train.text_micro_batch_size"),
    *("train.keep_activations", "train.activation_budget_gb", "train.recompute", "train.patch_dropout"),
    *("train.offload_stash", "train.keep_outputs", "train.outputs_budget_gb", "train.offload_outputs"),
    "train.precision",
)
"""Patterns of what the search finds, or an option of the command names."""
FREE = (
    *("run_dir", "init.*", "log.*", "health.on_*", "health.*_factor", "health.window_steps", "health.max_*"),
    *("model.preset", "model.*.norm_eps", "model.*.pixel_norm", "model.vision.rope_grid", "model.vision.rope_kind"),
    *("model.text.pad_id", "model.text.causal", "model.vision.pool_heads", "model.vision.pos_embed"),
    *("data.shards", "data.subset*", "data.mix*", "data.sources*", "data.shuffle*", "data.crop_scale", "data.flip"),
    *("data.captions", "data.tokenizer", "data.cleaning", "data.sentences", "data.changed", "data.max_*"),
    *("data.cache_*", "data.remote_*", "data.stall_timeout_s"),
    *("parallel.*_minutes", "parallel.preflight", "parallel.elastic", "train.steps", "train.seed"),
    *("train.logit_scale", "train.distill*.path", "train.distill*.logit_scale"),
    *("optim.mode", "optim.lr_*", "optim.betas", "optim.eps", "optim.weight_decay", "optim.layer_decay_*"),
    *("optim.warmup_steps", "optim.min_lr_ratio", "optim.clip_grad_norm", "optim.trust_*", "optim.nvlamb_*"),
    *("checkpoint.keep*", "checkpoint.resume", "checkpoint.verify_hashes", "checkpoint.on_full", "checkpoint.skip"),
    *("checkpoint.reinit", "checkpoint.accept", "checkpoint.local_dir", "mim.teacher", "mim.min_*", "mim.max_block"),
    *("mim.patch_gradient_scale", "phases*.name", "phases*.samples", "phases*.steps", "phases*.optimizer"),
    *("phases*.schedule", "objective"),
)
"""Patterns of what costs nothing of a step, or a few numbers."""
UNPRICED = {
    "data.workers": "pictures are decoded as fast as the profile says",
    "data.decoder": "pictures are decoded as fast as the profile says",
    "data.scaled_decode": "pictures are decoded as fast as the profile says",
    "data.prefetch_batches": "no memory of the readers",
    "checkpoint.every_steps": "a step without saves",
    "checkpoint.async_save": "a step without saves",
    "checkpoint.local_every_steps": "a step without saves",
    "evaluate.*": "a step without evaluations",
    "model.backend": "but local linears",
}
"""Pattern -> what is priced instead."""
_PRICED_VALUES = {
    "model.backend": ("local", "transformer_engine"),
}
"""Values of unpriced settings that are what is priced."""


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a setting is one of these; entries of lists have no number."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def given_config(
    model: str, overrides: Sequence[str], *, global_batch: int, frames: int = 1, patch_dropout: float = 0.5
) -> Config:
    """A job of one rank with what the `dotted.key=value` say; raises ConfigError, and PlanError for what the search
    chooses.
    """
    refuse_repeats(list(overrides))
    for override in overrides:
        key = ".".join(split_override(override)[0])
        if matches(key, CHOSEN):
            raise PlanError(f"{key} is what the plan finds, or has an option of its own (--help): leave it out")
    train = {
        "precision": "bf16",
        "global_batch_size": global_batch,
        "micro_batch_size": frames,
        "patch_dropout": patch_dropout,
    }
    tree = {"model": model, "data": {"shards": ["-"], "frames": frames}, "train": train}
    return resolve(tree, list(overrides), "plan")


def left_out(config: Config) -> list[str]:
    """What of a config is not priced, a line a sort, with the settings that ask for it."""
    found: dict[str, list[str]] = {}
    for key in settings():
        pattern = next((pattern for pattern in UNPRICED if fnmatchcase(key, pattern)), None)
        if pattern is None:
            continue
        value = _value(config, key)
        if value != _value(Config(), key) and value not in _PRICED_VALUES.get(pattern, ()):
            found.setdefault(UNPRICED[pattern], []).append(f"{key}={value}")
    return [f"not priced: {', '.join(asked)} ({instead})" for instead, asked in found.items()]


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
