"""What the trainer tells the world: one small interface, one file per purpose beside it.

A callback sees the run at its start, every finished optimizer step, and the end. Callbacks that only log are
constructed on world rank 0 alone; the trainer builds the others on every rank, in the same order, so that
they may hold collectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.sources import SourceSize

Record = Mapping[str, Any]
"""One optimizer step, flat, python numbers only (the trainer has already taken them off the device), and the name of
its `phase` in a job that has phases.

`step` (0-based index of the finished step), `loss` (nats, or minus a mean cosine with objective=mim), `lr_vision`,
`grad_norm` (before clipping), `samples_seen` (of the whole run, this step included), `step_time_s` (wall time,
waiting for data included), `data_time_s` (of it, waiting for data), and whatever else the objective and the trainer
measure: `lr_text`, `i2t_top1`, `t2i_top1` (0..1, within the global batch), the weighted parts of the loss where
teachers add to it (`contrastive_loss`, `distill_feature`, …), or `masked_patches` (mean of an image).
"""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known about a run before its first step."""

    run_dir: Path
    """Folder of the run's files; exists."""
    config: dict[str, Any]
    """The resolved config as plain nested containers."""
    total_steps: int
    """Optimizer steps of the whole run, resumed ones included."""
    start_step: int
    """Steps already done, which is the index of the first step to come; 0 for a fresh run."""
    world_size: int
    """Ranks of the job."""
    layout: str
    """The mesh in words, e.g. "TP 2 × PP 2 × DP 1"."""
    parameters: int
    """Logical parameters of both towers: nothing is counted twice over ranks."""
    global_batch_size: int
    """Pairs per optimizer step."""
    phase: str = ""
    """The phase that begins or goes on; empty in a job without phases."""
    resumed_record: Mapping[str, float] = field(default_factory=dict)
    """The last step's record as the checkpoint holds it; empty for a fresh run."""
    first_step: int = 0
    """Steps of the job before that phase."""
    last_step: int = 0
    """Steps of the job when that phase ends; 0: not known."""
    model: str = ""
    """The model in words: its preset, and what was changed of it."""
    image_size: int = 0
    """Pixels a side of an image."""
    sources: Sequence[SourceSize] = ()
    """Shards and samples of each source, with its epochs in the whole phase."""


class Callback:
    """Base with every hook doing nothing; a callback overrides what it needs."""

    def on_start(self, run: RunInfo) -> None:
        """Once, after a checkpoint is loaded and before the first step."""

    def secure(self, record: Record) -> None:
        """Save what must not be lost, after an optimizer step and before anything else that may fail at it."""

    def measure(self, record: Record) -> dict[str, float]:
        """Give numbers to add to the record of an optimizer step, before any callback sees it."""
        return {}

    def on_step(self, record: Record) -> None:
        """See the record of every optimizer step."""

    def save_now(self, record: Record, stop: str) -> None:
        """Between two steps, when a checkpoint was asked for. `record` is the last step's, empty before the first of
        this start; `stop` is why the run ends here, empty if it goes on.
        """

    def on_end(self, record: Record) -> None:
        """Once, also when training stops with an error; `record` is the last step's, empty if none."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to carry for this callback; plain containers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; called before `on_start`."""
