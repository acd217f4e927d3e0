"""Saves every n steps and after the last one of every phase; runs on every rank, since saving is collective.

What training waits for (copying to host memory, a save still under way) is added to `Trainer.checkpoint_stall_s`, which
the next step's record carries. A checkpoint after step k is begun after the other callbacks have seen record k: their
files are never behind a checkpoint.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import Retention
from engine.checkpoint.save import CheckpointSaver
from engine.record import Callback, Record, RunInfo
from engine.trainer import Trainer


class CheckpointCallback(Callback):
    """Periodic checkpoints of a trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.settings = settings = trainer.config.checkpoint
        retention = Retention(
            last=settings.keep_last,
            every_steps=settings.keep_every_steps,
            best=settings.keep_best,
            best_is=settings.keep_best_is,
        )
        run_dir = Path(trainer.config.run_dir)
        self.saver = CheckpointSaver(run_dir, trainer.optimizer, trainer.config, trainer.mesh, retention)
        trainer.recovery.saver = self.saver

    def on_start(self, run: RunInfo) -> None:
        """Remember where the run ends."""
        self.total_steps = run.total_steps

    def on_step(self, record: Record) -> None:
        """Notice a writer that failed; save when it is time."""
        if not self.settings.every_steps:
            return
        if self.trainer.lock is not None:
            self.trainer.lock.touch()
        self.saver.check()
        done = int(record["step"]) + 1
        last = done in (self.total_steps, self.trainer.phase.last_step)
        if done % self.settings.every_steps == 0 or last:
            with self._stall():
                self._save(record, wait=last or not self.settings.async_save)

    def _save(self, record: Record, wait: bool) -> None:
        best = self.settings.keep_best
        if best and best not in record:
            raise CheckpointError(f"checkpoint.keep_best {best!r} is not in the step record: {sorted(record)}")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self.saver.save(self.trainer.position, self.trainer.callback_states(), numbers)
        if wait:
            self.saver.wait()

    @contextmanager
    def _stall(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.trainer.checkpoint_stall_s += time.perf_counter() - began

    def on_end(self, record: Record) -> None:
        """After an error, a save under way is still brought to its end if all ranks' files arrive."""
        problem = self.saver.abandon()
        if problem:
            print(f"WARNING: the last checkpoint was not completed: {problem}", file=sys.stderr, flush=True)
