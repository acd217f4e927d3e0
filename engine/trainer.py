"""The training loop. Reads top to bottom: set up, then feed -> step -> report, until the last step.

Notable choices: data, schedule, loss and optimizer are parts with no knowledge of each other; this file is where they
meet. The hot path asks the device for numbers once a step, after the optimizer has been launched.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import DTYPES, build_optimizer, build_towers
from engine.callbacks.base import Callback, RunInfo
from engine.checkpoint.simple import (
    CheckpointError,
    Position,
    all_checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from engine.config import Config, to_dict
from engine.device import Device
from engine.feed import Feed, LocalBatch
from engine.loss import ContrastiveLoss, contrastive_loss
from engine.mesh import Mesh
from engine.rows import own_rows
from engine.schedule import ContrastiveSchedule, Phases, StepShape
from engine.stages import TextRunner, VisionStageRunner
from models.clip import LEARNED_SCALE_MAX


class NonFiniteLoss(Exception):
    """The loss is not a number; the weights of the last checkpoint are the last good ones."""


class Trainer:
    """One contrastive training job on this rank."""

    def __init__(self, config: Config, mesh: Mesh, device: Device):
        """Build everything. Collective over the mesh."""
        self.config, self.mesh, self.device = config, mesh, device
        train = config.train
        self.towers = build_towers(config, mesh, device.torch_device)
        self.optimizer = build_optimizer(config, self.towers)
        self.position = Position(step=0, samples_seen=0)
        local_batch = train.global_batch_size // mesh.data.size
        self.vision = VisionStageRunner(
            self.towers.vision,
            micro_batch=train.micro_batch_size,
            patch_dropout=train.patch_dropout,
            seed=train.seed,
            device=device.torch_device,
        )
        chunks = _text_chunks(own_rows(local_batch, mesh), train.text_micro_batch_size)
        self.text = TextRunner(self.towers.text, chunks=chunks, device=device.torch_device)
        self.schedule = ContrastiveSchedule(mesh, _step_shape(config, mesh, local_batch), device.torch_device)

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
        run = self._run_info()
        record: dict[str, Any] = {}
        for callback in callbacks:
            callback.on_start(run)
        try:
            for _ in range(start, total):
                started = time.perf_counter()
                batch = next(feed)
                fetched = time.perf_counter()
                loss, gradient_norm, rates, phases = self.step(batch)
                record = self._record(loss, gradient_norm, rates, phases, batch, started, fetched)
                for callback in callbacks:
                    callback.on_step(record)
        finally:
            feed.close()
            for callback in callbacks:
                callback.on_end(record)

    def step(self, batch: LocalBatch) -> tuple[ContrastiveLoss, float, dict[str, float], Phases]:
        """One optimizer step on one global batch. Collective over the mesh."""
        for ddp in self.towers.ddps:
            ddp.zero_grad_buffer()
        self.vision.batch = self.text.batch = batch
        result, phases = self.schedule.run(self.vision, self.text, self.text.chunks, self._loss)
        with phases.time("reduce"):
            self._reduce_gradients()
        rates = self.optimizer.rates()
        with phases.time("optimizer"):
            gradient_norm = self.optimizer.step()
        with phases.time("gather_weights"):
            for ddp in self.towers.ddps:
                ddp.start_param_sync(force_sync=True)
        self._clamp_logit_scale()
        self.position.step += 1
        self.position.samples_seen += self.config.train.global_batch_size
        return result, gradient_norm, rates, phases

    def _loss(self, image_rows: Tensor, text_rows: Tensor) -> ContrastiveLoss:
        scale = self.towers.scale(self.config.train.logit_scale)
        value = scale.detach() if isinstance(scale, Tensor) else scale
        result = contrastive_loss(
            image_rows, text_rows, value, group=self.mesh.world.group, tile=self.config.train.loss_tile
        )
        if isinstance(scale, Tensor):
            # Every rank knows the whole gradient and the text side sums over ranks: one rank adds it.
            own = result.grad_logit_scale if self.mesh.world.rank == 0 else torch.zeros_like(result.grad_logit_scale)
            scale.backward(own)
        return result

    def _reduce_gradients(self) -> None:
        self._reduce_over_tensor_ranks()
        for ddp in self.towers.ddps:
            ddp.finish_grad_sync()

    def _reduce_over_tensor_ranks(self) -> None:
        """Sum gradients that each tensor rank computed from its own tokens only (norms, biases, embedding)."""
        partial = [p for p in self.towers.vision.parameters() if getattr(p, "sequence_parallel", False)]
        if not partial:
            return
        gradients: list[Tensor] = [p.main_grad for p in partial]  # type: ignore[attr-defined]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=self.mesh.tensor.group)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    @torch.no_grad()
    def _clamp_logit_scale(self) -> None:
        """The learned scale stays within [1, 100], on the fp32 parameter itself (it is its own master weight)."""
        if self.towers.logit_scale is not None:
            self.towers.logit_scale.log_scale.clamp_(0, LEARNED_SCALE_MAX)

    # --- reports ---------------------------------------------------------------------------------------------------

    def _record(
        self,
        loss: ContrastiveLoss,
        gradient_norm: float,
        rates: dict[str, float],
        phases: Phases,
        batch: LocalBatch,
        started: float,
        fetched: float,
    ) -> dict[str, Any]:
        bad = torch.tensor([batch.bad_samples], device=self.device.torch_device)
        dist.all_reduce(bad, group=self.mesh.world.group)
        self.position.bad_samples += int(bad)
        value = float(loss.loss)
        record = {
            "step": self.position.step - 1,
            "loss": value,
            "lr_vision": rates["vision"],
            "lr_text": rates["text"],
            "grad_norm": gradient_norm,
            "samples_seen": self.position.samples_seen,
            "step_time_s": time.perf_counter() - started,
            "data_time_s": fetched - started,
            "i2t_top1": float(loss.i2t_top1),
            "t2i_top1": float(loss.t2i_top1),
            "bad_samples": self.position.bad_samples,
            **{f"phase_{name}_s": seconds for name, seconds in phases.seconds.items()},
        }
        if self.towers.logit_scale is not None:
            record["logit_scale"] = float(self.towers.logit_scale.log_scale.exp())
        if not torch.isfinite(loss.loss):
            raise NonFiniteLoss(
                f"loss is {value} at step {record['step']} (gradient norm {gradient_norm}, lr {rates['vision']:g}): "
                "resume from the last checkpoint with a lower optim.lr_vision or a longer optim.warmup_steps"
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
        stage = sum(_numel(t.shape) for t in self.towers.vision_logical.values())
        total = torch.tensor([stage], dtype=torch.int64, device=self.device.torch_device)
        dist.all_reduce(total, group=self.mesh.pipeline.group)
        return int(total) + sum(_numel(t.shape) for t in self.towers.text_logical.values())

    def resume(self) -> None:
        """Load what checkpoint.resume asks for."""
        run_dir, wish = Path(self.config.run_dir), self.config.checkpoint.resume
        if wish == "none" and all_checkpoints(run_dir):
            raise CheckpointError(
                f"{run_dir} holds checkpoints of an earlier run, which a fresh one would mix with its own: set another "
                "run_dir, delete its checkpoints folder, or set checkpoint.resume=auto to go on with it"
            )
        folder = latest_checkpoint(run_dir, wish)
        if folder is not None:
            self.position = load_checkpoint(folder, self.towers, self.optimizer, self.config, self.mesh)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _step_shape(config: Config, mesh: Mesh, local_batch: int) -> StepShape:
    train, vision = config.train, config.model.vision
    tokens = train.micro_batch_size * vision.kept_tokens(train.patch_dropout)
    split = mesh.tensor.size if config.parallel.sequence else 1
    micro_batches = local_batch // train.micro_batch_size
    return StepShape(
        micro_batches=micro_batches,
        local_batch=local_batch,
        embed_dim=config.model.embed_dim,
        hidden=(tokens // split, 1, vision.width),
        dtype=DTYPES[train.precision],
        keep=micro_batches if train.keep_activations < 0 else train.keep_activations,
    )


def _text_chunks(own: slice, size: int) -> list[slice]:
    """This rank's rows in chunks of `size` captions (0: one chunk)."""
    step = size or max(1, own.stop - own.start)
    return [slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]
