"""Section init: weights that a job starts from."""

from dataclasses import dataclass, field

from engine.config.errors import require


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights that a fresh run starts from; a checkpoint of its own comes first (checkpoint.resume)."""

    vision: str | None = None
    """Checkpoint or run folder, or a file in the authors' layout: its vision tower (a MIM student's too)."""
    text: str | None = None
    """The same for the text tower."""
    logit_scale: str | None = None
    """The same for the learned logit scale."""
    skip: list[str] = field(default_factory=list)
    """Patterns of their tensors that are not loaded."""
    reinit: list[str] = field(default_factory=list)
    """Patterns of tensors that start afresh (`vision.head.projection.*`, `text.projection.weight`)."""
    resize_patch: bool = False
    """Interpolate a patch kernel of another size; positions are interpolated anyway."""


def check_init(init: InitConfig) -> None:
    """Raise ConfigError for what cannot be run."""
    loads = init.vision or init.text or init.logit_scale
    idle = [key for key in ("skip", "reinit", "resize_patch") if getattr(init, key) and not loads]
    key = idle[0] if idle else ""
    require(not idle, f"init.{key} has no effect without init.vision, init.text or init.logit_scale")
