"""Section evaluate: evaluation between steps."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.config.errors import MOST_STEPS, require, require_within
from models.sizes import Limits

if TYPE_CHECKING:
    from engine.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Zero-shot evaluation between steps, on shards that training does not see, or on a suite of sets.

    `evaluate=off` on the command line leaves out all that a config file says of it.
    """

    every_steps: int = 0
    """0: never. Otherwise also after the last step of every phase."""
    shards: list[str] = field(default_factory=list)
    """As data.shards."""
    classes: str = ""
    """Text file, one class name a line; a sample's caption is its class. Empty: every caption is a candidate."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Prompts of a class; {} stands for its name."""
    max_samples: int = 0
    """The first n samples only; 0: all."""
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay)."""
    suite: str = ""
    """A suite of sets (docs/evaluation.md): paper, datacomp, video, quick or FILE.yaml; besides shards or instead."""
    data: str = ""
    """The folder that holds the sets of the suite."""


_LIMITS: Limits = {"every_steps": (0, MOST_STEPS), "max_samples": (0, MOST_STEPS)}


def check_evaluate(config: "Config", *, reads_captions: bool) -> None:
    """Raise ConfigError for what cannot be run."""
    evaluate = config.evaluate
    require_within("evaluate", evaluate, _LIMITS)
    if not evaluate.every_steps:
        _refuse_idle(evaluate)
        return
    require(reads_captions, "evaluate is zero-shot: it needs captions, so objective=contrastive")
    require(
        bool(evaluate.shards or evaluate.suite),
        "evaluate.every_steps is set, but evaluate.shards is empty: give held-out shards, or evaluate.suite",
    )
    require(
        bool(evaluate.suite) == bool(evaluate.data),
        f"evaluate.suite {evaluate.suite!r} and evaluate.data {evaluate.data!r} go together: the suite and its folder",
    )
    require(
        bool(evaluate.shards) or not (evaluate.classes or evaluate.max_samples),
        "evaluate.classes and evaluate.max_samples are about evaluate.shards, which is empty",
    )
    require(
        bool(evaluate.templates) and all("{}" in template for template in evaluate.templates),
        f"evaluate.templates {evaluate.templates}: each needs {{}} in the place of the class name",
    )
    require(
        bool(evaluate.classes) or evaluate.templates == ["{}"],
        "evaluate.templates needs evaluate.classes: without it, captions are compared as they are",
    )
    require(not evaluate.ema or config.optim.ema_decay > 0, "evaluate.ema needs averaged weights: set optim.ema_decay")


def _refuse_idle(evaluate: EvaluateConfig) -> None:
    idle = [key for key in ("shards", "classes", "max_samples", "ema", "suite", "data") if getattr(evaluate, key)]
    require(not idle, f"evaluate.{idle[0] if idle else ''} has no effect without evaluate.every_steps")
