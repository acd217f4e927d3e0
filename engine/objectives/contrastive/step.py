"""One optimizer step on one global batch: towers, schedule, loss, gradient reduction and update put together."""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import DTYPES, Towers
from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.objectives.contrastive.towers import KeptPatches, TextRunner, VisionRunner
from engine.objectives.update import StepOutcome, Update
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows, rows_of_every_rank
from engine.pipeline.clock import Phases
from engine.pipeline.executor import ContrastiveSchedule, LossResult, StepShape, Work
from engine.pipeline.memory import keep_within, saved_bytes
from engine.pipeline.outputs import Passes, keep_of, output_levels
from engine.pipeline.turns import Turns
from models.clip import LEARNED_SCALE_MAX, embedding

LOGIT_SCALE_BOUNDS = {"logit_scale.log_scale": (0.0, LEARNED_SCALE_MAX)}
"""The learned scale stays within [1, 100] (its logarithm is the weight)."""


def round_size(config: Config, micro_batches: int) -> int | None:
    """G of the pipeline: what the config says, or all micro-batches where a chunk's weights come and go."""
    parallel = config.parallel
    return parallel.round_size or (micro_batches if parallel.shard != "optimizer" else None)


class ContrastiveStep:
    """Steps of one shape on this rank. Collective over the mesh."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, towers: Towers, optimizer: ShardedOptimizer):
        self.config, self.mesh, self.device = config, mesh, device
        self.towers, self.side, self.optimizer = towers, towers.text_side, optimizer
        self.update = Update(towers, optimizer, mesh, config.health)
        train = config.train
        self.local_batch = train.global_batch_size // mesh.data.size
        kept = KeptPatches(
            config.model.vision,
            patch_dropout=train.patch_dropout,
            seed=train.seed,
            frames=config.data.frames,
            device=device,
        )
        self.vision = [
            VisionRunner(chunk, kept, micro_batch=train.micro_batch_size, device=device) for chunk in towers.vision
        ]
        rows = own_rows(self.local_batch, mesh)
        self.row_counts = rows_of_every_rank(self.local_batch, mesh)
        self.text = TextRunner(self.side.tower, rows=_parts(rows, train.text_micro_batch_size), device=device)
        shape = self._shape()
        *levels, of_text = output_levels(config, mesh, device, towers.vision, self.side.tower, self._passes(shape))
        self.work = Work(
            vision=self.vision,
            vision_backward=[part.last_backward for part in towers.parts[:-1]],
            vision_outputs=[
                keep_of(tower.block.layers, level, config, device)
                for tower, level in zip(towers.vision, levels, strict=True)
            ],
            text=self.text,
            text_rows=self.text.rows,
            text_backward=towers.parts[-1].last_backward,
            text_outputs=keep_of(self.side.tower.block.layers, of_text, config, device),
            loss=self._loss,
            turns=Turns([part.sharded for part in towers.parts], ahead=config.parallel.overlap),
        )
        self.schedule = ContrastiveSchedule(
            mesh, shape, device, config.parallel.virtual, round_size(config, shape.micro_batches)
        )

    def __call__(self, batch: LocalBatch, phases: Phases) -> StepOutcome:
        """Train on one batch."""
        self.towers.zero_gradients()
        self.text.batch = batch
        for runner in self.vision:
            runner.batch = batch
        result = self.schedule.run(self.work, phases)
        metrics = self._metrics(result)  # before the update: the scale behind it waits for the weights to be gathered
        rates = self.optimizer.rates()
        gradient_norm = self.update(phases, LOGIT_SCALE_BOUNDS, result.loss)
        return StepOutcome(loss=result.loss, metrics=metrics, gradient_norm=gradient_norm, rates=rates)

    def _metrics(self, result: LossResult) -> dict[str, Tensor]:
        metrics = {"i2t_top1": result.i2t_top1, "t2i_top1": result.t2i_top1}
        if self.side.logit_scale is not None:
            metrics["logit_scale"] = self.side.logit_scale().detach()
        return metrics

    def _loss(self, image_rows: Tensor, text_rows: Tensor) -> LossResult:
        side, train = self.side, self.config.train
        scale = side.logit_scale() if side.logit_scale is not None else torch.tensor(train.logit_scale)
        # A dict of Any: mypy cannot see which keyword gets which value.
        where: dict[str, Any] = {
            "group": self.mesh.world.group,
            "tile": train.loss_tile,
            "variant": train.loss_variant,
            "row_counts": self.row_counts,
        }
        result: LossResult
        if side.logit_bias is not None:
            bias = side.logit_bias()
            result = sigmoid_loss(image_rows, text_rows, scale.detach(), bias.detach(), **where)
            self._backward_scalar(bias, result.grad_bias)
        else:
            result = contrastive_loss(image_rows, text_rows, scale.detach(), **where)
        if scale.requires_grad:
            self._backward_scalar(scale, result.grad_logit_scale)
        return result

    def _backward_scalar(self, value: Tensor, gradient: Tensor) -> None:
        """Every rank knows the whole gradient and the text side sums over ranks: one rank adds it."""
        value.backward(gradient if self.mesh.world.rank == 0 else torch.zeros_like(gradient))

    # --- sizes ---------------------------------------------------------------------------------------------------

    def _shape(self) -> StepShape:
        train, vision = self.config.train, self.config.model.vision
        tokens = train.micro_batch_size * vision.kept_tokens(train.patch_dropout)
        split = self.mesh.tensor.size if self.config.parallel.sequence else 1
        micro_batches = self.local_batch // self.config.micro_batch_samples
        keep = self._keep(micro_batches)
        return StepShape(
            micro_batches=micro_batches,
            local_batch=self.local_batch,
            embed_dim=self.config.model.embed_dim,
            hidden=(tokens // split, 1, vision.width),
            dtype=DTYPES[train.precision],
            keep=keep,
            keep_text=keep == micro_batches,
            offload_stash=train.offload_stash,
        )

    def _passes(self, shape: StepShape) -> Passes:
        """Passes that leave outputs behind: those that are repeated, and all of them under full recomputation."""
        full = self.config.train.recompute == "full"
        repeated = shape.micro_batches - (0 if full else shape.keep)
        captions = 0 if shape.keep_text else sum(rows.stop - rows.start for rows in self.text.rows)
        return Passes(self.config, self.mesh.tensor.size, vision_passes=repeated, captions=captions)

    def _keep(self, micro_batches: int) -> int:
        train = self.config.train
        if train.activation_budget_gb is None:
            return micro_batches if train.keep_activations < 0 else train.keep_activations
        one, budget = self.activation_bytes(), train.activation_budget_gb
        keep = keep_within(budget, one, micro_batches)
        captions = self.text_activation_bytes()  # every rank asks: where weights are sharded all gather them
        if keep == micro_batches and keep * one + captions > budget * 1e9:
            keep -= 1  # where all micro-batches keep theirs, the captions do, too
        # A replay runs the stage's collectives again, so the ranks of a tensor group have to agree.
        agreed = torch.tensor([keep], device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.mesh.tensor.group)
        return int(agreed)

    def activation_bytes(self) -> int:
        """Bytes that one micro-batch keeps for backward on this rank, measured by one forward.

        Collective over TP, and over the data axis where weights are sharded.
        """
        total = 0
        for runner, part in zip(self.vision, self.towers.parts, strict=False):
            with part.whole_weights():
                total += self._chunk_bytes(runner)
        return total

    def text_activation_bytes(self) -> int:
        """Bytes that all captions of this rank keep at full context, measured like `activation_bytes`."""
        tower, text = self.side.tower, self.config.model.text

        def encode(count: int) -> Tensor:
            return embedding(tower(torch.zeros(count, text.context_length, dtype=torch.int64, device=self.device)))

        weights = list(tower.parameters())
        with self.towers.parts[-1].whole_weights():
            return sum(saved_bytes(partial(encode, rows.stop - rows.start), weights) for rows in self.text.rows)

    def _chunk_bytes(self, runner: VisionRunner) -> int:
        train, model = self.config.train, self.config.model
        side, samples = model.vision.image_size, self.config.micro_batch_samples
        runner.batch = LocalBatch(
            positions=np.arange(samples),
            images=torch.zeros(samples, runner.frames, 3, side, side, dtype=torch.uint8),
            tokens=torch.empty(0),
        )
        hidden = None
        if not runner.tower.is_first:
            tokens = train.micro_batch_size * model.vision.kept_tokens(train.patch_dropout)
            rows = tokens // (self.mesh.tensor.size if self.config.parallel.sequence else 1)
            hidden = torch.zeros(rows, 1, model.vision.width, dtype=DTYPES[train.precision], device=self.device)
            hidden.requires_grad_()
        return saved_bytes(lambda: runner(hidden, 0), list(runner.tower.parameters()))


def _parts(own: slice, size: int) -> list[slice]:
    """This rank's rows in parts of `size` captions (0: one part)."""
    step = size or max(1, own.stop - own.start)
    return [slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]
