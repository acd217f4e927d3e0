"""The training loop. Reads top to bottom: set up, then feed -> step -> report, until the last step.

Notable choices: data, schedule, loss and optimizer are parts with no knowledge of each other; this file is where they
meet. The hot path asks the device for numbers twice a step: before the update, and for the record.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.build import build_optimizer, build_towers, every_name
from engine.checkpoint.continuity import accept_data
from engine.checkpoint.format.lock import RunLock
from engine.checkpoint.format.manifest import Position
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.resume import Start, choose, clear_run, lock_run, start
from engine.config.origin import model_in_words
from engine.config.phases import Phase
from engine.config.read import to_dict
from engine.feed import Feed, LocalBatch, list_together
from engine.objectives.features import check_features
from engine.objectives.registry import objective_of
from engine.objectives.update import StepOutcome
from engine.optim.average import restart_average
from engine.parallel.agree import together
from engine.parallel.device import Device
from engine.parallel.mesh import Mesh, meet
from engine.pipeline.clock import Phases, write_spans
from engine.record import Callback, RunInfo
from engine.resilience.agreement import one_data
from engine.resilience.audit import Audit
from engine.resilience.judge import Health
from engine.resilience.quarantine import Quarantine
from engine.resilience.rewind import Recovery
from engine.resilience.roll_call import CARRY_ON, Orders, RollCall
from engine.resilience.signals import Wishes
from engine.resilience.watch import Pulse


class Trainer:
    """One training job, or one phase of it, on this rank."""

    def __init__(
        self,
        phase: Phase,
        mesh: Mesh,
        device: Device,
        pulse: Pulse | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        """Build everything. pulse: where the watch reads what this rank does. checkpoint: that `begin` will load; no
        initial value is drawn for what it fills. Collective over the mesh.
        """
        self.phase = phase
        self.config = config = phase.config
        self.mesh, self.device = mesh, device
        drawn = every_name if checkpoint is None else checkpoint.leaves_fresh
        self.towers = build_towers(config, mesh, device.torch_device, drawn)
        self.optimizer = build_optimizer(config, self.towers, self.phase.schedule_steps)
        restart_average(self.optimizer)
        self.training_step = objective_of(config).step(config, mesh, device.torch_device, self.towers, self.optimizer)
        self.health = self.training_step.update.health
        rhythms = (config.health.audit_every_steps, config.checkpoint.every_steps, phase.last_step)
        self.audit = Audit(
            self.towers,
            self.optimizer,
            mesh,
            every_steps=rhythms if config.health.audit_every_steps else (),
            at_rest=self.training_step.update.at_rest,
        )
        self.training_step.update.audit = self.audit
        self.recovery = Recovery(self.towers, self.optimizer, self.phase, mesh, self.audit)
        self.position = Position(step=0, samples_seen=0, phase=self.phase.name)
        self.lock: RunLock | None = None
        self.callbacks: list[Callback] = []
        self.pulse = pulse or Pulse()
        self.checkpoint_stall_s = 0.0
        """Seconds that training has waited for checkpoints since the last record."""
        self.stopped = ""
        """Why the run stopped without another step to come: its last state could not be saved in time."""
        self.unsaved = ""
        """Which state a run that was stopped has not saved, in words; known to world rank 0."""
        self._roll_call: RollCall | None = None
        self._resumed_states: dict[str, Any] = {}
        self._begin = Start(self.position)
        self.data_fingerprint: dict[str, Any] = {}
        """What the order of samples depends on, for checkpoints."""

    # --- the loop --------------------------------------------------------------------------------------------------

    def fit(self, callbacks: list[Callback], wishes: Wishes | None = None) -> str:
        """Train from the current position to the end of the phase, or until a stop is asked for; why, then.

        wishes: what this process is asked for by signals. Collective over the mesh.
        """
        feed = self._open_feed()
        orders, record = CARRY_ON, dict[str, Any]()
        self._roll_call = roll_call = RollCall(Path(self.config.run_dir), self.mesh, wishes)
        self._give_back_states(callbacks)
        run = self._run_info(feed)
        try:
            with together(self.mesh.control):
                for callback in callbacks:
                    callback.on_start(run)
            for _ in range(self.position.step, self.phase.last_step):
                started = time.perf_counter()
                orders = self._call_the_roll(roll_call, feed)
                if orders.save or orders.stop:
                    for callback in callbacks:
                        callback.save_now(record, orders.stop)
                if orders.stop:
                    break
                self.pulse.at("share")
                batch = feed.share()
                fetched = time.perf_counter()
                outcome, phases = self.traced_step(batch)
                record = self._record(outcome, phases, batch, started, fetched)
                del batch  # the next one's pixels are here already
                self.pulse.at("callbacks")
                for callback in callbacks:
                    callback.secure(record)
                for callback in callbacks:
                    record |= callback.measure(record)
                for callback in callbacks:
                    callback.on_step(record)
            self.towers.wait_for_weights()  # the last all-gather: nothing may be under way when the groups end
        finally:
            feed.close()
            for callback in callbacks:
                callback.on_end(record)
            self._release_run()
        return orders.stop or self.stopped

    def stop_wish(self) -> str:
        """Why this rank is asked to stop while it waits, which it shows to the watch; empty: it is not. Local."""
        self.pulse.at(self.pulse.part)
        return self._roll_call.stop_wish() if self._roll_call is not None else ""

    def _call_the_roll(self, roll_call: RollCall, feed: Feed) -> Orders:
        """Read this rank's part of the next step and hear what the others met. Collective; raises on every rank."""
        self.pulse.at("data")
        error = feed.read() or feed.is_elsewhere(self.position.samples_seen) or self.recovery.writer_failure()
        self.pulse.at("roll call")
        orders, bad = roll_call(error, self.quarantine.counts(feed.bad, feed.caption_fallbacks))
        if not orders.stop:  # a run that goes on reads them again
            seen = self.position.samples_seen + self.config.train.global_batch_size
            self.position.bad_samples += self.quarantine.report(feed.bad, bad, samples_seen=seen)
        return orders

    def _open_feed(self) -> Feed:
        """Open the feed from the current position to the end of the phase. Collective; raises on every rank."""
        listing = list_together(self.config.data, self.mesh)
        with together(self.mesh.control):
            feed = Feed(
                self.config,
                self.mesh,
                self.device.torch_device,
                start_position=self.position.samples_seen,
                steps=self.phase.last_step - self.position.step,
                first_position=self.phase.first_sample,
                listing=listing,
            )
        self._check_data(feed)
        if self.config.data.features:
            check_features(self.config.data.features, self.towers, self.mesh)
        self.quarantine = Quarantine(
            Path(self.config.run_dir),
            self.mesh,
            start_position=self.position.samples_seen,
            max_bad_fraction=self.config.data.max_bad_fraction,
        )
        return feed

    def _check_data(self, feed: Feed) -> None:
        """All ranks read the same data, that of the checkpoint. Collective; raises on every rank."""
        self.data_fingerprint = data = one_data(feed.fingerprint(), self.mesh)
        begin, accepted = self._begin, self.config.data.changed == "accept"
        if begin.folder is None or begin.at_border:
            return
        said = accept_data(begin.data, data, accepted=accepted, seen=self.position.samples_seen, folder=begin.folder)
        if said and self.mesh.world.rank == 0:
            print(f"WARNING: {said}", file=sys.stderr, flush=True)

    def _give_back_states(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks
        for callback in callbacks:
            if type(callback).__name__ in self._resumed_states:
                callback.load_state_dict(self._resumed_states[type(callback).__name__])

    def step(self, batch: LocalBatch, phases: Phases | None = None) -> StepOutcome:
        """One optimizer step on one global batch. Collective over the mesh; raises UnhealthyStep."""
        self.training_step.update.audit_due = self.audit.due(self.position.step)
        outcome = self.training_step(batch, phases or Phases())
        self.position.step += 1
        self.position.samples_seen += self.config.train.global_batch_size
        self.position.updates = self.optimizer.update_count
        self.recovery.act(self.health.verdict, self.position, outcome.rates["vision"])
        return outcome

    def meet(self) -> None:
        """Wait on the host until every rank is here, with its weights. Collective over the mesh."""
        self.towers.wait_for_weights()
        meet(self.mesh.world, self.device.torch_device)

    def traced_step(self, batch: LocalBatch) -> tuple[StepOutcome, Phases]:
        """A step whose spans are written if log.timeline_steps asks for it."""
        step = self.position.step
        if step not in self.config.log.timeline_steps:
            phases = Phases(begins=self.pulse.at)
            return self.step(batch, phases), phases
        phases = Phases(clock=self.device.clock_s, record_spans=True, begins=self.pulse.at)
        self.meet()
        zero_s = self.device.clock_s()
        outcome = self.step(batch, phases)
        place = {"tensor": self.mesh.tensor.rank, "pipeline": self.mesh.pipeline.rank, "data": self.mesh.data.rank}
        write_spans(Path(self.config.run_dir), self.mesh.world.rank, place, step, zero_s, phases)
        return outcome, phases

    # --- reports ---------------------------------------------------------------------------------------------------

    def _record(
        self, outcome: StepOutcome, phases: Phases, batch: LocalBatch, started: float, fetched: float
    ) -> dict[str, Any]:
        rates = outcome.rates
        loss, metrics = outcome.on_host()
        self.pulse.step_done(self.position.step - 1, phases.seconds)
        record = {
            "step": self.position.step - 1,
            **({"phase": self.phase.name} if self.phase.name else {}),
            "loss": loss,
            **{f"lr_{tower}": rates[tower] for tower in ("vision", "text") if tower in rates},
            "grad_norm": outcome.gradient_norm,
            "samples_seen": self.position.samples_seen,
            "step_time_s": time.perf_counter() - started,
            "data_time_s": fetched - started,
            **metrics,
            "bad_samples": self.position.bad_samples,
            "skipped_steps": self.position.skipped_steps,
            "rewinds": self.position.rewinds,
            "checkpoint_stall_s": self.checkpoint_stall_s,
            **{f"bad_{reason}": count for reason, count in sorted(self.quarantine.by_reason.items())},
            **({"caption_fallbacks": self.quarantine.caption_fallbacks} if self.config.data.captions else {}),
            **{f"samples_{source}": count for source, count in batch.source_counts.items()},
            **{f"phase_{name}_s": seconds for name, seconds in phases.seconds.items()},
        }
        if self.pulse.slow:
            record["slowest_rank"] = max(self.pulse.slow, key=self.pulse.slow.__getitem__)
            record["slowest_over_median"] = max(self.pulse.slow.values())
        self.checkpoint_stall_s = 0.0
        return record

    def _run_info(self, feed: Feed) -> RunInfo:
        return RunInfo(
            run_dir=Path(self.config.run_dir),
            config=to_dict(self.config),
            total_steps=self.phase.total_steps,
            phase=self.phase.name,
            first_step=self.phase.first_step,
            last_step=self.phase.last_step,
            model=model_in_words(self.config.model),
            image_size=self.config.model.vision.image_size,
            sources=feed.sources(self.phase.first_step, self.phase.last_step),
            start_step=self.position.step,
            world_size=self.mesh.world.size,
            layout=self.mesh.layout,
            parameters=self._count_parameters(),
            global_batch_size=self.config.train.global_batch_size,
            resumed_record=self._begin.record,
        )

    def _count_parameters(self) -> int:
        """Elements of the whole model: every stage's tensors once, the text side once."""
        counts = [sum(_numel(t.shape) for t in part.logical.values()) for part in self.towers.parts]
        chunks = len(self.towers.vision)
        total = torch.tensor([sum(counts[:chunks])], dtype=torch.int64, device=self.device.torch_device)
        dist.all_reduce(total, group=self.mesh.pipeline.group)
        return int(total) + sum(counts[chunks:])

    # --- where training begins -------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Take the run folder for this job and load what checkpoint.resume and init ask for. Collective."""
        lock = lock_run(Path(self.config.run_dir), self.mesh)
        clear_run(Path(self.config.run_dir), self.mesh)
        self.begin(choose(self.config, self.mesh), lock)

    def begin(self, checkpoint: Checkpoint | None, lock: RunLock | None) -> None:
        """Load a checkpoint, or, without one, what init asks for. lock: of the run folder, released at the end."""
        self.lock = lock
        self.recovery.go_on_from(checkpoint)
        self._begin = begin = start(self.towers, self.optimizer, self.phase, self.mesh, checkpoint)
        self.position, self._resumed_states = begin.position, begin.callbacks
        self.position.phase = self.phase.name
        self.pulse.step = self.position.step - 1
        health = self._resumed_states.pop(type(self.health).__name__, None)
        if health is not None and not begin.at_border:  # another phase has another usual loss
            self.health.load_state_dict(health)

    def _release_run(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def callback_states(self) -> dict[str, Any]:
        """Class name -> state of what has one: this rank's callbacks, and the judge of steps."""
        parts: list[Callback | Health] = [*self.callbacks, self.health]
        states = {type(part).__name__: part.state_dict() for part in parts}
        return {name: state for name, state in states.items() if state}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
