"""Saves every n steps and after the last one; runs on every rank, since saving is collective."""

from pathlib import Path

from engine.callbacks.base import Callback, Record, RunInfo
from engine.checkpoint.simple import delete_old, save_checkpoint
from engine.trainer import Trainer


class CheckpointCallback(Callback):
    """Periodic checkpoints of a trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.settings = trainer.config.checkpoint
        self.run_dir = Path(trainer.config.run_dir)

    def on_start(self, run: RunInfo) -> None:
        """Remember where the run ends."""
        self.total_steps = run.total_steps

    def on_step(self, record: Record) -> None:
        """Save when it is time."""
        done = int(record["step"]) + 1
        if not self.settings.every_steps or (done % self.settings.every_steps and done != self.total_steps):
            return
        trainer = self.trainer
        save_checkpoint(self.run_dir, trainer.towers, trainer.optimizer, trainer.position, trainer.config, trainer.mesh)
        if trainer.mesh.world.rank == 0:
            delete_old(self.run_dir, self.settings.keep_last)
