"""What a run does about a step that was not sound: go on, go back to the last checkpoint's weights, or stop.

A rewind takes back weights, moments and moving average, not the clock: step, samples and learning rate go on with the
next batch, so the window of data that led here is not seen again. It goes to what this run has saved since it began, or
to where it began: a folder may hold later checkpoints of an attempt that was given up. Whoever is killed after a rewind
and resumes from the same checkpoint meets the same step and rewinds in the same way. Nothing here is silent: every case
is a warning on standard error and a number of the step record (skipped_steps, rewinds).
"""

import sys
from pathlib import Path

from engine.build import Towers
from engine.checkpoint.format.manifest import MANIFEST, Position
from engine.checkpoint.resume import first_good, load_state
from engine.checkpoint.save import CheckpointSaver
from engine.config.phases import Phase
from engine.optim.lamb import ShardedOptimizer
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from engine.resilience.judge import UnhealthyStep, Verdict


class Recovery:
    """Acts on verdicts. Collective over the mesh: every rank has the same verdict."""

    def __init__(self, towers: Towers, optimizer: ShardedOptimizer, phase: Phase, mesh: Mesh):
        self.towers, self.optimizer, self.phase, self.mesh = towers, optimizer, phase, mesh
        self.saver: CheckpointSaver | None = None
        """Whose save under way is waited for before a rewind."""
        self.began: Path | None = None
        """The checkpoint that the run went on from, whole."""

    def act(self, verdict: Verdict, position: Position, rate: float) -> None:
        """position: after the step; its counts go up here. Raises UnhealthyStep where the run cannot go on."""
        if verdict.action == "apply":
            return
        where = f"step {position.step - 1}: {verdict.problem} (lr {rate:g})"
        if verdict.action == "skip":
            position.skipped_steps += 1
            self._warn(f"{where}; skipped the update ({position.skipped_steps} skipped so far)")
        elif verdict.action == "rewind" and position.rewinds < self.phase.config.health.max_rewinds:
            position.rewinds += 1
            folder = self._rewind(where, position)
            self._warn(f"{where}; weights of {folder}, data goes on ({position.rewinds} rewinds so far)")
        else:
            borne = f" after {position.rewinds} rewinds" if verdict.action == "rewind" else ""
            self.towers.wait_for_weights()  # nothing may be under way when the groups end
            raise UnhealthyStep(
                f"{where}{borne}: resume from the last checkpoint with a lower optim.lr_vision or a longer "
                "optim.warmup_steps, or let health.on_nonfinite and health.on_spike skip or rewind"
            )

    def _rewind(self, where: str, position: Position) -> Path:
        if self.saver is not None:
            self.saver.wait()
        self.towers.wait_for_weights()
        config = self.phase.config
        checkpoint = first_good(self._past(), config, self.mesh)
        if checkpoint is None:
            raise UnhealthyStep(
                f"{where}: this run has no checkpoint of {config.run_dir} to rewind to yet: lower "
                f"checkpoint.every_steps {config.checkpoint.every_steps}, or let health skip"
            )
        schedule_step = self.optimizer.step_count
        load_state(self.towers, self.optimizer, self.phase, self.mesh, checkpoint)
        self.optimizer.step_count = schedule_step
        checkpoint.close()
        position.updates = self.optimizer.update_count
        return checkpoint.folder

    def _past(self) -> list[Path]:
        """What there is to rewind to, newest first; what retention has deleted is not."""
        saved = self.saver.saved if self.saver is not None else []
        past = [*reversed(saved), *([self.began] if self.began is not None else [])]
        return everyone([folder for folder in past if (folder / MANIFEST).is_file()], self.mesh.world)[0]

    def _warn(self, line: str) -> None:
        if self.mesh.world.rank == 0:
            print(f"WARNING: {line}", file=sys.stderr, flush=True)
