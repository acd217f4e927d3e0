"""The training loop. Reads top to bottom: set up, then feed -> step -> report, until the last step.

Notable choices: data, schedule, loss and optimizer are parts with no knowledge of each other; this file is where they
meet. The hot path asks the device for numbers once a step, after the optimizer has been launched.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.build import build_optimizer, build_towers
from engine.callbacks.base import Callback, RunInfo
from engine.checkpoint.lock import RunLock
from engine.checkpoint.manifest import Position
from engine.checkpoint.resume import lock_run, start
from engine.config import Config, to_dict
from engine.device import Device
from engine.feed import Feed, LocalBatch
from engine.mesh import Mesh
from engine.quarantine import Quarantine
from engine.step import ContrastiveStep, StepOutcome
from engine.timeline import Phases, write_spans


class NonFiniteLoss(Exception):
    """The loss is not a number; the weights of the last checkpoint are the last good ones."""


class Trainer:
    """One contrastive training job on this rank."""

    def __init__(self, config: Config, mesh: Mesh, device: Device):
        """Build everything. Collective over the mesh."""
        self.config, self.mesh, self.device = config, mesh, device
        self.towers = build_towers(config, mesh, device.torch_device)
        self.optimizer = build_optimizer(config, self.towers)
        self.contrastive_step = ContrastiveStep(config, mesh, device.torch_device, self.towers, self.optimizer)
        self.position = Position(step=0, samples_seen=0)
        self.lock: RunLock | None = None
        self.callbacks: list[Callback] = []
        self.checkpoint_stall_s = 0.0
        """Seconds that training has waited for checkpoints since the last record."""
        self._resumed_states: dict[str, Any] = {}

    # --- the loop --------------------------------------------------------------------------------------------------

    def fit(self, callbacks: list[Callback]) -> None:
        """Train from the current position to train.steps."""
        total = self.config.train.steps
        start = self.position.step
        feed = Feed(
            self.config,
            self.mesh,
            self.device.torch_device,
            start_position=self.position.samples_seen,
            steps=total - start,
        )
        self.quarantine = Quarantine(
            Path(self.config.run_dir),
            self.mesh,
            self.device.torch_device,
            start_position=self.position.samples_seen,
            max_bad_fraction=self.config.data.max_bad_fraction,
        )
        run = self._run_info()
        record: dict[str, Any] = {}
        self.callbacks = callbacks
        for callback in callbacks:
            if type(callback).__name__ in self._resumed_states:
                callback.load_state_dict(self._resumed_states[type(callback).__name__])
        for callback in callbacks:
            callback.on_start(run)
        try:
            for _ in range(start, total):
                started = time.perf_counter()
                batch = next(feed)
                fetched = time.perf_counter()
                outcome, phases = self._traced_step(batch)
                record = self._record(outcome, phases, batch, started, fetched)
                for callback in callbacks:
                    callback.on_step(record)
            self.towers.wait_for_weights()  # the last all-gather: nothing may be under way when the groups end
        finally:
            feed.close()
            for callback in callbacks:
                callback.on_end(record)
            self._release_run()

    def step(self, batch: LocalBatch, phases: Phases | None = None) -> StepOutcome:
        """One optimizer step on one global batch. Collective over the mesh."""
        outcome = self.contrastive_step(batch, phases or Phases())
        self.position.step += 1
        self.position.samples_seen += self.config.train.global_batch_size
        return outcome

    def _traced_step(self, batch: LocalBatch) -> tuple[StepOutcome, Phases]:
        """A step whose spans are written if log.timeline_steps asks for it."""
        step = self.position.step
        if step not in self.config.log.timeline_steps:
            phases = Phases()
            return self.step(batch, phases), phases
        phases = Phases(clock=self.device.clock_s, record_spans=True)
        dist.barrier(group=self.mesh.world.group)
        zero_s = self.device.clock_s()
        outcome = self.step(batch, phases)
        place = {"tensor": self.mesh.tensor.rank, "pipeline": self.mesh.pipeline.rank, "data": self.mesh.data.rank}
        write_spans(Path(self.config.run_dir), self.mesh.world.rank, place, step, zero_s, phases)
        return outcome, phases

    # --- reports ---------------------------------------------------------------------------------------------------

    def _record(
        self, outcome: StepOutcome, phases: Phases, batch: LocalBatch, started: float, fetched: float
    ) -> dict[str, Any]:
        loss, rates = outcome.loss, outcome.rates
        seen = self.position.samples_seen
        self.position.bad_samples += self.quarantine.report(batch.bad, samples_seen=seen)
        value = float(loss.loss)
        record = {
            "step": self.position.step - 1,
            "loss": value,
            "lr_vision": rates["vision"],
            "lr_text": rates["text"],
            "grad_norm": outcome.gradient_norm,
            "samples_seen": self.position.samples_seen,
            "step_time_s": time.perf_counter() - started,
            "data_time_s": fetched - started,
            "i2t_top1": float(loss.i2t_top1),
            "t2i_top1": float(loss.t2i_top1),
            "bad_samples": self.position.bad_samples,
            "checkpoint_stall_s": self.checkpoint_stall_s,
            **{f"bad_{reason}": count for reason, count in sorted(self.quarantine.by_reason.items())},
            **{f"samples_{source}": count for source, count in batch.source_counts.items()},
            **{f"phase_{name}_s": seconds for name, seconds in phases.seconds.items()},
        }
        self.checkpoint_stall_s = 0.0
        if self.towers.side.logit_scale is not None:
            record["logit_scale"] = float(self.towers.side.logit_scale().detach())
        if not torch.isfinite(loss.loss):
            raise NonFiniteLoss(
                f"loss is {value} at step {record['step']} (gradient norm {outcome.gradient_norm}, "
                f"lr {rates['vision']:g}): resume from the last checkpoint with a lower optim.lr_vision or a longer "
                "optim.warmup_steps"
            )
        return record

    def _run_info(self) -> RunInfo:
        return RunInfo(
            run_dir=Path(self.config.run_dir),
            config=to_dict(self.config),
            total_steps=self.config.train.steps,
            start_step=self.position.step,
            world_size=self.mesh.world.size,
            layout=self.mesh.layout,
            parameters=self._count_parameters(),
            global_batch_size=self.config.train.global_batch_size,
        )

    def _count_parameters(self) -> int:
        """Elements of the whole model: every stage's tensors once, the text side once."""
        *vision, side = [sum(_numel(t.shape) for t in part.logical.values()) for part in self.towers.parts]
        total = torch.tensor([sum(vision)], dtype=torch.int64, device=self.device.torch_device)
        dist.all_reduce(total, group=self.mesh.pipeline.group)
        return int(total) + side

    # --- where training begins -------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Take the run folder for this job and load what checkpoint.resume and init ask for. Collective."""
        self.lock = lock_run(Path(self.config.run_dir), self.mesh)
        begin = start(self.towers, self.optimizer, self.config, self.mesh)
        self.position, self._resumed_states = begin.position, begin.callbacks

    def _release_run(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def callback_states(self) -> dict[str, Any]:
        """Class name -> state of this rank's callbacks that have one."""
        states = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        return {name: state for name, state in states.items() if state}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
