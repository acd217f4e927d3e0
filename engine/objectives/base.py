"""What the engine asks of a training objective, instead of asking for its name.

An objective is one folder beside this file with an `objective.py`; engine/objectives/registry.py lists them. Importing
one imports no torch: a mistake in a config is told before that takes its seconds.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from engine.config.schema import Config

if TYPE_CHECKING:
    import torch

    from engine.build import Towers
    from engine.feed import LocalBatch
    from engine.objectives.update import StepOutcome, Update
    from engine.optim.optimizer import ShardedOptimizer
    from engine.parallel.mesh import Mesh
    from engine.pipeline.clock import Phases
    from engine.pipeline.program import Program
    from models.tensors.init import Rule
    from models.towers.vision import VisionTower


class TrainingStep(Protocol):
    """One optimizer step on one global batch, on this rank. Collective over the mesh."""

    update: "Update"

    def __call__(self, batch: "LocalBatch", phases: "Phases") -> "StepOutcome":
        """Train on this rank's part of a global batch."""
        ...


class Objective(Protocol):
    """A training objective: what it needs of a job, and the parts it brings."""

    name: str
    """The value of the setting `objective`."""
    reads_captions: bool
    """Whether samples are pairs, and each rank holds a caption tower and encodes captions of its own."""
    distils: bool
    """Whether a frozen teacher gives the targets, and the student's micro-batches run one forward, one backward."""
    defaults: Mapping[str, Mapping[str, Any]]
    """Section -> setting -> value where the objective changes the default; a config file comes above it."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for the first thing that means nothing to the objective or that it lacks."""
        ...

    def unmeasured(self, config: Config) -> dict[str, str]:
        """Numbers of the step record that other settings would bring -> why this job does not measure them."""
        ...

    def vision_tower(self, config: Config) -> "Callable[..., VisionTower]":
        """What builds a chunk of the trained image tower."""
        ...

    def initial_values(self) -> "Rule":
        """The rule by which fresh tensors are drawn."""
        ...

    def program(self, config: Config, data: int) -> "Program":
        """What the stages of a replica do in a step, of `data` replicas; numbers that a rank measures are not in it."""
        ...

    def step(
        self,
        config: Config,
        mesh: "Mesh",
        device: "torch.device",
        towers: "Towers",
        optimizer: "ShardedOptimizer",
    ) -> TrainingStep:
        """The step over this rank's towers. Collective over the mesh."""
        ...
