"""Section checkpoint: what is saved and taken up again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.config.errors import MOST_STEPS, require, require_within
from models.sizes import Limits

if TYPE_CHECKING:
    from engine.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to go on from (docs/checkpoints.md)."""

    every_steps: int = 0
    """0: never (also not at the end)."""
    async_save: bool = True
    """Write in the background; training waits for the copy to host memory only (checkpoint_stall_s of the metrics)."""
    local_every_steps: int = 0
    """Also save every n steps on the hosts themselves, with a copy on the next one, for a start at the same layout; 0:
    never."""
    local_dir: str = "/dev/shm"
    """Where on each host: memory, or a disk of its own."""
    keep_last: int = 2
    """Older checkpoints are deleted, unless one of the next two keeps them."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step stay; 0: none for this reason."""
    keep_best: str = ""
    """Metric of the step record whose best checkpoint stays ("loss"); empty: none for this reason."""
    keep_best_is: str = "min"
    """min | max."""
    resume: str = "auto"
    """auto (the newest good one of run_dir, if any) | none | path of a checkpoint or run folder; any layout."""
    verify_hashes: bool = True
    """Check the hash of every file before loading (each by one rank); false: sizes only."""
    on_full: str = "stop"
    """A checkpoint that cannot be written, for want of space for example: stop | skip (try again when the next one is
    due) | wait (until there is room)."""
    skip: list[str] = field(default_factory=list)
    """Patterns of tensors of the checkpoint that are not loaded (`logit_scale.*`); everything else must fit."""
    reinit: list[str] = field(default_factory=list)
    """Patterns of tensors of the model that start afresh."""
    accept: list[str] = field(default_factory=list)
    """Settings that may differ from those of the checkpoint although they change the result (`optim.lr_*`)."""


_LIMITS: Limits = {
    "every_steps": (0, MOST_STEPS),
    "local_every_steps": (0, MOST_STEPS),
    "keep_last": (1, MOST_STEPS),
    "keep_every_steps": (0, MOST_STEPS),
}


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("checkpoint", checkpoint, _LIMITS)
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    require(
        kept >= 0 and (kept == 0 or (every > 0 and kept % every == 0)),
        f"checkpoint.keep_every_steps is {kept}: 0, or a multiple of checkpoint.every_steps {every}",
    )
    local = checkpoint.local_every_steps
    require(
        local == 0 or 0 < local < every,
        f"checkpoint.local_every_steps is {local}: 0 (never), or fewer than checkpoint.every_steps {every}, whose "
        "checkpoints outlive the loss of two hosts",
    )
    require(
        local == 0 or checkpoint.resume == "auto",
        f"checkpoint.local_every_steps {local} is for runs that go on by themselves: checkpoint.resume=auto, not "
        f"{checkpoint.resume}",
    )
    require(
        checkpoint.local_dir.startswith("/"),
        f"checkpoint.local_dir is {checkpoint.local_dir!r}: a whole path, the same on every host",
    )
    require(
        local > 0 or checkpoint.local_dir == CheckpointConfig().local_dir,
        f"checkpoint.local_dir {checkpoint.local_dir} has no effect without checkpoint.local_every_steps",
    )
    partial = [key for key in ("skip", "reinit") if getattr(checkpoint, key)]
    require(
        not partial or checkpoint.resume not in ("auto", "none"),
        f"checkpoint.{partial[0] if partial else ''} needs checkpoint.resume=PATH: a run takes its own checkpoints "
        "whole",
    )
    require(
        checkpoint.on_full in ("stop", "skip", "wait"),
        f"checkpoint.on_full is {checkpoint.on_full!r}: choose stop, skip or wait",
    )
    require(
        checkpoint.keep_best_is in ("min", "max"),
        f"checkpoint.keep_best_is is {checkpoint.keep_best_is!r}: choose min or max",
    )


def check_best(config: "Config", missing: Mapping[str, str]) -> None:
    """keep_best needs checkpoints, a number that this job measures at each of them, and its better end.

    missing: numbers that it does not measure -> why.
    """
    best, every, saved = config.checkpoint.keep_best, config.evaluate.every_steps, config.checkpoint.every_steps
    require(saved > 0 or not best, f"checkpoint.keep_best {best} has no effect without checkpoint.every_steps")
    require(
        best not in missing,
        f"checkpoint.keep_best is {best}, which this job does not measure ({missing.get(best)})",
    )
    require(
        config.checkpoint.keep_best_is == "max" or not _is_accuracy(best),
        f"checkpoint.keep_best is {best}, where more is better: set checkpoint.keep_best_is=max",
    )
    require(
        not best.startswith("eval_") or (every > 0 and saved % every == 0),
        f"checkpoint.keep_best is {best}, but evaluate.every_steps {every} does not divide checkpoint.every_steps "
        f"{saved}: there would be checkpoints without it",
    )


def _is_accuracy(metric: str) -> bool:
    ends = ("top1", "top5", "recall_at_1", "recall_at_5")
    return metric in ("i2t_top1", "t2i_top1") or (metric.startswith("eval_") and metric.endswith(ends))
