"""A whole job: its phases one after the other, each with towers of its own, from checkpoint to checkpoint."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist

from data.errors import DataError
from data.sources import check_shards
from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.load import training_position
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.resume import choose, lock_run, newest_good
from engine.config.phases import Job, Phase
from engine.parallel.agree import raise_together, together
from engine.parallel.device import Device
from engine.parallel.mesh import Mesh
from engine.record import Callback
from engine.resilience.failures import reason
from engine.resilience.signals import Wishes
from engine.resilience.status import FAILED, FINISHED, RUNNING, STARTING, STOPPED_IN_ORDER, write_status
from engine.resilience.watch import Pulse, Watch
from engine.trainer import Trainer

Callbacks = Callable[[Trainer], list[Callback]]
"""What watches a phase, in the order in which they are asked."""


def train_job(job: Job, mesh: Mesh, device: Device, callbacks: Callbacks, wishes: Wishes | None = None) -> bool:
    """Train what is left of the job; whether it is done, or was asked to stop before. Collective over the mesh.

    A phase begins with the checkpoint that the one before left at the border; a run that was stopped there begins it in
    the same way. wishes: what this process is asked for by signals.
    """
    config, plan, run_dir = job.config, job.phases, Path(job.config.run_dir)
    begin: Callable[[], Checkpoint | None] = lambda: choose(config, mesh)  # noqa: E731
    while True:
        phase, stopped = _run_next(plan, run_dir, mesh, device, begin, callbacks, wishes)
        if stopped or phase is plan[-1]:
            return not stopped
        gc.collect()  # towers and buffers of the last phase hang in cycles of hooks; the next one needs their memory
        begin = lambda: newest_good(run_dir, config, mesh)  # noqa: E731


def _check_later_shards(phases: Sequence[Phase], mesh: Mesh) -> None:
    """Raise on every rank if a phase has shards that are not there: now, not when its turn comes. Collective."""
    error = None
    try:
        for phase in phases if mesh.world.rank == 0 else ():
            check_shards(phase.config.data)
    except DataError as problem:
        error = f"phase {phase.name!r}: {problem}"
    raise_together(error, mesh.world)


def _run_next(
    plan: Sequence[Phase],
    run_dir: Path,
    mesh: Mesh,
    device: Device,
    begin: Callable[[], Checkpoint | None],
    callbacks: Callbacks,
    wishes: Wishes | None,
) -> tuple[Phase, str]:
    lock = lock_run(run_dir, mesh)
    if lock is not None and wishes is not None:
        wishes.before_leaving.append(lock.release)
    with _status_of_the_start(run_dir, mesh):
        checkpoint = begin()
        done = training_position(checkpoint).step if checkpoint is not None else 0
        phase = next((phase for phase in plan if done < phase.last_step), plan[-1])
        _check_later_shards(plan[plan.index(phase) + 1 :], mesh)
    with _watch(phase, mesh, wishes) as pulse:
        with _status_of_the_start(run_dir, mesh):
            trainer = Trainer(phase, mesh, device, pulse, checkpoint)
            trainer.begin(checkpoint, lock)
            with together(mesh.control):
                watching = callbacks(trainer)
            for callback in watching:  # what asks other ranks must not be among what one rank may fail at alone
                if isinstance(callback, CheckpointCallback):
                    callback.open_local()
        return phase, _train(trainer, watching, wishes, is_last=phase is plan[-1])


@contextmanager
def _status_of_the_start(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """How the start before ended says nothing about this one any more, and a start may fail as well."""
    if mesh.world.rank != 0:
        yield
        return
    write_status(run_dir, STARTING)
    try:
        yield
    except Exception as error:
        write_status(run_dir, FAILED, reason=reason(error))
        raise


@contextmanager
def _watch(phase: Phase, mesh: Mesh, wishes: Wishes | None) -> Iterator[Pulse]:
    """Watches the ranks of a phase, from loading on; those that a test or a tool drives are watched by it."""
    config, pulse = phase.config, Pulse()
    limit_s = 60 * config.parallel.hang_minutes
    if wishes is None or not limit_s:
        yield pulse
        return
    world, store = mesh.world, None
    if world.size > 1:  # a phase listens to nothing that was said in another one
        all_phases = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"from step {phase.first_step}", all_phases)
    with Watch(pulse, Path(config.run_dir), world.rank, world.size, limit_s, store):
        yield pulse


def _train(trainer: Trainer, callbacks: list[Callback], wishes: Wishes | None, *, is_last: bool) -> str:
    """Train a phase, with the job's outcome in run_dir/status.json; why it was stopped, if it was."""
    run_dir, first = Path(trainer.config.run_dir), trainer.mesh.world.rank == 0
    outcome, stop = FAILED, ""
    if first:
        write_status(run_dir, RUNNING, step=trainer.position.step)
    try:
        with wishes.wait_for_steps() if wishes is not None else nullcontext():
            stop = trainer.fit(callbacks, wishes)
        outcome = STOPPED_IN_ORDER if stop else FINISHED if is_last else STARTING
    except Exception as error:
        stop = reason(error)
        raise
    finally:
        if first:
            write_status(run_dir, outcome, step=trainer.position.step, reason=stop)
    return stop
