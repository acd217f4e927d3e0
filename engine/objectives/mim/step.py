"""One optimizer step of masked-feature distillation: masks, the teacher's targets, 1F1B, update (docs/mim.md)."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import DTYPES, Towers
from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.mim.loss import global_masked_count
from engine.objectives.mim.objective import block_masks
from engine.objectives.mim.passes import MimPasses
from engine.objectives.mim.program import mim_program
from engine.objectives.mim.student import MaskedBatch, StudentRunner
from engine.objectives.mim.teacher import Teacher, load_teacher, teacher_model
from engine.objectives.update import StepOutcome, Update
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh
from engine.pipeline.clock import Phases
from engine.pipeline.executor import Executor, Work
from engine.pipeline.outputs import keep_of
from models.towers.mim import StudentTower
from models.towers.vision import VisionTower


class MimStep:
    """Steps of one shape on this rank. Collective over the mesh."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        towers: Towers,
        optimizer: ShardedOptimizer,
        teacher: VisionTower | None = None,
    ):
        """teacher: its tower; None loads it. Raises CheckpointError if mim.teacher does not hold it."""
        self.config, self.mesh, self.device = config, mesh, device
        self.towers, self.optimizer = towers, optimizer
        self.update = Update(towers, optimizer, mesh, config.health)
        self.masks = block_masks(config)
        train, vision = config.train, config.model.vision
        if teacher is None:
            teacher, remarks = load_teacher(config, mesh, device)
            self._say(remarks)
        self.teacher = Teacher(teacher, width=teacher_model(config).embed_dim, micro_batch=train.micro_batch_size)
        self.local_batch = train.global_batch_size // mesh.data.size
        self.student = [self._runner(chunk) for chunk in towers.vision]
        self.work = Work(
            chunks=self.student,
            backward=[part.last_backward for part in towers.parts],
            outputs=[keep_of(chunk.block.layers, train.keep_outputs, config, device) for chunk in towers.vision],
            parts=[part.sharded for part in towers.parts],
        )
        split = mesh.tensor.size if config.parallel.sequence else 1
        self.program = mim_program(config, mesh.data.size)
        self.executor = Executor(
            mesh,
            self.program,
            hidden=(train.micro_batch_size * vision.tokens // split, 1, vision.width),
            dtype=DTYPES[train.precision],
            device=device,
            beside=[teacher.config.params_dtype],
        )

    def __call__(self, batch: LocalBatch, phases: Phases) -> StepOutcome:
        """Train on one batch."""
        masked_count, own_loss = self.gradients(batch, phases)
        rates = {"vision": self.optimizer.rates()["vision"]}
        loss = self.global_loss(own_loss)
        gradient_norm = self.update(phases, {}, loss)
        per_image = masked_count / self.config.train.global_batch_size
        return StepOutcome(
            loss=loss,
            metrics={"masked_patches": per_image},
            gradient_norm=gradient_norm,
            rates=rates,
        )

    def gradients(self, batch: LocalBatch, phases: Phases) -> tuple[Tensor, Tensor]:
        """Masked patches of the global batch and this rank's part of the loss; gradients are not reduced yet."""
        self.towers.zero_gradients()
        masked = torch.from_numpy(self.masks.of_samples(self.config.train.seed, batch.positions))
        masked_count = global_masked_count(int(masked.sum()), self.mesh.data, self.device)
        passes = MimPasses(
            mesh=self.mesh,
            device=self.device,
            teacher=self.teacher,
            student=self.student,
            batch=MaskedBatch(images=batch.images, masked=masked, targets=None, masked_count=masked_count),
        )
        self.executor.run(self.work, passes, phases)
        return masked_count, passes.loss

    def global_loss(self, own: Tensor) -> Tensor:
        """Sum over replicas, on every rank; the tensor ranks of a last stage hold the same part."""
        loss = own.clone() if self.mesh.tensor.rank == 0 else torch.zeros_like(own)  # 0 on all but the last stage
        dist.all_reduce(loss, group=self.mesh.world.group)
        return loss

    def _runner(self, chunk) -> StudentRunner:
        assert isinstance(chunk, StudentTower)
        return StudentRunner(chunk, micro_batch=self.config.train.micro_batch_size, device=self.device)

    def _say(self, lines: list[str]) -> None:
        if self.mesh.world.rank == 0:
            print("; ".join(lines), file=sys.stderr, flush=True)
