"""Section health: steps that are not sound."""

from dataclasses import dataclass

from engine.config.errors import MOST_STEPS, require, require_within
from models.sizes import Limits


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What happens to a step that went wrong (docs/during_training.md)."""

    on_nonfinite: str = "stop"
    """A loss or gradient norm that is not finite: stop | skip (no update) | rewind (weights of the last checkpoint)."""
    on_spike: str = "off"
    """A spike: off | stop | skip | rewind."""
    on_divergence: str = "stop"
    """Copies of weights that differ: stop | repair (owners send theirs again, no update) | rewind."""
    audit_every_steps: int = 10
    """Copies of weights are compared every n steps and before every checkpoint; 0: never."""
    loss_factor: float = 0.0
    """A loss above this many times the median of the last window_steps good ones is a spike; 0: not watched."""
    gradient_factor: float = 0.0
    """The same for the gradient norm before clipping."""
    window_steps: int = 100
    """Good steps that the medians are taken over; before there are so many, nothing is a spike."""
    max_skips: int = 10
    """So many skipped steps in a row are borne; one more stops the run."""
    max_rewinds: int = 3
    """So many rewinds in the whole run are borne; one more stops it."""


_ACTIONS = ("stop", "skip", "rewind")


_LIMITS: Limits = {
    "audit_every_steps": (0, MOST_STEPS),
    "loss_factor": (0, 1e30),
    "gradient_factor": (0, 1e30),
    "window_steps": (1, 10**6),
    "max_skips": (1, MOST_STEPS),
    "max_rewinds": (1, MOST_STEPS),
}


def check_health(health: HealthConfig, *, checkpoints: bool) -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("health", health, _LIMITS)
    require(
        health.on_nonfinite in _ACTIONS,
        f"health.on_nonfinite is {health.on_nonfinite!r}: choose one of {', '.join(_ACTIONS)}",
    )
    require(
        health.on_divergence in ("stop", "repair", "rewind"),
        f"health.on_divergence is {health.on_divergence!r}: choose stop, repair or rewind",
    )
    require(
        health.on_spike in ("off", *_ACTIONS),
        f"health.on_spike is {health.on_spike!r}: choose one of off, {', '.join(_ACTIONS)}",
    )
    factors = {"loss_factor": health.loss_factor, "gradient_factor": health.gradient_factor}
    for name, factor in factors.items():
        require(factor == 0 or factor > 1, f"health.{name} is {factor}: it must be above 1, or 0 (not watched)")
    require(
        (health.on_spike == "off") == (not any(factors.values())),
        f"health.on_spike is {health.on_spike} with the factors {factors}: set both, what to do and what is a spike",
    )
    require(
        checkpoints or "rewind" not in (health.on_nonfinite, health.on_spike, health.on_divergence),
        "health rewinds to the last checkpoint: set checkpoint.every_steps above 0",
    )
