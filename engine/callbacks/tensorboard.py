"""`run_dir/tensorboard/`: the same numbers as metrics.jsonl as TensorBoard scalars.

Tags are `train/NAME`, `evaluation/NAME` (its `eval_` cut off) and `speed/NAME` for times, rates and memory.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from engine.record import Callback, Record, RunInfo

_SPEED = ("samples_per_s", "tflops", "mfu", "memory_gb", "slowest_rank", "slowest_over_median")
"""Numbers of the job's speed whose names are no times."""


class TensorBoard(Callback):
    """Writes scalars and, once, the resolved config as text. World rank 0 only."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._folder = Path()

    def on_start(self, run: RunInfo) -> None:
        self._folder = run.run_dir / "tensorboard"
        with self._or_ends_here():
            # Event files are append-only: purge_step hides what an interrupted run wrote from this step on.
            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=run.start_step)
            config_block = "\n".join("    " + line for line in yaml.safe_dump(run.config).splitlines())
            self._writer.add_text("config", config_block, global_step=run.start_step)

    def on_step(self, record: Record) -> None:
        if self._writer is None:
            return
        with self._or_ends_here():
            for name, value in record.items():
                if name not in ("step", "phase"):
                    self._writer.add_scalar(tag_of(name), value, global_step=int(record["step"]))

    def on_end(self, record: Record) -> None:
        if self._writer is not None:
            with self._or_ends_here():
                self._writer.close()

    @contextmanager
    def _or_ends_here(self) -> Iterator[None]:
        """A disk that refuses the curves does not end the training. The writer's thread has ended by it: no more
        comes in this start.
        """
        try:
            yield
        except OSError as error:
            self._writer = None
            why = f"{self._folder} cannot be written ({error.strerror or error})"
            line = f"WARNING: {why}: its curves end here until the next start, metrics.jsonl goes on"
            print(line, file=sys.stderr, flush=True)


def tag_of(name: str) -> str:
    """The tag of a number of the step records."""
    if name.startswith("eval_"):
        return f"evaluation/{name.removeprefix('eval_')}"
    return f"speed/{name}" if name in _SPEED or name.endswith("_s") else f"train/{name}"
