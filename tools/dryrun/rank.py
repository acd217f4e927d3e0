"""One rank of a job, run without its GPUs, its data and the other ranks: the engine's own step on fake tensors.

Fake tensors have a shape, a dtype and a device, and no values. They say "cpu", so that no CUDA build of torch is
needed; where the engine asks for the device, the GPU's way is taken: the side of a loss tile. Attention is torch's
fused kernel on both devices, which keeps the same tensors. Captions are taken to be as long as the context.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.build import Towers, build_optimizer, build_towers
from engine.config.read import Config, TeacherConfig
from engine.objectives.contrastive.distill.teachers import build_teachers
from engine.objectives.contrastive.step import ContrastiveStep
from engine.objectives.contrastive.tiles import DEFAULT_TILE_CUDA
from engine.objectives.mim.step import MimStep
from engine.objectives.mim.teacher import teacher_tower
from engine.objectives.registry import objective_of
from engine.optim.average import restart_average
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.device import forget_gathered_tokens, prepare
from engine.parallel.mesh import Group, Mesh, build_mesh
from models.config import ModelConfig
from tools.dryrun.absent import Absent
from tools.dryrun.memory import Usage
from tools.dryrun.record import (
    TrainingStep,
    measure_activations,
    placeholder_batch,
    record_step,
)
from tools.dryrun.recorder import Tally


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one step is on one rank."""

    objective: str
    rank: int
    tensor: int
    data: int
    stage: int
    """Coordinates on the mesh."""
    blocks: list[range]
    """Blocks of the image tower, by chunk."""
    parameters: dict[str, int]
    """Tower -> elements of this rank's slices."""
    micro_batches: int
    keep: int
    """k, micro-batches that keep their activations until the loss and are not replayed; 0 where nothing is replayed."""
    in_flight: int
    """Units of 1F1B (a micro-batch through a chunk) that wait for their backward at once, at most; 0 without 1F1B."""
    micro_batches_run: int
    """Operator by operator; the others are booked as repetitions."""
    activation_bytes: int
    """What one micro-batch keeps for its backward, in all chunks."""
    peaks: dict[str, Usage]
    """Phase of the step -> highest memory, by category."""
    phases: dict[str, Tally]
    """Phase of the step -> FLOPs and transfers."""
    seconds: float
    """Seconds that the dry run of this rank took."""

    @property
    def peak_phase(self) -> str:
        """Phase with the highest memory."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    @property
    def peak(self) -> Usage:
        """Highest memory, by category."""
        return self.peaks[self.peak_phase]


def dry_run(config: Config, world_size: int, rank: int, *, every_micro_batch: bool = False) -> RankReport:
    """One step of `rank` of `world_size`. The config has passed check_layout; this process is in no process group."""
    started = time.perf_counter()
    config = _as_on_a_gpu(config)
    forget_gathered_tokens()  # they may hold fake tensors of another rank
    device = prepare().torch_device
    with _fake_ranks(world_size, rank) as world:
        mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world)
        # Real tensors come in as well: kept and masked patches from numpy, the state of the random generator.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        fake.cache_enabled = False  # Absent remembers more, and a second memory costs more than it saves
        with fake, Absent(fake):
            towers = build_towers(config, mesh, device)
            optimizer = build_optimizer(config, towers)
            optimizer.rule.sums_on_a_cpu = False  # as on a GPU
            restart_average(optimizer)
            step = _build_step(config, mesh, device, towers, optimizer)
            batch = placeholder_batch(config, mesh)
            activation_bytes = measure_activations(step, batch)
            recorder = record_step(step, batch, every=every_micro_batch)
    return RankReport(
        objective=config.objective,
        rank=rank,
        tensor=mesh.tensor.rank,
        data=mesh.data.rank,
        stage=mesh.pipeline.rank,
        blocks=[chunk.layers for chunk in towers.vision],
        parameters=_parameters(step),
        micro_batches=recorder.folding.micro_batches,
        keep=recorder.folding.keep,
        in_flight=step.program.in_flight(mesh.pipeline.rank) if isinstance(step, MimStep) else 0,
        micro_batches_run=recorder.folding.running,
        activation_bytes=activation_bytes,
        peaks=recorder.memory.peaks,
        phases=recorder.phases,
        seconds=time.perf_counter() - started,
    )


def _as_on_a_gpu(config: Config) -> Config:
    """The config with what would be chosen for a GPU."""
    tile = DEFAULT_TILE_CUDA if config.train.loss_tile is None else config.train.loss_tile
    teacher = config.mim.teacher_model
    return replace(
        config,
        model=_sdpa(config.model),
        train=replace(config.train, loss_tile=tile, distill=[_taught_by(one) for one in config.train.distill]),
        mim=replace(config.mim, teacher_model=None if teacher is None else _sdpa(teacher)),
    )


def _taught_by(teacher: TeacherConfig) -> TeacherConfig:
    return replace(teacher, model=None if teacher.model is None else _sdpa(teacher.model))


def _sdpa(model: ModelConfig) -> ModelConfig:
    return replace(model, attention="sdpa") if model.attention == "auto" else model


@contextmanager
def _fake_ranks(world_size: int, rank: int) -> Iterator[Group]:
    """The group of all ranks, of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield dist.distributed_c10d._get_default_group()
    finally:
        dist.destroy_process_group()


def _build_step(
    config: Config, mesh: Mesh, device: torch.device, towers: Towers, optimizer: ShardedOptimizer
) -> TrainingStep:
    if objective_of(config).distils:
        return MimStep(config, mesh, device, towers, optimizer, teacher_tower(config, mesh, device))
    step = ContrastiveStep(config, mesh, device, towers, optimizer, build_teachers(config, mesh, device))
    step.text.trim = lambda tokens: tokens
    for teacher in step.teaching.teachers if step.teaching is not None else ():
        teacher.text.trimmed = lambda ids: ids  # type: ignore[method-assign]
    return step


def _parameters(step: TrainingStep) -> dict[str, int]:
    vision = _elements(step.towers.vision)
    if isinstance(step, MimStep):
        return {"student": vision, "teacher": _elements([step.teacher.tower])}
    taught = (
        {}
        if step.teaching is None
        else {"teachers": _elements(t for one in step.teaching.teachers for t in one.towers)}
    )
    return {"vision": vision, "text": _elements([step.towers.text_side])} | taught


def _elements(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
