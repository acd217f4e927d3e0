"""Zero-shot evaluation between steps, at the layout of the training: numbers `eval_*` of the step record.

Runs on every rank, since the towers are cut over all of them; all patches are kept. The numbers reach the record before
any other callback sees it, so checkpoint.keep_best can name them.
"""

import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.sources import shards_of
from engine.evaluation.embedder import Embedder, Encoders
from engine.evaluation.inputs import ShardInput, agree
from engine.evaluation.scores import ClassPrompts, score_captions, score_classes
from engine.evaluation.text_files import caption_lines, read_lines
from engine.evaluation.vocabulary import tokenizer_of
from engine.optim.average import averaged_weights
from engine.record import Callback, Record, RunInfo
from engine.trainer import Trainer


def embedder_of(trainer: Trainer) -> Embedder:
    """The towers in training, run forward on pictures."""
    config, towers, mesh = trainer.config, trainer.towers, trainer.mesh
    # Sequence parallelism cuts micro-batch x tokens, so a multiple of the tensor axis always fits.
    micro_batch = config.train.micro_batch_size + -config.train.micro_batch_size % mesh.tensor.size
    encoders = Encoders(towers.vision, towers.text_side.tower, config.model.embed_dim)
    return Embedder(encoders, mesh, trainer.device.torch_device, micro_batch)


def evaluated_weights(trainer: Trainer) -> AbstractContextManager[None]:
    """Within it the towers hold the weights that evaluate.ema asks for."""
    if trainer.config.evaluate.ema:
        return averaged_weights(trainer.optimizer, trainer.towers)
    return trainer.towers.whole_weights()


def is_due(trainer: Trainer, record: Record) -> bool:
    """Whether the step of `record` is one after which the run is evaluated."""
    done = int(record["step"]) + 1
    return done % trainer.config.evaluate.every_steps == 0 or done == trainer.phase.last_step


class Evaluation(Callback):
    """Every evaluate.every_steps, and after the last step of a phase."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.settings = trainer.config.evaluate

    def on_start(self, run: RunInfo) -> None:
        """Read the indices, the captions and the class names, so that a mistake in them is found before the first step.

        Collective over the mesh; raises DataError on every rank for what cannot be used.
        """
        trainer, config = self.trainer, self.trainer.config
        mesh, device = trainer.mesh, trainer.device.torch_device
        self.embedder = embedder_of(trainer)
        dtype = trainer.towers.vision[0].config.params_dtype
        with shards_of("evaluate.shards"):
            self.source = ShardInput(self.settings.shards, config, mesh, dtype, device, self.settings.max_samples)
        self.block_size = self.embedder.micro_batch * mesh.data.size * 4 * mesh.pipeline.size
        self.prompts = self._prompts() if self.settings.classes else None
        self._check_samples()

    def _prompts(self) -> ClassPrompts:
        names = read_lines(Path(self.settings.classes), "evaluate.classes: a class name")
        return ClassPrompts(
            names, self.settings.templates, tokenizer_of(self.trainer.config.model.text, self.trainer.config.data)
        )

    def _check_samples(self) -> None:
        """What the first evaluation would stumble over. Collective over the mesh."""
        captions = self.source.check_captions()
        usable = [caption for caption in captions if caption is not None]
        if not usable or not self.source.has_images:
            raise DataError(
                f"evaluate.shards {self.settings.shards}: of {len(captions)} samples {len(usable)} have a caption "
                f"{'and some' if self.source.has_images else 'and none'} a picture: evaluation needs both"
            )
        if self.prompts is not None:
            for caption in usable:
                for line in caption_lines(caption):
                    self.prompts.label(line)
        agree(self._first_picture_problem(), self.trainer.mesh.world)

    def _first_picture_problem(self) -> str | None:
        """Looks, on rank 0, for one sample that can be decoded."""
        if self.trainer.mesh.world.rank != 0:
            return None
        bad: list[str] = []
        try:
            for position in range(len(self.source)):
                seen = self.source.reader.read_each(np.array([position]))
                if bool(seen.has_image[0]):
                    return None
                bad += [f"{sample.key}: {sample.reason}" for sample in seen.bad]
        except DataError as error:
            return str(error)
        return f"evaluate.shards {self.settings.shards}: no picture of {len(self.source)} can be read ({bad[0]})"

    def measure(self, record: Record) -> dict[str, float]:
        """eval_zero_shot_top1 and more, where it is time."""
        if not is_due(self.trainer, record):
            return {}
        began = time.perf_counter()
        with evaluated_weights(self.trainer):
            scores = self._scores()
        return {f"eval_{name}": value for name, value in scores.items()} | {"eval_time_s": time.perf_counter() - began}

    def _scores(self) -> dict[str, float]:
        if self.prompts is not None:
            return score_classes(self.embedder, self.source, self.block_size, self.prompts)
        tokenizer = tokenizer_of(self.trainer.config.model.text, self.trainer.config.data)
        return score_captions(self.embedder, self.source, self.block_size, tokenizer).scores()
