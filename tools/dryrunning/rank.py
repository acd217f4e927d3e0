"""One rank of a job, run without its GPUs, its data and the other ranks: the engine's own step on fake tensors.

Fake tensors have a shape, a dtype and a device, and no values. They say "cpu", so that no CUDA build of torch is
needed; where the engine asks for the device, the GPU's way is taken: the side of a loss tile. Attention is torch's
fused kernel on both devices, which keeps the same tensors. Captions are taken to be as long as the context.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.build import Towers, build_optimizer, build_towers
from engine.config import Config
from engine.device import SideStream, prepare
from engine.feed import LocalBatch
from engine.loss_tiles import DEFAULT_TILE_CUDA
from engine.mesh import Group, Mesh, build_mesh
from engine.optim.lamb import ShardedOptimizer
from engine.rows import own_rows
from engine.stash import HostStash
from engine.step import ContrastiveStep
from tools.dryrunning.absent import Absent
from tools.dryrunning.folding import Folding
from tools.dryrunning.memory import ELSEWHERE, Usage
from tools.dryrunning.recorder import RecordedPhases, Recorder, Tally
from tools.dryrunning.stand_in import FoldedChunk


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one step is on one rank."""

    rank: int
    tensor: int
    data: int
    stage: int
    """Coordinates on the mesh."""
    blocks: list[range]
    """Of the image tower, by chunk."""
    vision_parameters: int
    """Elements of this rank's slices."""
    text_parameters: int
    micro_batches: int
    keep: int
    """k, micro-batches that keep their activations."""
    micro_batches_run: int
    """Operator by operator; the others are booked as repetitions."""
    activation_bytes: int
    """What one micro-batch keeps for its backward."""
    peaks: dict[str, Usage]
    """Phase of the step -> highest memory, by category."""
    phases: dict[str, Tally]
    """Phase of the step -> FLOPs and transfers."""
    seconds: float
    """That the dry run of this rank took."""

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
    parallel_state.destroy_global_memory_buffer()  # may hold fake tensors of another rank
    device = prepare().torch_device
    with _fake_ranks(world_size, rank) as world:
        mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world)
        # Real tensors come in as well: the kept patches from numpy, the state of the random generator.
        with FakeTensorMode(allow_non_fake_inputs=True), Absent():
            towers = build_towers(config, mesh, device)
            optimizer = build_optimizer(config, towers)
            step = ContrastiveStep(config, mesh, device, towers, optimizer)
            step.text.trim = lambda tokens: tokens
            activation_bytes = step.activation_bytes()  # also makes the buffers that stay
            recorder = record_step(step, placeholder_batch(config, mesh), every=every_micro_batch)
    return RankReport(
        rank=rank,
        tensor=mesh.tensor.rank,
        data=mesh.data.rank,
        stage=mesh.pipeline.rank,
        blocks=[chunk.layers for chunk in towers.vision],
        vision_parameters=sum(p.numel() for chunk in towers.vision for p in chunk.parameters()),
        text_parameters=sum(p.numel() for p in towers.text_side.parameters()),
        micro_batches=recorder.folding.micro_batches,
        keep=recorder.folding.keep,
        micro_batches_run=recorder.folding.running,
        activation_bytes=activation_bytes,
        peaks=recorder.memory.peaks,
        phases=recorder.phases,
        seconds=time.perf_counter() - started,
    )


def record_step(step: ContrastiveStep, batch: LocalBatch, *, every: bool) -> Recorder:
    """Run one step and see what it does. every: run every micro-batch, as real tensors must. Collective."""
    shape = step.schedule.shape
    folding = Folding(micro_batches=shape.micro_batches, keep=shape.keep, every=every)
    recorder = Recorder(step.mesh, folding)
    _adopt(recorder, step.towers, step.optimizer, batch)
    if isinstance(step.schedule.stash, HostStash):
        step.schedule.stash.side = _HostMemory(recorder, step.device)
    step.work.vision = [FoldedChunk(chunk, i, recorder) for i, chunk in enumerate(step.vision)]
    with recorder:
        step(batch, RecordedPhases(recorder))
    return recorder


def placeholder_batch(config: Config, mesh: Mesh) -> LocalBatch:
    """A local batch of the right shapes."""
    rows = config.train.global_batch_size // mesh.data.size
    own = own_rows(rows, mesh)
    side, context = config.model.vision.image_size, config.model.text.context_length
    clip = (config.data.frames,) if config.data.frames > 1 else ()
    return LocalBatch(
        positions=np.arange(mesh.data.rank * rows, (mesh.data.rank + 1) * rows),
        images=torch.zeros(rows, *clip, 3, side, side, dtype=torch.uint8) if mesh.is_first_stage else None,
        tokens=torch.zeros(own.stop - own.start, context, dtype=torch.int64),
    )


def _as_on_a_gpu(config: Config) -> Config:
    config = copy.deepcopy(config)
    if config.train.loss_tile is None:
        config.train.loss_tile = DEFAULT_TILE_CUDA
    if config.model.attention == "auto":
        config.model.attention = "sdpa"
    return config


@contextmanager
def _fake_ranks(world_size: int, rank: int) -> Iterator[Group]:
    """The group of all ranks, of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield dist.distributed_c10d._get_default_group()
    finally:
        dist.destroy_process_group()


def _adopt(recorder: Recorder, towers: Towers, optimizer: ShardedOptimizer, batch: LocalBatch) -> None:
    """What is there before the step."""
    for part, state in zip(towers.parts, optimizer.towers, strict=True):
        tower = "text " if part.ddp.module is towers.side else ""
        _book(recorder, tower + "weights", [buffer.param_data for buffer in part.ddp.buffers])
        _book(recorder, tower + "gradients", [buffer.grad_data for buffer in part.ddp.buffers])
        _book(recorder, tower + "optimizer", [*state.master, *state.first, *state.second, *state.average])
    _book(recorder, "buffers", parallel_state.get_global_memory_buffer().buffer.values())
    _book(recorder, "batch", [tensor for tensor in (batch.images, batch.tokens) if tensor is not None])


def _book(recorder: Recorder, category: str, tensors: Iterable[Tensor]) -> None:
    with recorder.memory.booked_as(category):
        for tensor in tensors:
            recorder.memory.see(tensor)


class _HostMemory(SideStream):
    """The stash's host buffers are not the device's memory, although a dry run has them on one and the same CPU."""

    def __init__(self, recorder: Recorder, device: torch.device):
        super().__init__(device)
        self.recorder = recorder

    def host_buffer(self, like: Tensor) -> Tensor:
        """Host memory."""
        with self.recorder.memory.booked_as(ELSEWHERE):
            return super().host_buffer(like)
