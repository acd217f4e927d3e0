"""Section log: what is written of the steps."""

from dataclasses import dataclass, field
from importlib.util import find_spec

from engine.config.errors import MOST_STEPS, require, require_within
from models.sizes import Limits


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the callbacks write."""

    every_steps: int = 10
    """Lines on a console that is not a terminal."""
    tensorboard: bool = True
    """Whether run_dir/tensorboard is written."""
    json: bool = False
    """Whether every rank writes what it says, and rank 0 every step, to run_dir/log, a JSON object a line."""
    metrics_port: int = 0
    """Port at which the first rank serves its last step to Prometheus (/metrics); 0: none."""
    metrics_address: str = "127.0.0.1"
    """The address that is listened on for it: this host's own, or one that is named; no wildcard."""
    wandb: str = ""
    """Project of Weights & Biases that gets every step (needs the package wandb); empty: none."""
    timeline_steps: list[int] = field(default_factory=list)
    """Steps (0-based) whose spans are written to run_dir/timeline; draw them with python -m tools.timeline."""


_LIMITS: Limits = {
    "every_steps": (1, MOST_STEPS),
    "metrics_port": (0, 65535),
    "timeline_steps": (0, MOST_STEPS),
}


_WILDCARDS = ("", "*", "0", "0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0")


def check_log(log: LogConfig) -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("log", log, _LIMITS)
    require(
        log.metrics_address.strip("[]") not in _WILDCARDS,
        f"log.metrics_address {log.metrics_address!r} would listen on every interface: name the address of one",
    )
    require(
        log.metrics_port > 0 or log.metrics_address == LogConfig().metrics_address,
        f"log.metrics_address {log.metrics_address} has no effect without log.metrics_port",
    )
    require(
        not log.wandb or find_spec("wandb") is not None,
        f"log.wandb={log.wandb} needs the package wandb: pip install 'eva-megatron[wandb]'",
    )
