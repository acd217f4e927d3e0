"""The numbers of every step in Weights & Biases (log.wandb names the project; the package wandb is optional).

Where they go is the package's own business: WANDB_MODE=offline keeps them in run_dir/wandb, WANDB_API_KEY is read by
it from the environment and never by us.
"""

import hashlib
from typing import Any

from engine.record import Callback, Record, RunInfo


class WeightsAndBiases(Callback):
    """Logs scalars and, once, the resolved config. World rank 0 only."""

    def __init__(self, project: str):
        """Raises ImportError where the package is not installed; the config is refused before that."""
        import wandb

        self._wandb, self._project = wandb, project
        self._run: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Go on in the run of an earlier start: its name follows from the folder."""
        name = hashlib.sha256(str(run.run_dir.resolve()).encode()).hexdigest()[:16]
        self._run = self._wandb.init(
            project=self._project, id=name, name=run.run_dir.name, config=run.config, dir=run.run_dir, resume="allow"
        )

    def on_step(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=int(record["step"]))

    def on_end(self, record: Record) -> None:
        if self._run is not None:
            self._run.finish()
