"""Two jobs that use most options at once: three phases each, a step that goes wrong, a stop, other layouts.

The first is a student of masked-feature distillation, the second a CLIP whose image tower it becomes.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.callbacks.checkpoint import CheckpointCallback
from engine.callbacks.evaluation import Evaluation
from engine.callbacks.metrics import MetricsFile, read_metrics
from engine.checkpoint.format.manifest import AVERAGE
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import plan_job
from engine.config.read import Config, ParallelConfig, check_layout, resolve
from engine.job import train_job
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh, meet
from engine.record import Callback, Record
from engine.trainer import Trainer
from tests.checkpoint.jobs import differing
from tests.data.shard_factory import make_shards
from tests.distributed import run_distributed, world
from tests.engine.mim_jobs import MODEL, TEACHER
from tests.golden import deviations

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS, POISONED, STOPS = 8, 5, (4, 7)
"""Of both jobs. A weight is broken after step 5, so step 6 rewinds to the checkpoint of step 4."""


def student(folder: str, run: str, *overrides: str) -> Config:
    """Skips spikes and rewinds what is not finite; smaller batches in bf16, then another schedule in fp32."""
    tree = {
        "objective": "mim",
        "run_dir": f"{folder}/{run}",
        "model": asdict(MODEL),
        "mim": TEACHER | {"masked_patches": 10, "min_block": 8},
        "data": {"shards": f"{folder}/00000.tar", "workers": 0},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "recompute": "selective"},
        "optim": {"name": "adamw", "lr_vision": 2e-3, "warmup_steps": 1, "ema_decay": 0.5, "layer_decay_vision": 1.0},
        "checkpoint": {"every_steps": 2, "keep_last": 3, "keep_best": "loss"},
        "health": {
            "on_nonfinite": "rewind", "on_divergence": "rewind",
            "on_spike": "skip", "gradient_factor": 50.0, "window_steps": 2,
        },
        "phases": [
            {"name": "a", "steps": 3},
            {
                "name": "b", "steps": 3,
                "train": {"global_batch_size": 4, "recompute": "full", "precision": "bf16"},
                "data": {"sources": [{"name": "x", "shards": f"{folder}/00001.tar"}]},
            },
            {"name": "c", "samples": 16, "schedule": "restart", "optimizer": "reset", "optim": {"lr_vision": 1e-3}},
        ],
    }  # fmt: skip
    return resolve(tree, list(overrides))


def clip(folder: str, run: str, *overrides: str) -> Config:
    """Sigmoid loss with learned scale and bias; images, then clips of two frames, then a higher resolution."""
    tree = {
        "run_dir": f"{folder}/{run}",
        "model": asdict(MODEL) | {"text": {"width": 32, "heads": 2, "depth": 1, "context_length": 16}},
        "init": {"vision": f"{folder}/student", "reinit": ["vision.head.projection.*"]},
        "data": {"shards": f"{folder}/00000.tar", "workers": 0},
        "train": {
            "global_batch_size": 8, "micro_batch_size": 2, "logit_scale": None, "loss": "sigmoid",
            "loss_variant": "ring", "activation_budget_gb": 0.002, "recompute": "selective",
        },
        "parallel": {"layers": "balanced"},
        # eps: gradients that are zero but for rounding must not become whole steps.
        "optim": {"lr_vision": 0.002, "lr_text": 0.002, "warmup_steps": 1, "ema_decay": 0.5, "eps": 1e-4},
        "checkpoint": {"every_steps": 2, "keep_last": 3, "keep_best": "eval_zero_shot_top1", "keep_best_is": "max"},
        "evaluate": {"every_steps": 2, "shards": [f"{folder}/00001.tar"], "ema": True},
        "health": {"on_nonfinite": "rewind", "on_divergence": "rewind"},
        "phases": [
            {"name": "a", "steps": 3},
            {"name": "b", "steps": 3, "train": {"patch_dropout": 0.0, "recompute": "full"}, "data": {"frames": 2}},
            {
                "name": "c", "steps": 2, "schedule": "restart", "model": {"vision": {"image_size": 84}},
                "train": {"activation_budget_gb": None, "keep_activations": 1, "recompute": "none"},
            },
        ],
    }  # fmt: skip
    return resolve(tree, list(overrides))


JOBS: dict[str, Callable[..., Config]] = {"student": student, "clip": clip}
TENSOR, VIRTUAL = ("parallel.tensor=2", "parallel.sequence=false"), ("parallel.pipeline=2", "parallel.virtual=2")
LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "student": (TENSOR, VIRTUAL, ()),
    "clip": (TENSOR, ("parallel.pipeline=2", "train.offload_stash=true"), ()),
}
"""Of two ranks; the last is DP 2. A job that is stopped goes on at the next one."""
TOLERANCE = {"student": 1e-3, "clip": 1e-4}
"""Relative, of losses; bf16 weights round differently at another layout."""


class _Stopped(Exception):
    """The job is ended by its test."""


class _Events(Callback):
    """Breaks a weight once its step is done, and ends the job at a step."""

    def __init__(self, trainer: Trainer, stop_at: int | None):
        self.trainer, self.stop_at = trainer, stop_at

    def on_step(self, record: Record) -> None:
        done = record["step"] + 1
        if done == POISONED:
            self.trainer.towers.wait_for_weights()
            for tensor, parameter in self.trainer.towers.logical_parameters():
                if tensor.name == "vision.head.norm.weight":
                    parameter.data.fill_(torch.nan)
        if done == self.stop_at:
            raise _Stopped


def run_job(config: Config, stop_at: int | None = None) -> None:
    """What is left of the job. Collective over all ranks."""
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())
    for phase in plan_job(config).phases:
        check_layout(phase.config, mesh.world.size)

    def callbacks(trainer: Trainer) -> list[Callback]:
        evaluation: list[Callback] = [Evaluation(trainer)] if config.evaluate.every_steps else []
        metrics: list[Callback] = [MetricsFile()] if mesh.world.rank == 0 else []
        return [*evaluation, *metrics, CheckpointCallback(trainer), _Events(trainer, stop_at)]

    try:
        train_job(plan_job(config), mesh, prepare(), callbacks)
    except _Stopped:
        meet(mesh.world, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both jobs have run in it on one rank without a stop, as `student` and `clip`."""
    folder = tmp_path_factory.mktemp("together")
    make_shards(folder, [20, 15])
    with job(ParallelConfig()):
        for name, config in JOBS.items():
            run_job(config(str(folder), name))
    return folder


def curve(folder: Path, run: str) -> list[dict[str, Any]]:
    """Every record without what a clock says."""
    records = read_metrics(folder / run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in records]


def last_checkpoint(folder: Path, run: str) -> Path:
    """With moments and averages, which no loss shows."""
    return folder / run / "checkpoints" / f"step_{STEPS:08d}"


def averages(folder: Path, run: str) -> dict[str, Tensor]:
    """Of the last checkpoint."""
    checkpoint = Checkpoint(last_checkpoint(folder, run))
    return {name: checkpoint.read_whole(name, AVERAGE) for name in checkpoint.manifest.shapes(AVERAGE)}


@pytest.mark.parametrize("name", JOBS)
def test_a_step_that_goes_wrong_is_rewound_and_nothing_else(name: str, folder: Path) -> None:
    records = curve(folder, name)
    assert [record["step"] for record in records] == list(range(STEPS))
    assert [record["rewinds"] for record in records] == [0] * POISONED + [1] * (STEPS - POISONED)
    assert [record["loss"] is None for record in records] == [step == POISONED for step in range(STEPS)]
    assert not any(record["skipped_steps"] or record["bad_samples"] for record in records)


def test_the_clip_begins_with_the_students_tower(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with job(ParallelConfig()):
        run_job(clip(str(folder), "begun"), stop_at=1)
    said = capsys.readouterr().err
    assert f"{folder}/student" in said and "mask_token" in said


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_gone_on_with_it_is_the_same_to_the_bit(name: str, stop: int, folder: Path) -> None:
    run = f"{name}-stopped-{stop}"
    with job(ParallelConfig()):
        run_job(JOBS[name](str(folder), run), stop_at=stop)
        run_job(JOBS[name](str(folder), run))
    assert curve(folder, run) == curve(folder, name)
    assert not differing(last_checkpoint(folder, run), last_checkpoint(folder, name))


def run_layouts(folder: str, name: str) -> None:
    """Each layout hands the job on to the next at one of the stops."""
    first, second, third = LAYOUTS[name]
    for run, stop, before, after in (("1", STOPS[0], first, second), ("2", STOPS[1], second, third)):
        run_job(JOBS[name](folder, f"{name}-layouts-{run}", *before), stop_at=stop)
        run_job(JOBS[name](folder, f"{name}-layouts-{run}", *after))


@pytest.mark.parametrize("name", JOBS)
def test_other_layouts_give_the_same_curve(name: str, folder: Path) -> None:
    run_distributed(run_layouts, 2, folder=str(folder), name=name)
    expected = curve(folder, name)
    for run in ("1", "2"):
        found = curve(folder, f"{name}-layouts-{run}")
        for key in ("step", "phase", "samples_seen", "rewinds", "eval_zero_shot_top1"):
            assert [record.get(key) for record in found] == [record.get(key) for record in expected], (run, key)
        sound = [i for i in range(STEPS) if i != POISONED]
        assert [found[i]["loss"] for i in sound] == pytest.approx(
            [expected[i]["loss"] for i in sound], rel=TOLERANCE[name]
        ), run
        assert not deviations(averages(folder, f"{name}-layouts-{run}"), averages(folder, name), 0.01), run
