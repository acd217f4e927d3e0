"""Runs one step of a rank and sees what it does, with either objective; on fake tensors and on real ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.contrastive.step import ContrastiveStep
from engine.objectives.mim.step import MimStep
from engine.objectives.mim.student import MaskedBatch
from engine.objectives.registry import objective_of
from engine.parallel.device import SideStream, gathered_tokens
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows
from engine.parallel.sharded import ShardedPart
from engine.pipeline.memory import saved_bytes
from engine.pipeline.outputs import HostOutputs
from engine.pipeline.stash import HostStash
from tools.dryrun.folding import Folding
from tools.dryrun.memory import ELSEWHERE
from tools.dryrun.recorder import RecordedPhases, Recorder
from tools.dryrun.stand_in import FoldedBelow, FoldedChunk

TrainingStep = ContrastiveStep | MimStep


def placeholder_batch(config: Config, mesh: Mesh) -> LocalBatch:
    """A local batch of the right shapes."""
    rows = config.train.global_batch_size // mesh.data.size
    own = own_rows(rows, mesh)
    side, context = config.model.vision.image_size, config.model.text.context_length
    clip = (config.data.frames,) if config.data.frames > 1 else ()
    pixels = torch.zeros(rows, *clip, 3, side, side, dtype=torch.uint8)
    inputs = torch.zeros(rows, config.model.embed_dim) if config.data.features else pixels
    captions = own.stop - own.start if objective_of(config).reads_captions else 0
    return LocalBatch(
        positions=np.arange(mesh.data.rank * rows, (mesh.data.rank + 1) * rows),
        images=inputs if mesh.is_first_stage else None,
        tokens=torch.zeros(captions, context, dtype=torch.int64),
        picture_ids=torch.zeros(captions, dtype=torch.int64),
    )


def record_step(step: TrainingStep, batch: LocalBatch, *, every: bool) -> Recorder:
    """Run one step and see what it does. Collective.

    every: run every micro-batch, as real tensors must. Those of 1F1B all run: they are few, and their masks differ.
    """
    recorder = Recorder(step.mesh, _folding(step, every), step.config.objective)
    _as_a_later_step(step)
    step.executor.products = nullcontext  # as the model has them, whatever this CPU makes of them
    _adopt(recorder, step, batch)
    if isinstance(step, MimStep):
        _book(recorder, "teacher weights", step.teacher.tower.parameters())
        with _inputs_as_activations(step, recorder), recorder:
            step(batch, RecordedPhases(recorder))
        return recorder
    if step.teaching is not None:
        towers = [tower for teacher in step.teaching.teachers for tower in teacher.towers]
        _book(recorder, "teacher weights", (weight for tower in towers for weight in tower.parameters()))
    for keeper in (step.executor.stash, *step.work.outputs, step.captions.outputs):
        if isinstance(keeper, HostStash | HostOutputs):
            keeper.side = _HostMemory(recorder, step.device)
    below = step.work.below
    step.work.chunks = [FoldedChunk(chunk, i, recorder, divided=i in below) for i, chunk in enumerate(step.vision)]
    step.work.below = {i: FoldedBelow(chunk, recorder) for i, chunk in below.items()}
    with recorder:
        step(batch, RecordedPhases(recorder))
    return recorder


def _as_a_later_step(step: TrainingStep) -> None:
    """Have buckets reduced as from the second step on: as soon as the last backward has all gradients of one."""
    for part in step.towers.parts:
        for group in part.ddp.bucket_groups:
            group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)
            group.is_first_batch = False


def _folding(step: TrainingStep, every: bool) -> Folding:
    if isinstance(step, MimStep):
        return Folding(micro_batches=step.program.micro_batches, keep=0, every=True)
    return Folding(micro_batches=step.program.micro_batches, keep=step.keep, every=every)


def measure_activations(step: TrainingStep, batch: LocalBatch) -> int:
    """Bytes that one micro-batch keeps for its backward, in all chunks of this rank. Collective over TP.

    Before the recording, because it also makes the buffers that stay.
    """
    return _student_bytes(step, batch) if isinstance(step, MimStep) else step.activations.micro_batch_bytes()


def _student_bytes(step: MimStep, batch: LocalBatch) -> int:
    size = step.config.train.micro_batch_size
    masked = torch.from_numpy(step.masks.of_samples(step.config.train.seed, batch.positions[:size]))
    count = int(masked.sum())
    message = step.executor.pipeline.next
    total = 0
    for runner in step.student:
        targets = torch.zeros(count, step.teacher.width, dtype=step.teacher.tower.config.params_dtype)
        runner.batch = MaskedBatch(
            images=batch.images, masked=masked, targets=targets, masked_count=torch.tensor(count)
        )
        hidden = None if runner.tower.is_first else torch.zeros(message.shape, dtype=message.dtype, requires_grad=True)
        total += saved_bytes(partial(runner, hidden, 0), list(runner.tower.parameters()))
    return total


@contextmanager
def _inputs_as_activations(step: MimStep, recorder: Recorder) -> Iterator[None]:
    """A message that a chunk has begun to work on is one of its activations: it waits for the backward."""

    def take(tower: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorder.memory.move(inputs[0], "activations")

    hooks = [runner.tower.register_forward_pre_hook(take) for runner in step.student if not runner.tower.is_first]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adopt(recorder: Recorder, step: TrainingStep, batch: LocalBatch) -> None:
    """What is there before the step."""
    towers = step.towers
    for part, state in zip(towers.parts, step.optimizer.towers, strict=True):
        tower = "text " if part.ddp.module is towers.side else ""
        _book(recorder, tower + "weights", [buffer.param_data for buffer in (*part.ddp.buffers, *part.frozen)])
        _book(recorder, tower + "gradients", [buffer.grad_data for buffer in part.ddp.buffers])
        if part.sharded is not None:
            _adopt_sharded(recorder, part.sharded, tower)
        _book(recorder, tower + "optimizer", [flat for flats in state.kinds().values() for flat in flats])
    _book(recorder, "buffers", gathered_tokens())
    _book(recorder, "batch", [tensor for tensor in (batch.images, batch.tokens) if tensor is not None])


def _adopt_sharded(recorder: Recorder, part: ShardedPart, tower: str) -> None:
    """Own slices, and what comes and goes with the part's turns."""
    for category, own, stores in (
        (tower + "weights", part.kept_weights(), part.weight_stores),
        (tower + "gradients", part.gradients, part.gradient_stores),
    ):
        _book(recorder, category, own)
        for store in stores:
            store.observer = partial(_resized, recorder, category)


def _resized(recorder: Recorder, category: str, flat: Tensor) -> None:
    with recorder.memory.booked_as(category):
        recorder.memory.resized(flat)


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
