"""Section optim: the optimizer, its rates and the averaged weights."""

from dataclasses import dataclass, field

from engine.config.errors import MOST_STEPS, require, require_within
from engine.config.typed import Unbounded
from models.sizes import Limits

MOMENTS = {"lamb": ("moment1", "moment2"), "adamw": ("moment1", "moment2")}
"""Optimizer -> kinds of state that it keeps in fp32 of every owned element, beside the weights and their average.

Who makes, stores or counts state asks here: optimizer, checkpoints, dry run and planner.
"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """LAMB or AdamW with layer decay (paper, Tables 12 and 13)."""

    name: str = "lamb"
    """lamb | adamw."""
    mode: str = "paper"
    """LAMB variant: paper (DeepSpeed's rule, per logical tensor, ratio within bounds) | nvlamb (bias-corrected update,
    unbounded ratio, only where weight decay applies unless nvlamb_always_adapt)."""
    lr_vision: float = 4e-4
    """Base rate of the image tower; layer decay and schedule multiply it."""
    lr_text: float = 4e-5
    """Base rate of the text tower."""
    lr_other: float = 5e-4
    """Base rate of the learned logit scale (the authors' --lr)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the mean and of the mean square of the gradients."""
    eps: float = 1e-6
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Not applied to tensors of one dimension, biases, class token and position tables."""
    layer_decay_vision: float = 0.9
    """Factor on the rate of each block of the image tower towards the input; 1: none."""
    layer_decay_text: float = 0.75
    """Factor on the rate of each block of the text tower towards the input; 1: none."""
    warmup_steps: int = 2000
    """Steps over which the rates rise from 0; the cosine follows."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of each base rate."""
    clip_grad_norm: float = 5.0
    """Global norm over every tensor of both towers; 0 does not clip."""
    ema_decay: float = 0.0
    """Keeps an exponential moving average of the weights, a <- decay a + (1 - decay) w a step; 0 keeps none."""
    trust_min: float = 0.01
    """Smallest trust ratio of LAMB's mode paper."""
    trust_max: float = field(default=10.0, metadata={"given": Unbounded})
    """Largest trust ratio of LAMB's mode paper; inf: no bound."""
    trust_exclude_1d: bool = False
    """Ratio 1 for tensors of one dimension (not the paper's setting)."""
    nvlamb_always_adapt: bool = False
    """Mode nvlamb applies its ratio to every tensor, also where no weight decay applies (always_adapt of the authors'
    class); at the paper's weight decay of 0 the mode is Adam without it."""


_LIMITS: Limits = {
    "lr_vision": (0, 1e3),
    "lr_text": (0, 1e3),
    "lr_other": (0, 1e3),
    "eps": (1e-30, 1),
    "weight_decay": (0, 1e3),
    "warmup_steps": (0, MOST_STEPS),
    "min_lr_ratio": (0, 1),
    "clip_grad_norm": (0, 1e30),
}


def check_optim(optim: OptimConfig) -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("optim", optim, _LIMITS)
    require(optim.name in MOMENTS, f"optim.name is {optim.name!r}: choose {' or '.join(MOMENTS)}")
    require(optim.mode in ("paper", "nvlamb"), f"optim.mode is {optim.mode!r}: choose paper or nvlamb")
    require(len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas}: two in [0, 1)")
    require(
        not optim.nvlamb_always_adapt or (optim.name == "lamb" and optim.mode == "nvlamb"),
        f"optim.nvlamb_always_adapt needs optim.name=lamb and optim.mode=nvlamb, not {optim.name} and {optim.mode} "
        "(mode paper always adapts)",
    )
    require(0 < optim.trust_min <= optim.trust_max, "optim.trust_min must be positive and at most optim.trust_max")
    for name in ("layer_decay_vision", "layer_decay_text"):
        value = getattr(optim, name)
        require(0 < value <= 1, f"optim.{name} is {value}: it must be in (0, 1]")
    decay = optim.ema_decay
    require(0 <= decay < 1, f"optim.ema_decay is {decay}: it must be in [0, 1); 0 keeps no average")
