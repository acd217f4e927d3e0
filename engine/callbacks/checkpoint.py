"""Saves every n steps, after the last one of every phase and when asked; on every rank, since saving is collective.

What training waits for (copying to host memory, a save still under way) is added to `Trainer.checkpoint_stall_s`, which
the next step's record carries. A checkpoint after step k begins before anything else that may fail at it, an evaluation
above all; what that measures is added to the checkpoint afterwards.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import Retention, all_checkpoints, step_folder
from engine.checkpoint.local.saver import LocalSaver
from engine.checkpoint.save import CheckpointSaver
from engine.record import Callback, Record
from engine.resilience.judge import UnhealthyStep
from engine.trainer import Trainer

_NOT_SAVED = "not saved"


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
        self._saved_now = False
        self.run_dir = Path(trainer.config.run_dir)
        self.saver = CheckpointSaver(self.run_dir, trainer.optimizer, trainer.config, trainer.mesh, retention)
        self.saver.stop_wish = trainer.stop_wish
        trainer.recovery.saver = self.saver
        self.local: LocalSaver | None = None
        """Made by `open_local`, which is collective."""

    def open_local(self) -> None:
        """Look at every host's folder for checkpoints, where such are asked for. Collective; raises on every rank."""
        if self.settings.local_every_steps and self.local is None:
            self.local = LocalSaver(self.trainer.optimizer, self.trainer.config, self.trainer.mesh)
            self.trainer.recovery.local = self.local

    def secure(self, record: Record) -> None:
        """Save when it is time."""
        if not self.settings.every_steps:
            return
        done = int(record["step"]) + 1
        self._saved_now = done % self.settings.every_steps == 0 or done == self.trainer.phase.last_step
        if self._saved_now:
            if done == self.trainer.phase.last_step:
                self._require_sound_memory(done)
            self._save(record, wait=not self.settings.async_save)
        elif self.settings.local_every_steps and done % self.settings.local_every_steps == 0:
            with self._stall():
                self._save_local(record)

    def on_step(self, record: Record) -> None:
        """Complete the record of the checkpoint that was begun; the last one of a phase is waited for."""
        if not self._saved_now:
            return
        best = self.settings.keep_best
        if best and best not in record:
            raise CheckpointError(f"checkpoint.keep_best {best!r} is not in the step record: {sorted(record)}")
        self.saver.add_metrics(_numbers(record))
        if int(record["step"]) + 1 == self.trainer.phase.last_step:
            with self._stall():
                self._finish()
            self._require_last_state()

    def save_now(self, record: Record, stop: str) -> None:
        """Save the state between two steps, unless it is the one that was saved or begun with."""
        if not record:
            where = "no step was made since the start"
        elif stop and not self.settings.every_steps:
            where = f"{_NOT_SAVED}: checkpoint.every_steps is 0"
        elif stop and self.saver.given_up:  # on this state, just now
            where = _NOT_SAVED
        else:
            where = self._save_audited(record, wait=bool(stop))
        if stop and self.saver.saved:
            self._finish()
        self._say_what_came(stop, where)

    def _say_what_came(self, stop: str, where: str) -> None:
        """One line; of a state that is lost with the run, from where the next start goes on."""
        if self.trainer.mesh.world.rank != 0:
            return
        done = self.trainer.position.step
        if stop and where.startswith(_NOT_SAVED) and self.settings.every_steps:
            self.trainer.unsaved = f"the state after step {done} was not saved, {_last_in_words(self.run_dir)}"
            where = f"{where}; {_last_in_words(self.run_dir)}"
        why = f"stopped by {stop}" if stop else "asked to save"
        print(f"{why} after step {done}: {where}", file=sys.stderr, flush=True)

    def _require_last_state(self) -> None:
        """No save comes after the last one of a phase that could make up for it."""
        done = self.trainer.position.step
        if self._has_begun(step_folder(self.run_dir, done)):
            return
        if self.saver.given_up:
            self.trainer.stopped = self.saver.given_up
            self._say_what_came(self.saver.given_up, _NOT_SAVED)
            return
        raise CheckpointError(
            f"the state after the last step, {done}, was not saved, {_last_in_words(self.run_dir)}: free some space "
            "and start again"
        )

    def _save_audited(self, record: Record, wait: bool) -> str:
        """Save between two steps, unless memory is found not to be sound; what came of it, in words."""
        final = step_folder(self.run_dir, self.trainer.position.step)
        if not self._has_begun(final):
            problem = self._audit()
            if problem:
                return f"{_NOT_SAVED}: {problem}"
            self._save(record, wait)
        elif wait:
            with self._stall():
                self.saver.wait()
        return f"{'saved' if wait else 'being saved'} in {final}" if self._has_begun(final) else _NOT_SAVED

    def _has_begun(self, final: Path) -> bool:
        """Whether this run has saved it, or is about to."""
        return self.saver.saved[-1:] == [final]

    def _require_sound_memory(self, done: int) -> None:
        """No update comes after the last save of a phase that would find what has changed before it."""
        problem = self._audit()
        if problem:
            raise UnhealthyStep(f"after step {done}: {problem}: not saved; resume from the last checkpoint")

    def _audit(self) -> str:
        """What is wrong with the state between two steps, where that is watched. Collective."""
        if not self.trainer.config.health.audit_every_steps:
            return ""
        self.trainer.towers.wait_for_weights()
        return self.trainer.audit()

    def _save(self, record: Record, wait: bool) -> None:
        with self._stall():
            trainer = self.trainer
            self.saver.save(trainer.position, trainer.callback_states(), _numbers(record), trainer.data_fingerprint)
            if wait:
                self.saver.wait()

    def _finish(self) -> None:
        """Wait for the last save; if it is of the state as it is now, what is in the hosts' memory is of no use."""
        self.saver.finish()
        if self.local is not None and self._has_begun(step_folder(self.run_dir, self.trainer.position.step)):
            self.local.forget()

    def _save_local(self, record: Record) -> None:
        self.open_local()
        assert self.local is not None
        trainer = self.trainer
        states, data = trainer.callback_states(), trainer.data_fingerprint
        self.local.save(self.saver.head(trainer.position, states, _numbers(record), data))

    @contextmanager
    def _stall(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.trainer.checkpoint_stall_s += time.perf_counter() - began

    def on_end(self, record: Record) -> None:
        """Bring a save under way to its end, after an error too, if all ranks' files arrive."""
        if self.local is not None:
            self.local.abandon()
        problem = self.saver.abandon()
        if problem:
            print(f"WARNING: the last checkpoint was not completed: {problem}", file=sys.stderr, flush=True)


def _last_in_words(run_dir: Path) -> str:
    there = all_checkpoints(run_dir)
    return f"the last checkpoint is {there[-1].name}" if there else "there is no checkpoint yet"


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}
