"""The whole config. A section's settings, defaults and checks lie together in engine/config/sections."""

from dataclasses import dataclass, field

from data.config import DataConfig
from engine.config.sections.checkpoint import CheckpointConfig
from engine.config.sections.distill import TeacherConfig
from engine.config.sections.evaluate import EvaluateConfig
from engine.config.sections.health import HealthConfig
from engine.config.sections.init import InitConfig
from engine.config.sections.log import LogConfig
from engine.config.sections.mim import MimConfig
from engine.config.sections.optim import OptimConfig
from engine.config.sections.parallel import ParallelConfig
from engine.config.sections.phase import PhaseConfig
from engine.config.sections.train import TrainConfig
from models.config import ModelConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvaluateConfig",
    "HealthConfig",
    "InitConfig",
    "LogConfig",
    "MimConfig",
    "OptimConfig",
    "ParallelConfig",
    "PhaseConfig",
    "TeacherConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training job."""

    run_dir: str = "runs/default"
    """Everything the job writes."""
    objective: str = "contrastive"
    """contrastive (CLIP) | mim (the image tower learns a teacher's features of masked patches)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mim: MimConfig = field(default_factory=MimConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the job, one after the other; the sections above hold what a phase does not change."""
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def micro_batch_samples(self) -> int:
        """Samples of one micro-batch: every frame of a clip counts as an image of it."""
        return self.train.micro_batch_size // self.data.frames
