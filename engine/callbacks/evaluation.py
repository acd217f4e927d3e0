"""Zero-shot evaluation between steps, at the layout of the training: numbers `eval_*` of the step record.

Runs on every rank, since the towers are cut over all of them; all patches are kept. The numbers reach the record before
any other callback sees it, so checkpoint.keep_best can name them.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from data.errors import DataError
from engine.evaluation.embedder import Embedder, Encoders
from engine.evaluation.inputs import ShardInput
from engine.evaluation.scores import ClassPrompts, score_captions, score_classes
from engine.optim.average import averaged_weights
from engine.record import Callback, Record, RunInfo
from engine.trainer import Trainer


class Evaluation(Callback):
    """Every evaluate.every_steps, and after the last step of a phase."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.settings = trainer.config.evaluate

    def on_start(self, run: RunInfo) -> None:
        """Read the index of the shards and the class names. Raises DataError for what cannot be used."""
        trainer, config = self.trainer, self.trainer.config
        towers, mesh, device = trainer.towers, trainer.mesh, trainer.device.torch_device
        # Sequence parallelism cuts micro-batch x tokens, so a multiple of the tensor axis always fits.
        micro_batch = config.train.micro_batch_size + -config.train.micro_batch_size % mesh.tensor.size
        encoders = Encoders(towers.vision, towers.text_side.tower, config.model.embed_dim)
        self.embedder = Embedder(encoders, mesh, device, micro_batch)
        dtype = towers.vision[0].config.params_dtype
        self.source = ShardInput(self.settings.shards, config, mesh, dtype, device, self.settings.max_samples)
        self.block_size = micro_batch * mesh.data.size * 4 * mesh.pipeline.size
        self.prompts = self._prompts() if self.settings.classes else None

    def _prompts(self) -> ClassPrompts:
        path = Path(self.settings.classes)
        if not path.is_file():
            raise DataError(f"evaluate.classes {path} does not exist: a text file, one class name a line")
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return ClassPrompts(names, self.settings.templates, self.trainer.config.model.text.context_length)

    def measure(self, record: Record) -> dict[str, float]:
        """eval_zero_shot_top1 and more, where it is time."""
        done = int(record["step"]) + 1
        if done % self.settings.every_steps and done != self.trainer.phase.last_step:
            return {}
        began = time.perf_counter()
        with self._weights():
            scores = (
                score_captions(self.embedder, self.source, self.block_size)
                if self.prompts is None
                else score_classes(self.embedder, self.source, self.block_size, self.prompts)
            )
        return {f"eval_{name}": value for name, value in scores.items()} | {"eval_time_s": time.perf_counter() - began}

    def _weights(self) -> AbstractContextManager[None]:
        towers = self.trainer.towers
        if self.settings.ema:
            return averaged_weights(self.trainer.optimizer, towers)
        towers.wait_for_weights()
        return nullcontext()
