"""A whole job: its phases one after the other, each with towers of its own, from checkpoint to checkpoint."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist

from data.errors import DataError
from data.sources import check_shards
from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.format.lock import RunLock
from engine.checkpoint.load import training_position
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.resume import choose, clear_run, is_started_again, lock_run, newest_good
from engine.config.phases import Job, Phase
from engine.parallel.agree import raise_together, together
from engine.parallel.device import Device
from engine.parallel.mesh import Mesh
from engine.record import Callback
from engine.resilience.failures import reason
from engine.resilience.signals import Wishes
from engine.resilience.status import (
    FAILED,
    FINISHED,
    RUNNING,
    STARTING,
    STOPPED_IN_ORDER,
    step_of_this_start,
    write_status,
)
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
    with _alone_in(run_dir, mesh, wishes) as lock, _Status(run_dir, mesh, wishes, lock) as status:
        clear_run(run_dir, mesh)
        while True:
            phase, stopped = _run_next(plan, status, mesh, device, begin, callbacks, wishes)
            if stopped or phase is plan[-1]:
                return not stopped
            gc.collect()  # towers and buffers of the last phase hang in cycles of hooks; the next needs their memory
            begin = lambda: newest_good(run_dir, config, mesh)  # noqa: E731


@contextmanager
def _alone_in(run_dir: Path, mesh: Mesh, wishes: Wishes | None) -> Iterator[RunLock | None]:
    """The run folder is this job's inside the block, from the first phase to the last word. World rank 0 has the lock.
    Collective.
    """
    lock = lock_run(run_dir, mesh)
    if lock is None:
        yield None
        return
    if wishes is not None:
        wishes.before_leaving.append(lock.release)
    try:
        yield lock
    finally:
        lock.release()


class _Status:
    """How this start is doing, in run_dir/status.json, and how it ended: what an earlier one has left there says
    nothing about this one, and whatever ends the block by an error is told. World rank 0 writes it, while it holds the
    folder: one that stood still until another job took it says nothing there.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, wishes: Wishes | None, lock: RunLock | None):
        """lock: of world rank 0. Collective over the mesh."""
        self._run_dir, self._lock, self._wishes = run_dir, lock, wishes
        self._outcome = STARTING
        self.pulse: Pulse | None = None
        """The phase under way beats there."""
        self.step = step_of_this_start(run_dir) if is_started_again(mesh) else None
        """Steps done so far, where a trainer has said; before torchrun started the ranks again, too."""

    def says(self, outcome: str, why: str = "") -> None:
        """Write it down."""
        self._outcome = outcome
        if self._lock is not None and not self._lock.taken_by():
            write_status(self._run_dir, outcome, step=self.step, reason=why)

    def __enter__(self) -> "_Status":
        self.says(STARTING)
        if self._wishes is not None:
            self._wishes.before_leaving.insert(0, self._is_cut_short)  # while the folder is still held
        return self

    def _is_cut_short(self) -> None:
        """A second signal ends the process from a thread of its own, and nothing else will be said."""
        if self._wishes is not None and self._wishes.cut_short and self._outcome == RUNNING and self.pulse is not None:
            self.step = self.pulse.step + 1
            self.says(FAILED, self._wishes.cut_short)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.says(FAILED, reason(error) if isinstance(error, Exception) else type(error).__name__)


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
    status: _Status,
    mesh: Mesh,
    device: Device,
    begin: Callable[[], Checkpoint | None],
    callbacks: Callbacks,
    wishes: Wishes | None,
) -> tuple[Phase, str]:
    """Train the phase that is next; which one, and why it was stopped, if it was."""
    checkpoint = begin()
    done = training_position(checkpoint).step if checkpoint is not None else 0
    phase = next((phase for phase in plan if done < phase.last_step), plan[-1])
    _check_later_shards(plan[plan.index(phase) + 1 :], mesh)
    with _watch(phase, mesh, wishes) as pulse:
        trainer = Trainer(phase, mesh, device, pulse, checkpoint)
        trainer.begin(checkpoint, lock=None)  # the job's, not the phase's
        with together(mesh.control):
            watching = callbacks(trainer)
        for callback in watching:  # what asks other ranks must not be among what one rank may fail at alone
            if isinstance(callback, CheckpointCallback):
                callback.open_local()
        status.step, status.pulse = trainer.position.step, pulse
        status.says(RUNNING)
        try:
            with wishes.wait_for_steps() if wishes is not None else nullcontext():
                stopped = trainer.fit(watching, wishes)
        finally:
            status.step = trainer.position.step
        why = "; ".join(filter(None, (stopped, trainer.unsaved)))
        status.says(STOPPED_IN_ORDER if stopped else FINISHED if phase is plan[-1] else STARTING, why)
        return phase, stopped


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
