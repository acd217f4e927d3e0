"""A phase: a part of a job; engine/config/phases.py checks the parts together."""

from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig
from engine.config.sections.optim import OptimConfig
from engine.config.sections.train import TrainConfig
from models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One part of a job with settings of its own (docs/phases.md)."""

    name: str = ""
    """Name of the phase in the metrics, the log and the checkpoints."""
    samples: int = 0
    """Length in samples, rounded up to whole steps."""
    steps: int = 0
    """Length in steps, instead of samples."""
    optimizer: str = "keep"
    """keep (the moments go on) | reset (they start at 0). Weights go on in both cases."""
    schedule: str = "continue"
    """continue (one warm-up and cosine with the phase before) | restart (one of its own)."""
    model: dict[str, Any] = field(default_factory=dict, metadata={"given": ModelConfig})
    """Only another resolution: a preset, or vision.image_size."""
    data: dict[str, Any] = field(default_factory=dict, metadata={"given": DataConfig})
    """Settings that replace those of the job's `data`."""
    train: dict[str, Any] = field(default_factory=dict, metadata={"given": TrainConfig})
    """The same for `train`; steps and seed are the job's."""
    optim: dict[str, Any] = field(default_factory=dict, metadata={"given": OptimConfig})
    """The same for `optim`."""
