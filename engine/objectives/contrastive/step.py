"""One optimizer step on one global batch: towers, program, loss, gradient reduction and update put together."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.build import DTYPES, Towers
from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.contrastive.activations import Activations, message_shape
from engine.objectives.contrastive.copies import caption_ids
from engine.objectives.contrastive.distill.losses import distilled
from engine.objectives.contrastive.distill.teachers import Teacher, Teaching, load_teachers
from engine.objectives.contrastive.matryoshka import R, nested_loss
from engine.objectives.contrastive.passes import Captions, ContrastivePasses, Loss, LossResult
from engine.objectives.contrastive.program import contrastive_program
from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.objectives.contrastive.tiles import scalar_beside
from engine.objectives.contrastive.towers import KeptPatches, TextRunner, VisionRunner
from engine.objectives.update import StepOutcome, Update
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.device import moved
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows, rows_of_every_rank
from engine.pipeline.clock import Phases
from engine.pipeline.executor import Executor, Work
from engine.pipeline.outputs import Passes, keep_of, output_levels
from engine.pipeline.program import Unit
from models.clip import LEARNED_SCALE_MAX

LOGIT_SCALE_BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "softmax": {"logit_scale.log_scale": (0.0, LEARNED_SCALE_MAX)},
    "sigmoid": {},
}
"""Loss -> bounds of its learned scalars: CLIP's scale stays within [1, 100] (its logarithm is the weight), SigLIP's is
free, as in big_vision (the published ones are above 100).
"""


class ContrastiveStep:
    """Steps of one shape on this rank. Collective over the mesh."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        towers: Towers,
        optimizer: ShardedOptimizer,
        teachers: Sequence[Teacher] | None = None,
    ):
        """teachers: of train.distill; None loads them. Raises CheckpointError if they are not what it says."""
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
        program = contrastive_program(config, mesh.data.size, 0)
        self.activations = Activations(config, mesh, device, towers, self.vision, self.text.rows, program)
        keep = self.activations.kept_micro_batches(program.micro_batches)
        self.program = contrastive_program(config, mesh.data.size, keep)
        self.keep = self.program.kept(mesh.pipeline.rank)
        self.executor = Executor(
            mesh,
            self.program,
            hidden=message_shape(config, mesh),
            dtype=DTYPES[train.precision],
            device=device,
            offload_stash=train.offload_stash,
            beside=[DTYPES[teacher.precision or train.precision] for teacher in train.distill],
        )
        self._batch: LocalBatch | None = None
        self.work, self.captions = self._work()
        self.teaching = self._teaching(teachers)

    def _teaching(self, teachers: Sequence[Teacher] | None) -> Teaching | None:
        if not self.config.train.distill:
            return None
        if teachers is None:
            teachers, remarks = load_teachers(self.config, self.mesh, self.device)
            if self.mesh.world.rank == 0:
                print("; ".join(remarks), file=sys.stderr, flush=True)
        return Teaching(teachers, self.config, self.mesh, self.device)

    @property
    def keeps_captions(self) -> bool:
        """Whether the captions keep their activations: where every micro-batch does."""
        return self.keep == self.program.micro_batches and self.program.trains_captions

    def _work(self) -> tuple[Work, Captions]:
        config, towers = self.config, self.towers
        *levels, of_text = output_levels(
            config, self.mesh, self.device, towers.vision, self.side.tower, self._output_passes()
        )
        trains = [self._trains(number) for number in range(len(towers.vision))]
        work = Work(
            chunks=self.vision,
            below={i: runner.below for i, runner in enumerate(self.vision) if runner.tower.is_divided},
            backward=[part.last_backward for part in towers.parts[:-1]],
            outputs=[
                keep_of(tower.blocks_above, level if is_repeated else "none", config, self.device)
                for tower, level, is_repeated in zip(towers.vision, levels, trains, strict=True)
            ],
            parts=[part.sharded for part in towers.parts],
        )
        captions = Captions(
            tower=self.text,
            below=self.text.below if self.side.tower.is_divided else None,
            rows=self.text.rows,
            backward=towers.parts[-1].last_backward,
            outputs=keep_of(
                self.side.tower.blocks_above,
                of_text if self.program.trains_captions else "none",
                config,
                self.device,
            ),
            keeps=self.keeps_captions,
        )
        return work, captions

    def _trains(self, chunk: int) -> bool:
        """Whether a chunk of this rank has a backward."""
        return self.program.trains(self.mesh.pipeline.rank, Unit(chunk, 0))

    def _output_passes(self) -> Passes:
        """Passes that leave outputs behind: those that are repeated, and all of them under full recomputation."""
        full = self.config.train.recompute == "full"
        repeated = self.program.micro_batches - (0 if full else self.keep)
        is_left = self.keeps_captions or not self.program.trains_captions
        captions = 0 if is_left else sum(rows.stop - rows.start for rows in self.text.rows)
        repeats = [repeated * self._trains(chunk) for chunk in range(len(self.towers.vision))]
        return Passes(self.config, self.mesh.tensor.size, vision_passes=repeats, captions=captions)

    def __call__(self, batch: LocalBatch, phases: Phases) -> StepOutcome:
        """Train on one batch."""
        result = self.gradients(batch, phases)
        metrics = self._metrics(result)  # before the update: the scale behind it waits for the weights to be gathered
        rates = self.optimizer.rates()
        gradient_norm = self.update(phases, LOGIT_SCALE_BOUNDS[self.config.train.loss], result.loss)
        return StepOutcome(loss=result.loss, metrics=metrics, gradient_norm=gradient_norm, rates=rates)

    def gradients(self, batch: LocalBatch, phases: Phases, loss: Loss | None = None) -> LossResult:
        """The program on one batch; gradients are not reduced yet. loss: another one than the config's."""
        self.towers.zero_gradients()
        self._give(batch)
        passes = ContrastivePasses(
            mesh=self.mesh,
            device=self.device,
            captions=self.captions,
            loss=loss or self.loss,
            local_batch=self.local_batch,
            micro_batches=self.program.micro_batches,
            embed_dim=self.config.model.embed_dim,
            teaching=self.teaching,
            reads_features=bool(self.config.data.features),
            features=batch.images if self.config.data.features else None,
        )
        self.executor.run(self.work, passes, phases)
        self._give(None)
        assert passes.result is not None, "the program has no loss"
        return passes.result

    def _give(self, batch: LocalBatch | None) -> None:
        """Let everything that reads the batch read this one; None: its pixels do not wait for the next to come."""
        self._batch = batch
        self.text.give(batch)
        for runner in self.vision:
            runner.give(batch)
        if self.teaching is not None:
            self.teaching.batch = batch

    def _metrics(self, result: LossResult) -> dict[str, Tensor]:
        metrics = {"i2t_top1": result.i2t_top1, "t2i_top1": result.t2i_top1, **result.terms}
        if self.side.logit_scale is not None:
            metrics["logit_scale"] = self.side.logit_scale().detach()
        return metrics

    def loss(self, image_rows: Tensor, text_rows: Tensor) -> LossResult:
        """The loss of the config over the rows of all ranks; learned scalars get their gradients. Collective."""
        side, train = self.side, self.config.train
        fixed = train.logit_scale
        scale = scalar_beside(image_rows, fixed) if side.logit_scale is None else side.logit_scale()
        # A dict of Any: mypy cannot see which keyword gets which value.
        where: dict[str, Any] = {
            "group": self.mesh.world.group,
            "tile": train.loss_tile,
            "variant": train.loss_variant,
            "row_counts": self.row_counts,
            "copies": self._copies(),
        }
        result: LossResult
        if side.logit_bias is not None:
            bias = side.logit_bias()
            sigmoid = partial(sigmoid_loss, logit_scale=scale.detach(), logit_bias=bias.detach(), **where)
            result = of_sigmoid = self._whole_loss(sigmoid, image_rows, text_rows, scale.detach(), where)
            if bias.requires_grad:
                self._backward_scalar(bias, of_sigmoid.grad_bias)
        else:
            softmax = partial(contrastive_loss, logit_scale=scale.detach(), **where)
            result = self._whole_loss(softmax, image_rows, text_rows, scale.detach(), where)
        if scale.requires_grad:
            self._backward_scalar(scale, result.grad_logit_scale)
        return result

    def _whole_loss(
        self, loss: Callable[[Tensor, Tensor], R], image: Tensor, text: Tensor, scale: Tensor, where: dict[str, Any]
    ) -> R:
        """`loss` at every width, and what teachers add to that of the whole embeddings."""
        result = nested_loss(loss, image, text, self.config.train.matryoshka)
        if self.teaching is None:
            return result
        return distilled(result, image, text, self.teaching.taught, loss=loss, logit_scale=scale, **where)

    def _copies(self) -> Tensor | None:
        """Identifiers of this rank's pairs by which the loss tells false negatives."""
        kinds, batch = self.config.train.mask_false_negatives, self._batch
        if kinds == "none":
            return None
        assert batch is not None
        ids = [caption_ids(batch.tokens)] if kinds in ("captions", "both") else []
        if kinds in ("images", "both"):
            assert batch.picture_ids is not None
            ids.append(batch.picture_ids)
        return moved(torch.stack(ids, dim=1), self.device)

    def _backward_scalar(self, value: Tensor, gradient: Tensor) -> None:
        """Every rank knows the whole gradient and the text side sums over ranks: one rank adds it."""
        value.backward(gradient if self.mesh.world.rank == 0 else torch.zeros_like(gradient))


def _parts(own: slice, size: int) -> list[slice]:
    """This rank's rows in parts of `size` captions (0: one part)."""
    step = size or max(1, own.stop - own.start)
    return [slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]
