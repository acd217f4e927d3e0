"""What a run does about a step that was not sound: go on, go back to the last checkpoint's weights, or stop.

A rewind takes back weights, moments and moving average, not the clock: step, samples and learning rate go on with the
next batch, so the window of data that led here is not seen again. It goes to what this run has saved since it began, or
to where it began: a folder may hold later checkpoints of an attempt that was given up. Whoever is killed after a rewind
and resumes from the same checkpoint meets the same step and rewinds in the same way. Nothing here is silent: every case
is a warning on standard error and a number of the step record (skipped_steps, rewinds).
"""

import sys
from dataclasses import replace
from pathlib import Path

from engine.build import Towers
from engine.checkpoint.format.disk import MANIFEST
from engine.checkpoint.format.folders import all_checkpoints, checkpoints_folder, set_aside, step_of
from engine.checkpoint.format.manifest import Position
from engine.checkpoint.load import publish
from engine.checkpoint.local.saver import LocalSaver
from engine.checkpoint.reader import WHOLE, Checkpoint
from engine.checkpoint.resume import first_good, load_state
from engine.checkpoint.save import CheckpointSaver
from engine.config.phases import Phase
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from engine.resilience.audit import Audit
from engine.resilience.judge import UnhealthyStep, Verdict


class Recovery:
    """Acts on verdicts. Collective over the mesh: every rank has the same verdict."""

    def __init__(self, towers: Towers, optimizer: ShardedOptimizer, phase: Phase, mesh: Mesh, audit: Audit):
        self.audit = audit
        self.towers, self.optimizer, self.phase, self.mesh = towers, optimizer, phase, mesh
        self.saver: CheckpointSaver | None = None
        """Whose save under way is waited for before a rewind."""
        self.began: Path | None = None
        """The checkpoint that the run went on from, whole."""
        self.began_sound = False
        """A step since then was sound."""
        self.unfit: list[Path] = []
        """Checkpoints that could not be set aside; known to rank 0."""
        self.local: LocalSaver | None = None
        """Whose sets are forgotten where their state may be at fault."""

    def go_on_from(self, checkpoint: Checkpoint | None) -> None:
        """What the run begins with; of one that is on the hosts only, the newest of the run folder, which is sound."""
        self.began = checkpoint.folder if checkpoint is not None and checkpoint.exceptions == WHOLE else None
        self.began_sound = checkpoint is not None and checkpoint.is_local
        if self.began_sound:
            self.began = next(reversed(all_checkpoints(Path(self.phase.config.run_dir))), None)

    def act(self, verdict: Verdict, position: Position, rate: float) -> None:
        """position: after the step; its counts go up here. Raises UnhealthyStep where the run cannot go on."""
        if verdict.action == "apply":
            self.began_sound = True
            if self.saver is not None:
                self.saver.certify()
            return
        if verdict.state_at_fault and self.local is not None:
            self.local.forget()
        where = f"step {position.step - 1}: {verdict.problem} (lr {rate:g})"
        if verdict.action == "skip":
            position.skipped_steps += 1
            self._warn(f"{where}; skipped the update ({position.skipped_steps} skipped so far)")
        elif verdict.action == "repair":
            publish(self.optimizer, self.towers)
            if self.audit():  # the owner's own, or one of the copies that every tensor rank has
                self.act(replace(verdict, action="rewind"), position, rate)
                return
            position.skipped_steps += 1
            self._warn(f"{where}; owners have sent their weights again, the update was skipped")
        elif verdict.action == "rewind" and position.rewinds < self.phase.config.health.max_rewinds:
            position.rewinds += 1
            folder = self._rewind(verdict, where, position)
            self._warn(f"{where}; weights of {folder}, data goes on ({position.rewinds} rewinds so far)")
        else:
            borne = f" after {position.rewinds} rewinds" if verdict.action == "rewind" else ""
            self.towers.wait_for_weights()  # nothing may be under way when the groups end
            if verdict.state_at_fault and self.saver is not None:
                self.saver.wait()  # a save that is not in its place yet cannot be set aside
            self._set_suspect_aside(verdict, since=0)
            raise UnhealthyStep(f"{where}{borne}: {verdict.advice}")

    def writer_failure(self) -> Exception | None:
        """What a writer of checkpoints of this rank ran into since the last step. Local."""
        return self.saver.failure() if self.saver is not None else None

    def _rewind(self, verdict: Verdict, where: str, position: Position) -> Path:
        if self.saver is not None:
            self.saver.wait()
        self.towers.wait_for_weights()
        config = self.phase.config
        self._set_suspect_aside(verdict, since=self.phase.first_step)
        checkpoint = first_good(self._past(), config, self.mesh)
        if checkpoint is None:
            raise UnhealthyStep(
                f"{where}: this run has no checkpoint of {config.run_dir} to rewind to yet: lower "
                f"checkpoint.every_steps {config.checkpoint.every_steps}, or let health skip"
            )
        schedule_step = self.optimizer.step_count
        position.began = load_state(self.towers, self.optimizer, self.phase, self.mesh, checkpoint).position.began
        self.optimizer.step_count = schedule_step
        self.audit.at_rest.end()
        checkpoint.close()
        position.updates = self.optimizer.update_count
        return checkpoint.folder

    def _past(self) -> list[Path]:
        """What there is to rewind to: the newest that was certified, older ones, at last those that were not."""
        saver, began = self.saver, [self.began] if self.began is not None else []
        certified = [*reversed(saver.certified)] if saver is not None else []
        doubtful = [folder for folder in reversed(saver.saved) if folder not in certified] if saver is not None else []
        past = (
            [*certified, *began, *doubtful]
            if self.began_sound
            else [*certified, *self._before_began(), *began, *doubtful]
        )
        there = [folder for folder in past if folder not in self.unfit and (folder / MANIFEST).is_file()]
        return everyone(there, self.mesh.world)[0]

    def _before_began(self) -> list[Path]:
        """Older checkpoints of this phase than the one that it went on from, newest first."""
        run_dir = Path(self.phase.config.run_dir)
        if self.began is None or self.began.parent != checkpoints_folder(run_dir):
            return []
        steps = range(self.phase.first_step, step_of(self.began))
        return [folder for folder in all_checkpoints(run_dir)[::-1] if step_of(folder) in steps]

    def _set_suspect_aside(self, verdict: Verdict, since: int) -> None:
        """Take a checkpoint out of the way after which no step was sound and whose state may be at fault: whoever went
        on from it would stop in the same way. Once a step, and only where there is an older one, of step `since` on.
        """
        newest = self._doubtful()
        if not verdict.state_at_fault or newest is None or self.mesh.world.rank != 0:
            return
        older = [f for f in all_checkpoints(newest.parent.parent) if step_of(f) in range(since, step_of(newest))]
        if not older or newest.with_name(f"{newest.name}.suspect").exists():
            return
        try:
            kept = f"it is kept as {set_aside(newest, 'suspect')}"
        except OSError as error:  # a disk that takes nothing any more; this run goes past it all the same
            self.unfit.append(newest)
            kept = f"it could not be renamed ({error.strerror}): do so before the next start, which would take it"
        self._warn(f"no step after {newest} was sound: {kept}")

    def _doubtful(self) -> Path | None:
        """The newest checkpoint if no step after it was sound."""
        saved = self.saver.saved if self.saver is not None else []
        newest = saved[-1] if saved else (None if self.began_sound else self.began)
        certified = self.saver.certified if self.saver is not None else []
        return newest if newest is not None and newest not in certified and (newest / MANIFEST).is_file() else None

    def _warn(self, line: str) -> None:
        if self.mesh.world.rank == 0:
            print(f"WARNING: {line}", file=sys.stderr, flush=True)
