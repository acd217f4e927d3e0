"""A suite of evaluation sets between steps, at the layout of the training: numbers `eval_SET` of the step record.

The sets are listed and checked at the start of the run. Results of every evaluation lie in run_dir/evaluation/step_N.
"""

import re
import time
import uuid
from pathlib import Path

from engine.callbacks.evaluation import embedder_of, evaluated_weights, is_due
from engine.evaluation.sets.spec import load_suite
from engine.evaluation.suite.plan import Plan, Towers
from engine.evaluation.suite.run import SuiteRun
from engine.record import Callback, Record, RunInfo
from engine.trainer import Trainer


class SuiteEvaluation(Callback):
    """Every evaluate.every_steps, and after the last step of a phase."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_start(self, run: RunInfo) -> None:
        """List and check the sets. Collective over the mesh; raises DataError on every rank."""
        trainer, settings = self.trainer, self.trainer.config.evaluate
        embedder = embedder_of(trainer)
        towers = Towers(
            config=trainer.config,
            mesh=trainer.mesh,
            dtype=trainer.towers.vision[0].config.params_dtype,
            device=trainer.device.torch_device,
            embedder=lambda frames: embedder,
        )
        self.suite = SuiteRun(load_suite(settings.suite), towers, Plan(root=Path(settings.data)))

    def measure(self, record: Record) -> dict[str, float]:
        """eval_NAME of every set, its own measure, and of every mean, where it is time."""
        if not is_due(self.trainer, record):
            return {}
        began = time.perf_counter()
        step = int(record["step"]) + 1
        out = Path(self.trainer.config.run_dir) / "evaluation" / f"step_{step:08d}"
        with evaluated_weights(self.trainer):
            # Steps are done again after a rewind, with other weights: nothing of an earlier time is taken up.
            results = self.suite.run(out, f"step {step}, {uuid.uuid4().hex}")
        results.about = {"run_dir": self.trainer.config.run_dir, "step": step, "layout": self.trainer.mesh.layout}
        if self.trainer.mesh.world.rank == 0:
            results.write(out)
        scores = {f"eval_{_key(spec.name)}": row.measures[spec.metric] for spec, row in results.chosen()}
        means = {
            f"eval_{_key(a.name)}": value for a in results.suite.averages if (value := results.average(a)) is not None
        }
        return scores | means | {"eval_suite_time_s": time.perf_counter() - began}


def _key(name: str) -> str:
    """A name as a metric: lower case, with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
